"""Runs `xray-fastai predict`: rows on the terminal or in an output file, heat maps, and `--resume`."""

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
from xray_fastai.config.class_names import UNCERTAIN
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.data.images import has_no_extension, open_image
from xray_fastai.export.reader import why_chosen
from xray_fastai.inference.gradcam import grad_cam, overlay
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.row_file import Row, RowFile
from xray_fastai.inference.rows import DIGITS, RowBuilder, Withheld, probability_column, written_digits
from xray_fastai.inference.sharding import follow, predict_sharded
from xray_fastai.inference.stream import Batch, Source, check_folders, image_sources, predict_batches
from xray_fastai.inference.tta import describe as describe_tta
from xray_fastai.system import distributed
from xray_fastai.system.device import describe
from xray_fastai.system.errors import UserError
from xray_fastai.system.parallel import map_in_threads
from xray_fastai.system.progress import progress_bar
from xray_fastai.system.signals import ignore_closed_output, output_is_closed
from xray_fastai.system.text import WIDTH, count_of, printable, shorten

MAX_ROWS = 50
"""Rows that the terminal shows; an output file gets all."""
SHOWN_DIGITS = 4
"""Decimal places of a probability on the terminal, where a row has `rows.DIGITS`."""
SAME_MODEL = {"fp32": 1e-3, "bf16": 0.05}
"""By precision: the probabilities that one model gives for an image differ by less, on any device and in any batch."""


class Table:
    """Prints the first rows as they come, in 80 columns, then a line that says how to get the others.

    The widths are known before the first row is; `rich.table` would need all rows before it prints one.
    """

    def __init__(
        self,
        classes: list[str],
        paths: list[str],  # of the rows to come: they give the width of the first column
        digits: int,  # decimal places of a probability
    ):
        self.rows, self.digits = 0, digits
        self.classes, self.all_classes = classes, True
        number = digits + len("0.")
        self.widths = [max(10, *map(len, classes)), *(max(number, len(probability_column(c))) for c in classes)]
        if sum(self.widths) + 2 * len(self.widths) > WIDTH - 24:  # too wide: only the predicted class's probability
            self.widths, self.all_classes = [min(30, self.widths[0]), max(number, len("probability"))], False
        longest = max([4, *map(len, paths)])
        self.widths.insert(0, min(longest, WIDTH - sum(self.widths) - 2 * len(self.widths)))

    def write(self, rows: list[Row]) -> None:
        for row in rows[: max(0, MAX_ROWS + 1 - self.rows)]:
            if self.rows == 0:
                names = map(probability_column, self.classes) if self.all_classes else ["probability"]
                print(self._line(["path", "prediction", *names]))
            if self.rows == MAX_ROWS:
                print(f"... {MAX_ROWS} rows are shown; to get all of them, give --output FILE.csv", flush=True)
            else:
                print(self._line(self._cells(row)), flush=True)
            self.rows += 1

    def _cells(self, row: Row) -> list[str]:
        if row["error"] is not None:
            return [row["path"], row["error"].removeprefix(f"{row['path']}: ")]
        names = self.classes
        if not self.all_classes:  # of an uncertain image the most probable class's
            called = row["prediction"]
            names = [max(names, key=lambda name: row[probability_column(name)]) if called == UNCERTAIN else called]
        return [row["path"], row["prediction"], *(f"{row[probability_column(name)]:.{self.digits}f}" for name in names)]

    def _line(self, cells: list[str]) -> str:
        path, second, *numbers = (printable(cell) for cell in cells)
        cells = [f"{shorten(path, self.widths[0]):<{self.widths[0]}}", shorten(second, WIDTH - self.widths[0] - 2)]
        if numbers:
            cells[1] = f"{shorten(second, self.widths[1]):<{self.widths[1]}}"
            cells += [f"{number:>{width}}" for number, width in zip(numbers, self.widths[2:], strict=True)]
        return "  ".join(cells).rstrip()


def predict_command(paths: list[str], model: Path | None, config: PredictConfig) -> int:
    """Predict onto the terminal or into `config.output`, by all processes.

    Args:
        paths: files and folders; `-` is a list of paths on standard input.
        model: an export's folder; None takes the newest in ./exports.
        config: `resume` continues `output` after its last row; `heatmaps` is a folder that gets an overlay of each
            image, and keeps the files that it has.

    Returns:
        How many rows say that a file could not be read, including those of a continued file; the same in each process.

    Raises:
        UserError: as `predict`; or the output file exists, cannot be written to, or does not fit these inputs.
        SystemExit: 130 on Ctrl-C, after a message that says what was kept; 141 if standard output was closed.
    """
    with distributed.session() as first:
        if first:
            return distributed.share(_predict(paths, model, config))
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
        follow(config.device)
        return distributed.share()


