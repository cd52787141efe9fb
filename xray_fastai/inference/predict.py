"""What a model says of new images: a row each, in a data frame, on the terminal, or in a file that grows as it goes.

Columns: `path`, `prediction`, `p_<CLASS>` for each class, `threshold` (of the class to detect; empty for more than two
classes, of which the most probable is called) and `error` (then there is no prediction).
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from xray_fastai.data.images import has_no_extension, open_image
from xray_fastai.inference import sharding
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.row_file import Row, RowFile
from xray_fastai.inference.stream import Batch, Source, check_folder, image_sources, predict_batches
from xray_fastai.inference.tta import Views
from xray_fastai.system import distributed
from xray_fastai.system.device import describe
from xray_fastai.system.errors import UserError
from xray_fastai.system.progress import SHOWN, Table, progress_bar
from xray_fastai.system.text import count_of

SAME = {"fp32": 1e-3, "bf16": 0.05}
"""By precision: an image's probabilities by one model differ by less, whatever the device and the batch."""


def predict(
    paths: Source | Iterable[Source],
    model: str | Path | Model | None = None,
    *,
    recursive: bool = False,
    threshold: float | None = None,
    uncalibrated: bool = False,
    tta: bool = False,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "auto",
) -> pd.DataFrame:
    """Predict images; one that can't be read becomes a row with its error.

    Args:
        paths: one or many: files, folders, PIL images, or arrays as `images.open_image` takes them.
        model: an export's folder, or one that is open already; None takes the newest in ./exports.
        recursive: folders with what is below them.
        threshold: the probability of the class to detect from which an image is called that; None: the export's own.
        uncalibrated: probabilities without the temperature. The export's own threshold moves with them, so that it
            makes the same decisions.
        tta: test-time augmentation (`xray_fastai.inference.tta`): the mean over five views of each image.
        batch_size: images at once; what comes out is the same.
        device: auto, cpu, cuda or mps; a model that is open stays where it is.
        precision: auto, fp32 or bf16 (`inference.open_model`).

    Returns:
        A row an image, in the order of `paths`; the `path` of an image that has none is `image N`, from 0.

    Raises:
        UserError: no export, a damaged one, a folder without images, or a threshold that can't be.
    """
    picture = isinstance(paths, np.ndarray) and paths.ndim in (2, 3)
    paths = [paths] if picture or isinstance(paths, (str, bytes, os.PathLike, Image.Image)) else list(paths)
    _check_folders(paths, recursive)
    model = model if isinstance(model, Model) else open_model(model, device, precision)
    rows = _Rows(model, threshold, uncalibrated, tta)
    with closing(predict_batches(model, image_sources(paths, recursive), batch_size, rows.views)) as batches:
        return pd.DataFrame([row for batch in batches for row in rows(batch)], columns=rows.columns)


