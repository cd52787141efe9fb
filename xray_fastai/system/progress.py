"""Show progress bars on standard error."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Step = TypeVar("Step")


@contextmanager
def progress_bar(total: Callable[[], int] | None) -> Iterator[Callable[[int], None]]:
    """Show a bar of images if standard error is a terminal.

    Args:
        total: returns the number of images; None if it is unknown. It is called for a terminal only.

    Yields:
        A function that takes the number of images done so far.
    """
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
    """Show a bar of bytes if standard error is a terminal.

    Args:
        total: the size in bytes, or None if it is unknown.
        done: the bytes that an earlier transfer brought.

    Yields:
        A function that takes the number of new bytes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = [BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def track(steps: Iterable[Step], what: str, total: int) -> Iterator[Step]:
    """Iterate over `steps`, with a bar if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield from steps
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(steps, what, total, transient=True, console=Console(stderr=True))