def _predict(paths: list[str], model: Path | None, config: PredictConfig) -> int:
    output = None if config.output is None else Path(config.output)
    if output is not None:
        RowFile.check(output, config.resume)
    check_folders(paths, config.recursive)
    _check_heatmaps_outside(paths, config)
    opened = open_model(model, config.device, config.precision).at_prevalence(config.prevalence)
    builder = RowBuilder(opened, config)
    maps = None if config.heatmaps is None else _HeatMaps(Path(config.heatmaps), opened)
    listed = chain.from_iterable(_standard_input() if path == "-" else [path] for path in paths)
    passed_over: Counter[str] = Counter()
    sources = image_sources(listed, config.recursive, passed_over)
    bar = progress_bar(None if "-" in paths else lambda: sum(1 for _ in image_sources(paths, config.recursive)))
    try:
        print(DISCLAIMER)
        print(f"{'model':<14}{opened.path}{why_chosen(model)}")
        processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        print(f"{'device':<14}{describe(opened.device)}{processes}, precision {opened.precision}")
        print(builder, flush=True)
        types = {column.name: column.type for column in builder.columns}
        with nullcontext() if output is None else RowFile(output, types, config.resume) as file:
            try:
                counts = _run(builder, sources, file, maps, bar)
            except KeyboardInterrupt:
                kept = "" if file is None else f"; {output} has {count_of(file.rows, 'row')}, continue it by --resume"
                print(f"\nStopped{kept}.", file=sys.stderr)
                raise SystemExit(130) from None
        if passed_over:
            print(f"{'passed over':<14}{count_of(passed_over.total(), 'file')} whose name is no image's")
        if counts[None]:
            where = "their rows say why" if output is None else f"the column error of {output} says why"
            print(f"Error: {counts[None]:,} of {counts.total():,} files could not be read; {where}", file=sys.stderr)
        print(DISCLAIMER, flush=True)
    except OSError as error:
        if not output_is_closed(error):
            raise
        raise SystemExit(ignore_closed_output()) from None
    return counts[None]


def _run(
    builder: RowBuilder,
    sources: Iterator[Source],
    file: RowFile | None,  # None: the terminal
    maps: "_HeatMaps | None",
    bar: AbstractContextManager[Callable[[int], None]],  # takes the number of rows
) -> Counter:
    """Predict all sources and print a summary.

    Returns:
        The number of rows by predicted class, including those of a continued file; the errors are under None, and
        the uncertain ones under their reasons.
    """
    model, config, counts = builder.model, builder.config, Counter()
    if file is None:
        names = list(islice(sources, MAX_ROWS))
        digits = SHOWN_DIGITS + written_digits(model, builder.threshold) - DIGITS
        table, sources = Table(model.classes, names, digits), chain(names, sources)
        print()
    else:
        counts = _skip_done(file, sources, builder)
        file.write([])
        if counts:
            print(f"{'continued':<14}after {count_of(counts.total(), 'row')} of {file.path}", flush=True)
    before, start = counts.total(), time.perf_counter()
    shared = predict_sharded(model, sources, config.batch_size, config.tta, with_images=maps is not None)
    with closing(shared) as batches, bar as advance:
        for batch in batches:
            rows = builder.rows(batch, counts.total())
            with nullcontext() if maps is None else maps.written(batch, rows):
                (table if file is None else file).write(rows)
            counts.update(builder.withheld(row) or row["prediction"] for row in rows)
            if file is not None or counts.total() > MAX_ROWS:
                advance(counts.total())
    seconds, new = time.perf_counter() - start, counts.total() - before
    print(f"\n{'predicted':<14}{count_of(new, 'file')} in {seconds:.1f} s, {new / seconds:.0f} images/s")
    if config.tta:
        print(f"{'tta':<14}{describe_tta(seconds)}")
    by_class = ", ".join(f"{counts[name]:,} {name}" for name in model.classes)
    print(f"{'predictions':<14}{by_class}; errors: {counts[None]:,}")
    if reasons := {reason: counts[reason] for reason in Withheld if counts[reason]}:
        listed = ", ".join(f"{number:,} {builder.why(reason)}" for reason, number in reasons.items())
        print(f"{UNCERTAIN:<14}{sum(reasons.values()):,} {UNCERTAIN}: {listed}")
    if file is not None:
        print(f"{'written':<14}{file.path}, {count_of(file.rows, 'row')}")
    sys.stdout.flush()
    return counts


def _check_heatmaps_outside(paths: list[str], config: PredictConfig) -> None:
    """Check that the heat maps do not come among the images, where the next run would read them.

    Raises:
        UserError: the folder of the heat maps is one of the image folders, or in one that is searched recursively.
    """
    if config.heatmaps is None:
        return
    maps = Path(config.heatmaps).resolve()
    for path in filter(os.path.isdir, paths):
        folder = Path(path).resolve()
        if maps == folder or (config.recursive and folder in maps.parents):
            raise UserError(
                f"inside the images of {path}; give a folder outside of it", option="heatmaps", value=config.heatmaps
            )