def predict_command(
    paths: list[str],
    model: Path | None = None,
    *,
    output: Path | None = None,
    resume: bool = False,
    heatmaps: Path | None = None,
    recursive: bool = False,
    threshold: float | None = None,
    uncalibrated: bool = False,
    tta: bool = False,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "auto",
) -> int:
    """Predict onto the terminal, or into `output` (.csv or .jsonl); `-` is a list of paths on standard input.

    `resume` continues `output` after the rows that it has. `heatmaps` is a folder that gets an overlay an image; what
    is in it stays. All else is as for `predict`.

    Returns:
        How many rows say that a file could not be read, with those that were there before.

    Raises:
        UserError: as `predict`; an output that is there already, can't be written to, or does not fit what is to be
            continued.
        SystemExit: 130 on Ctrl-C, once it was said what stands; 141 where nobody reads standard output any more.
    """
    from xray_fastai import DISCLAIMER

    if output is not None:
        RowFile.check(output, resume)
    elif resume:
        raise UserError("--resume: give the file to continue by --output")
    _check_folders(paths, recursive, heatmaps)
    opened = open_model(model, device, precision)
    rows = _Rows(opened, threshold, uncalibrated, tta)
    maps = None if heatmaps is None else _HeatMaps(heatmaps, opened)
    sources = image_sources(chain.from_iterable(_standard_input() if p == "-" else [p] for p in paths), recursive)
    bar = progress_bar(None if "-" in paths else lambda: sum(1 for _ in image_sources(paths, recursive)))
    try:
        print(DISCLAIMER)
        print(f"{'model':<14}{opened.path}" + (" (the newest in ./exports)" if model is None else ""))
        processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        print(f"{'device':<14}{describe(opened.learn.dls.device)}{processes}, precision {opened.precision}")
        print(rows, flush=True)
        with nullcontext() if output is None else RowFile(output, rows.columns, resume) as file:
            try:
                calls = _run(rows, sources, file, maps, batch_size, bar)
            except KeyboardInterrupt:
                stands = "" if file is None else f"; {count_of(file.rows, 'row')} of {output} stand, --resume goes on"
                print(f"\nStopped{stands}.", file=sys.stderr)
                raise SystemExit(130) from None
        if calls[None]:
            where = "their rows say why" if output is None else f"the column error of {output} says why"
            print(f"Error: {calls[None]:,} of {calls.total():,} files could not be read; {where}", file=sys.stderr)
        print(DISCLAIMER, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which Python flushes once more at its end
        raise SystemExit(141) from None
    return calls[None]


def _run(
    rows: "_Rows",
    sources: Iterator[Source],
    file: RowFile | None,  # None: the terminal
    maps: "_HeatMaps | None",
    batch_size: int,
    bar: AbstractContextManager[Callable[[int], None]],  # is told how many rows there are
) -> Counter:
    "How many rows say what, with those that were in the file before; None are the errors."
    model, calls = rows.model, Counter()
    if file is None:
        names = list(islice(sources, SHOWN))
        table, sources = Table(model.classes, names), chain(names, sources)
        print()
    else:
        calls = _skip_done(file, sources, rows)
        file.write([])
        if calls:
            print(f"{'continued':<14}after {count_of(calls.total(), 'row')} of {file.path}", flush=True)
    before, start = calls.total(), time.perf_counter()
    shared = sharding.predict_batches(model, sources, batch_size, rows.views, pictures=maps is not None)
    with closing(shared) as batches, bar as advance:
        for batch in batches:
            found = rows(batch, calls.total())
            with nullcontext() if maps is None else maps.written(batch, found):
                (table if file is None else file).write(found)
            calls.update(row["prediction"] for row in found)
            if file is not None or calls.total() > SHOWN:
                advance(calls.total())
    seconds, new = time.perf_counter() - start, calls.total() - before
    print(f"\n{'predicted':<14}{count_of(new, 'file')} in {seconds:.1f} s, {new / seconds:.0f} images/s")
    if rows.views is not None:
        print(f"{'tta':<14}{rows.views}")
    print(f"{'called':<14}{', '.join(f'{calls[name]:,} {name}' for name in model.classes)}; errors: {calls[None]:,}")
    if file is not None:
        print(f"{'written':<14}{file.path}, {count_of(file.rows, 'row')}")
    sys.stdout.flush()
    return calls


class _Rows:
    "Batches become rows."

    def __init__(
        self,
        model: Model,
        threshold: float | None,  # None: the export's own
        uncalibrated: bool,
        tta: bool,
    ):
        self.model, self.calibrated = model, not uncalibrated
        self.views = Views() if tta else None
        if threshold is not None and len(model.classes) != 2:
            raise UserError(f"--threshold {threshold:g}: of {len(model.classes)} classes the most probable is called")
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"--threshold {threshold:g}: give a probability, from 0 to 1")
        self.threshold = model.threshold_of(self.calibrated) if threshold is None else float(threshold)
        self.columns = ["path", "prediction", *(f"p_{name}" for name in model.classes), "threshold", "error"]

    def __call__(self, batch: Batch, first: int = 0) -> list[Row]:
        "`first` is the position of the batch's first source among all."
        return [
            self._row(_name_of(source, number), logits, error)
            for number, (source, logits, error) in enumerate(batch.outputs(), first)
        ]

    def _row(self, name: str, logits: np.ndarray | None, error: str | None) -> Row:
        prediction, values = None, [None] * len(self.model.classes)
        if logits is not None and not np.isfinite(logits).all():
            error = f"{name}: the network's output is not a number"
        elif logits is not None:
            probabilities = self.model.probabilities(logits[None], self.calibrated)  # (1, classes)
            prediction = self.model.classes[int(self.model.decide(probabilities, self.threshold)[0])]
            values = [round(float(p), 7) for p in probabilities[0]]
        return dict(zip(self.columns, [name, prediction, *values, self.threshold, error], strict=True))

    def __str__(self) -> str:
        called = "the most probable is called"
        if self.threshold is not None:
            called = f"{self.model.positive} from a probability of {self.threshold:.4g}"
        text = f"{'classes':<14}{', '.join(self.model.classes)}; {called}"
        if self.model.settings["data"]["rehearsal"]:
            text += f"\n{'trained on':<14}X-rays that this program drew itself: it knows nothing of patients"
        return text


