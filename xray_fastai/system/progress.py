"""Show progress bars: on a terminal, or in a notebook with the bars that fastai shows there (fastprogress).

Elsewhere, and in a quiet command, nothing is shown. Libraries of bars are imported where one is shown. A log of the
command (`run_log`) gets the lines that are printed, and no bars.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from xray_fastai.system.run_log import Shown, is_quiet, log_of, without_log

Step = TypeVar("Step")


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, whose pages show HTML and no terminal's codes."""
    ipython = sys.modules.get("IPython")  # loaded by every kernel
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def on_terminal(stream: TextIO) -> bool:
    """Return whether a stream goes to a terminal; not if a cell of a notebook runs this process (`!xray-fastai ...`).

    IPython starts it on a pseudo-terminal, but shows what it writes on the page. Its kernel's children have the
    variable `JPY_PARENT_PID` (`jupyter_client.launcher`).
    """
    return stream.isatty() and "JPY_PARENT_PID" not in os.environ


class TerminalBar:
    """Shows the batches of the current part of an epoch below the printed rows."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        before = sys.stdout, sys.stderr
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, transient=True, console=Console(file=without_log(sys.stdout)))
        self._task = self._bar.add_task("")
        self._bar.start()
        # rich puts streams there that print above the bar, and log nothing; at its end it puts back those from before
        if sys.stdout is not before[0]:
            sys.stdout = Shown(sys.stdout, log_of(before[0]))  # type: ignore[assignment]
        if sys.stderr is not before[1]:
            sys.stderr = Shown(sys.stderr, log_of(before[1]))  # type: ignore[assignment]

    def begin(self, epoch: int, part: str, batches: int) -> None:
        """Begin a part, "training" or "validation", of an epoch, which is counted from 0."""
        self._bar.reset(self._task, total=batches, description=f"epoch {epoch + 1} {part}")

    def advance(self) -> None:
        """Count a batch."""
        self._bar.advance(self._task)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.stop()


class NotebookBar:
    """Shows the epochs and the batches as fastai's learners do, in one place of the page."""

    def __init__(self, epochs: int) -> None:
        from fastprogress.fastprogress import NBMasterBar

        self._epochs = NBMasterBar(range(epochs))

    def begin(self, epoch: int, part: str, batches: int) -> None:
        """See `TerminalBar.begin`."""
        self._epochs.update(epoch)
        self._batches = self._epochs.pcls(range(batches), parent=self._epochs, comment=part)
        self._done = 0
        self._batches.update(0)

    def advance(self) -> None:
        """Count a batch."""
        self._done += 1
        self._batches.update(self._done)

    def close(self) -> None:
        """Remove the bars."""
        self._epochs.on_iter_end()


def epoch_bar(epochs: int) -> TerminalBar | NotebookBar | None:
    """Return a bar for the batches of a fit, or None if standard output is neither a terminal nor a notebook."""
    if is_quiet(sys.stdout):
        return None
    if in_notebook():
        return NotebookBar(epochs)
    return TerminalBar() if on_terminal(sys.stdout) else None


@contextmanager
def progress_bar(total: Callable[[], int] | None) -> Iterator[Callable[[int], None]]:
    """Show a bar of images if standard error is a terminal.

    Args:
        total: returns the number of images; None if it is unknown. It is called for a terminal only.

    Yields:
        A function that takes the number of images done so far.
    """
    if not on_terminal(sys.stderr):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = [BarColumn(), MofNCompleteColumn(), "{task.fields[rate]:.0f} images/s", TimeRemainingColumn()]
    console = Console(file=without_log(sys.stderr))
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
    hidden = not on_terminal(sys.stderr)
    console = Console(file=without_log(sys.stderr))
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def track(steps: Iterable[Step], what: str, total: int) -> Iterator[Step]:
    """Iterate over `steps`, with a bar if standard error is a terminal, or on the page of a notebook."""
    if is_quiet(sys.stdout):
        yield from steps
        return
    if in_notebook():
        from fastprogress.fastprogress import NBProgressBar

        yield from NBProgressBar(steps, total, comment=what, leave=False)
        return
    if not on_terminal(sys.stderr):
        yield from steps
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(steps, what, total, transient=True, console=Console(file=without_log(sys.stderr)))