class _HeatMaps:
    """Writes Grad-CAM overlays into a folder, named as the images are; a number is added to a name that exists."""

    def __init__(self, folder: Path, model: Model):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot be made ({error.strerror}); give another folder", option="heatmaps", value=folder
            ) from None
        self.folder, self.model = folder, model
        self.numbers: dict[str, int] = {}  # the last number of a name that exists more than once
        self.written_files: list[Path] = []  # of the current batch

    @contextmanager
    def written(self, batch: Batch, rows: list[Row]) -> Iterator[None]:
        """Write the overlays of a batch, each for the class that its row predicts.

        If the block ends with an error or Ctrl-C, its rows are not kept, and all overlays of the batch are deleted.

        Raises:
            UserError: the disk is full, or the folder cannot be written to.
        """
        self.written_files.clear()
        try:
            self._write(batch, rows)
            yield
        except BaseException:
            for path in self.written_files:
                with suppress(OSError):
                    path.unlink()
            raise

    def _write(self, batch: Batch, rows: list[Row]) -> None:
        predicted = [(source, row) for source, row in zip(batch.sources, rows, strict=True) if row["error"] is None]
        if len(predicted) < len(batch.images) or not predicted:  # an output is not a number: no maps either
            return
        targets = [self.model.classes.index(self._class_of(row)) for _, row in predicted]
        maps = grad_cam(self.model, batch.images, targets=np.array(targets))  # (readable, h, w)
        with closing(map_in_threads(open_image, [source for source, _ in predicted])) as pictures:
            for picture, (_, row), cam in zip(pictures, predicted, maps, strict=True):
                self._save(overlay(picture, cam), _stem(row["path"]))

    def _class_of(self, row: Row) -> str:
        """Return the class that a row predicts, or would predict if its image were called."""
        if row["prediction"] != UNCERTAIN:
            return row["prediction"]
        probabilities = np.array([[row[probability_column(name)] for name in self.model.classes]])
        return self.model.classes[int(self.model.decide(probabilities, row["threshold"])[0])]

    def _save(self, picture: Image.Image, stem: str) -> None:
        for number in count(self.numbers.get(stem, 0) + 1):
            path = self.folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
            try:
                with path.open("xb") as stream:
                    self.written_files.append(path)
                    picture.save(stream, "PNG")
            except FileExistsError:
                self.numbers[stem] = number
                continue
            except OSError as error:
                raise UserError(
                    f"cannot be written ({error.strerror or error}); free space, or give another folder",
                    option="heatmaps",
                    value=path,
                ) from None
            return


def _stem(path: str) -> str:
    """Return a file's name without its extension; the DICOM name 1.2.840 has no extension."""
    name = Path(path).name
    return name if has_no_extension(name) else Path(path).stem


def _standard_input() -> Iterator[str]:
    for line in sys.stdin.buffer:  # bytes: a file name may not be UTF-8
        if line.strip():
            yield os.fsdecode(line.rstrip(b"\r\n"))


def _skip_done(file: RowFile, sources: Iterator[Source], builder: RowBuilder) -> Counter:
    """Take the inputs off `sources` that have a row in `file`.

    Returns:
        The number of rows by predicted class; the errors are under None, and the uncertain ones under their reasons.

    Raises:
        UserError: the rows belong to other inputs, to another model, or other ones would be uncertain.
    """
    counts, last = Counter(), None
    for number, row in enumerate(file.done(), 1):
        source = next(sources, None)
        if source is None or not file.is_row_of(row, source):
            instead = "there are fewer inputs" if source is None else f"that input is {source}"
            raise UserError(
                f"row {number} of {file.path} is {row['path']}, but {instead}; give the same inputs", option="resume"
            )
        if row["threshold"] != builder.threshold:
            raise UserError(
                f"the threshold in {file.path} is {row['threshold']}, here {builder.threshold}; give the same "
                "model= and threshold=",
                option="resume",
            )
        if row.get("prevalence") != builder.model.prevalence:
            raise UserError(
                f"the prevalence in {file.path} is {row['prevalence']}, here {builder.model.prevalence}; give the same "
                "prevalence=",
                option="resume",
            )
        reason = builder.withheld(row)
        if (row["prediction"] == UNCERTAIN) != (reason is not None):
            raise UserError(
                f"row {number} of {file.path} is {row['prediction']}, and would not be now; give the same gate= and "
                "abstain=",
                option="resume",
            )
        counts[reason or row["prediction"]] += 1
        last = (source, row) if row["error"] is None else last
    if last is not None:
        _check_same_model(file, *last, builder)
    return counts


def _check_same_model(file: RowFile, source: Source, row: Row, builder: RowBuilder) -> None:
    """Predict the image of a row again and compare the probabilities.

    Raises:
        UserError: they differ by more than one model's probabilities can.
    """
    (batch,) = predict_batches(builder.model, [source], 1, builder.config.tta)
    (again,) = builder.rows(batch)
    if again["error"] is not None:
        return
    names = map(probability_column, builder.model.classes)
    if builder.model.prevalence is not None:  # of a small prevalence all probabilities are alike
        names = [probability_column(builder.model.positive)]
        again, row = ({**r, names[0]: builder.model.moved(r[names[0]], back=True)} for r in (again, row))
    if max(abs(again[name] - row[name]) for name in names) > SAME_MODEL[builder.model.precision]:
        raise UserError(
            f"the rows in {file.path} came from another model, precision= or tta=, or the images changed "
            f"(for {row['path']} the probabilities differ)",
            option="resume",
        )
