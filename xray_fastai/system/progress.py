"""What a person sees of many rows: the first of them in 80 columns, and how far it is."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from xray_fastai.inference.row_file import Row

Step = TypeVar("Step")

SHOWN = 50
"""Rows that the terminal gets; a file gets all."""
WIDTH = 80


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
        path, second, *numbers = (_printable(cell) for cell in cells)
        cells = [f"{_shorten(path, self.widths[0]):<{self.widths[0]}}", _shorten(second, WIDTH - self.widths[0] - 2)]
        if numbers:
            cells[1] = f"{_shorten(second, self.widths[1]):<{self.widths[1]}}"
            cells += [f"{number:>{width}}" for number, width in zip(numbers, self.widths[2:], strict=True)]
        return "  ".join(cells).rstrip()


@contextmanager
def progress_bar(total: Callable[[], int] | None) -> Iterator[Callable[[int], None]]:
    "A bar on standard error, where that is a terminal; `total` counts the images (None: nobody knows)."
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = [BarColumn(), MofNCompleteColumn(), "{task.fields[rate]:.0f} images/s", TimeRemainingColumn()]
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task("", total=None if total is None else total(), rate=0.0)

    def advance(done: int) -> None:
        bar.start()
        bar.update(task, completed=done, rate=bar.tasks[0].speed or 0.0)

    try:
        yield advance
    finally:
        bar.stop()


@contextmanager
def transfer_bar(total: int | None, done: int) -> Iterator[Callable[[int], None]]:
    "A bar of bytes on standard error, where that is a terminal; is told of each that came after the first `done`."
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = [BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def track(steps: Iterable[Step], what: str, total: int) -> Iterator[Step]:
    "The steps, with a bar where standard error is a terminal."
    from rich.console import Console
    from rich.progress import track

    hidden = not sys.stderr.isatty()
    yield from track(steps, what, total, transient=True, disable=hidden, console=Console(stderr=True))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _shorten(text: str, width: int) -> str:
    "Long text without its middle: folders and names are told apart by both ends."
    if len(text) <= width:
        return text
    tail = (width - 3) * 2 // 3
    return f"{text[: width - 3 - tail]}...{text[len(text) - tail :]}"
