"""`xray-fastai predict`: rows on the terminal or in a file that grows, heat maps, and resuming."""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
from PIL import Image

from xray_fastai import DISCLAIMER
from xray_fastai.data.images import has_no_extension, open_image
from xray_fastai.inference.gradcam import grad_cam, overlay
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.predict import Rows, check_folders
from xray_fastai.inference.row_file import Row, RowFile
from xray_fastai.inference.sharding import follow, predict_sharded
from xray_fastai.inference.stream import Batch, Source, image_sources, predict_batches
from xray_fastai.system import distributed
from xray_fastai.system.device import describe
from xray_fastai.system.errors import UserError
from xray_fastai.system.progress import progress_bar
from xray_fastai.system.signals import ignore_closed_output
from xray_fastai.system.text import WIDTH, count_of, printable, shorten

SHOWN = 50
"""Rows that the terminal gets; a file gets all."""

SAME = {"fp32": 1e-3, "bf16": 0.05}
"""By precision: an image's probabilities by one model differ by less, whatever the device and the batch."""


class Table:
    "The first rows on the terminal, as they come, in 80 columns; after them a line that says how to get the rest."

    def __init__(
        self,
        classes: list[str],
        paths: list[str],  # of the rows to come: they say how wide the first column is
    ):
        self.rows = 0
        self.classes, self.each = classes, True
        self.widths = [max(10, *map(len, classes)), *(max(6, len(name) + 2) for name in classes)]
        if sum(self.widths) + 2 * len(self.widths) > WIDTH - 24:  # the probability of the class called alone
            self.widths, self.each = [min(30, self.widths[0]), 11], False
        longest = max([4, *map(len, paths)])
        self.widths.insert(0, min(longest, WIDTH - sum(self.widths) - 2 * len(self.widths)))

    def write(self, rows: list[Row]) -> None:
        for row in rows[: max(0, SHOWN + 1 - self.rows)]:
            if self.rows == 0:
                named = [f"p_{name}" for name in self.classes] if self.each else ["probability"]
                print(self._line(["path", "prediction", *named]))
            if self.rows == SHOWN:
                print(f"... {SHOWN} rows are shown; --output FILE.csv gets all of them", flush=True)
            else:
                print(self._line(self._cells(row)), flush=True)
            self.rows += 1

    def _cells(self, row: Row) -> list[str]:
        if row["error"] is not None:
            return [row["path"], row["error"].removeprefix(f"{row['path']}: ")]
        names = self.classes if self.each else [row["prediction"]]
        return [row["path"], row["prediction"], *(f"{row[f'p_{name}']:.4f}" for name in names)]

    def _line(self, cells: list[str]) -> str:
        path, second, *numbers = (printable(cell) for cell in cells)
        cells = [f"{shorten(path, self.widths[0]):<{self.widths[0]}}", shorten(second, WIDTH - self.widths[0] - 2)]
        if numbers:
            cells[1] = f"{shorten(second, self.widths[1]):<{self.widths[1]}}"
            cells += [f"{number:>{width}}" for number, width in zip(numbers, self.widths[2:], strict=True)]
        return "  ".join(cells).rstrip()


def _predict(
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
    if output is not None:
        RowFile.check(output, resume)
    elif resume:
        raise UserError("give the file to continue by --output", option="resume")
    check_folders(paths, recursive, heatmaps)
    opened = open_model(model, device, precision)
    rows = Rows(opened, threshold, uncalibrated, tta)
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
        raise SystemExit(ignore_closed_output()) from None
    return calls[None]


def _run(
    rows: Rows,
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
    shared = predict_sharded(model, sources, batch_size, rows.views, pictures=maps is not None)
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


def predict_command(paths: list[str], model=None, **options) -> int:
    """`_predict`, by all processes that there are; in each the same number comes back."""
    with distributed.session() as first:
        if first:
            return distributed.share(_predict(paths, model, **options))
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says when it is over
        follow(options["device"])
        return distributed.share()


class _HeatMaps:
    "A folder of Grad-CAM overlays, named as the images are, with a number where that name is taken."

    def __init__(self, folder: Path, model: Model):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"can't be made ({error.strerror}); give another folder", option="heatmaps", value=folder
            ) from None
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
                raise UserError(
                    f"can't be written ({error.strerror or error})", option="heatmaps", value=path
                ) from None
            return


def _stem(path: str) -> str:
    """A file's name without its extension; 1.2.840 has none."""
    name = Path(path).name
    return name if has_no_extension(name) else Path(path).stem


def _standard_input() -> Iterator[str]:
    for line in sys.stdin.buffer:  # bytes: a file's name need not be UTF-8
        if line.strip():
            yield os.fsdecode(line.rstrip(b"\r\n"))


def _skip_done(file: RowFile, sources: Iterator[Source], rows: Rows) -> Counter:
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
                f"row {number} of {file.path} is {row['path']}, but {there}; give the same inputs", option="resume"
            )
        if row["threshold"] != rows.threshold:
            raise UserError(
                f"the threshold in {file.path} is {row['threshold']}, here {rows.threshold}; give the same "
                "--model and --threshold",
                option="resume",
            )
        calls[row["prediction"]] += 1
        last = row if row["error"] is None else last
    if last is not None:
        (batch,) = predict_batches(rows.model, [last["path"]], 1, rows.views)
        (again,) = rows(batch)
        names = [name for name in rows.columns if name.startswith("p_")]
        if again["error"] is None and max(abs(again[name] - last[name]) for name in names) > SAME[rows.model.precision]:
            raise UserError(
                f"another model (or --precision, or --tta) gave the rows in {file.path}, or the images "
                f"changed since (by {last['path']})",
                option="resume",
            )
    return calls