class _HeatMaps:
    "A folder of Grad-CAM overlays, named as the images are, with a number where that name is taken."

    def __init__(self, folder: Path, model: Model):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--heatmaps {folder}: can't be made ({error.strerror}); give another folder") from None
        self.folder, self.model = folder, model
        self.taken: dict[str, int] = {}  # the last number of names that are there more than once
        self.made: list[Path] = []  # of the batch at hand

    @contextmanager
    def written(self, batch: Batch, rows: list[Row]) -> Iterator[None]:
        """The map of the class that each row calls. Left by an error or Ctrl-C, as the rows then don't stand, all of
        the batch's go, whole or begun.

        Raises:
            UserError: the disk is full, or the folder can't be written to.
        """
        self.made.clear()
        try:
            self._write(batch, rows)
            yield
        except BaseException:
            for path in self.made:
                with suppress(OSError):
                    path.unlink()
            raise

    def _write(self, batch: Batch, rows: list[Row]) -> None:
        from xray_fastai.inference.gradcam import grad_cam, overlay

        read = [(source, row) for source, row in zip(batch.sources, rows, strict=True) if row["error"] is None]
        if len(read) < len(batch.images) or not read:  # not a number: no map either
            return
        targets = [self.model.classes.index(row["prediction"]) for _, row in read]
        maps = grad_cam(self.model, batch.images, targets=np.array(targets))  # (readable, h, w)
        for (source, row), cam in zip(read, maps, strict=True):
            self._save(overlay(open_image(source), cam), _stem(row["path"]))

    def _save(self, picture: Image.Image, stem: str) -> None:
        for number in count(self.taken.get(stem, 0) + 1):
            path = self.folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
            try:
                with path.open("xb") as stream:
                    self.made.append(path)
                    picture.save(stream, "PNG")
            except FileExistsError:
                self.taken[stem] = number
                continue
            except OSError as error:
                raise UserError(f"--heatmaps {path}: can't be written ({error.strerror or error})") from None
            return


def _stem(path: str) -> str:
    """A file's name without its extension; 1.2.840 has none."""
    name = Path(path).name
    return name if has_no_extension(name) else Path(path).stem


def _name_of(source: Source, number: int) -> str:
    """What a row calls its image: the path, or for what has none its position."""
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "")
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) and source else f"image {number}"


def _check_folders(paths: list, recursive: bool, heatmaps: Path | None = None) -> None:
    for path in paths:
        if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
            check_folder(path, recursive)
            if heatmaps is not None:
                folder, maps = Path(path).resolve(), heatmaps.resolve()
                if maps == folder or (recursive and folder in maps.parents):
                    raise UserError(f"--heatmaps {heatmaps}: among the images of {path}; give a folder outside of it")


def _standard_input() -> Iterator[str]:
    for line in sys.stdin.buffer:  # bytes: a file's name need not be UTF-8
        if line.strip():
            yield os.fsdecode(line.rstrip(b"\r\n"))


def _skip_done(file: RowFile, sources: Iterator[Source], rows: _Rows) -> Counter:
    """Take the inputs off `sources` whose rows are in `file`.

    Returns:
        How many rows say what; None are the errors.

    Raises:
        UserError: the rows are not those of the inputs, or another model's.
    """
    calls, last = Counter(), None
    for number, row in enumerate(file.done(), 1):
        source = next(sources, None)
        if source != row["path"]:
            there = "there are fewer inputs" if source is None else f"that input is {source}"
            raise UserError(
                f"--resume: row {number} of {file.path} is {row['path']}, but {there}; give the same inputs"
            )
        if row["threshold"] != rows.threshold:
            raise UserError(
                f"--resume: the threshold in {file.path} is {row['threshold']}, here {rows.threshold}; give the same "
                "--model and --threshold"
            )
        calls[row["prediction"]] += 1
        last = row if row["error"] is None else last
    if last is not None:
        (batch,) = predict_batches(rows.model, [last["path"]], 1, rows.views)
        (again,) = rows(batch)
        names = [name for name in rows.columns if name.startswith("p_")]
        if again["error"] is None and max(abs(again[name] - last[name]) for name in names) > SAME[rows.model.precision]:
            raise UserError(
                f"--resume: another model (or --precision, or --tta) gave the rows in {file.path}, or the images "
                f"changed since (by {last['path']})"
            )
    return calls
