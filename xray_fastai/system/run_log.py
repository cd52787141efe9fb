"""Writes what a command shows into a log file too, with times, and lets it go on when its terminal is closed."""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from xray_fastai.system.errors import UserError


class RunLog:
    """Appends lines to a file, each with the time. The file is closed after each line, so its folder can be renamed."""

    def __init__(self, path: Callable[[], Path]):
        self.path = path  # asked before each line
        self.error: OSError | None = None  # why lines are missing

    def add(self, text: str) -> None:
        """Append the lines of a text. If the file cannot be written, no further line is tried."""
        if self.error is not None:
            return
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        try:
            with self.path().open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{now}  {line}".rstrip() + "\n" for line in text.split("\n"))
        except OSError as error:
            self.error = error


class Shown:
    """Stands for standard output or error: shows a text there unless it is quiet, and logs its lines."""

    def __init__(self, stream: TextIO, log: RunLog | None, quiet: bool = False):
        self.stream, self.run_log, self.quiet = stream, log, quiet
        self._begun = ""  # a line without its end

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        if self.run_log is not None and lines:
            self.run_log.add("\n".join(line.rpartition("\r")[2] for line in lines))  # of a bar, its last state
        if not self.quiet:
            self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        if not self.quiet:
            self._try(self.stream.flush)

    def isatty(self) -> bool:
        return not self.quiet and self.stream.isatty()

    def _try(self, do: Callable[..., Any], *args: Any) -> None:
        try:
            do(*args)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            discard_closed_terminal()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def log_of(stream: TextIO) -> RunLog | None:
    """Return the log that a stream writes into; None if there is none."""
    return getattr(stream, "run_log", None)


def is_quiet(stream: TextIO) -> bool:
    """Return whether a stream shows nothing, neither texts nor bars."""
    return getattr(stream, "quiet", False)


def without_log(stream: TextIO) -> TextIO:
    """Return a stream to the same place that logs nothing: for bars, which draw the same line again and again."""
    return Shown(stream.stream, None, stream.quiet) if isinstance(stream, Shown) else stream  # type: ignore[return-value]


@contextlib.contextmanager
def logging_to(path: Callable[[], Path], quiet: bool = False) -> Iterator[RunLog]:
    """Log what this block shows, and the error that ends it.

    Args:
        path: returns the file, which may move in the block.
        quiet: show nothing on standard output, and no bars; standard error is shown.
    """
    log, before = RunLog(path), (sys.stdout, sys.stderr)
    sys.stdout = Shown(sys.stdout, log, quiet)  # type: ignore[assignment]
    sys.stderr = Shown(sys.stderr, log)  # type: ignore[assignment]
    try:
        yield log
    except UserError as error:
        log.add(f"Error: {error}")
        raise
    except KeyboardInterrupt as stop:
        log.add(f"Stopped: {str(stop) or type(stop).__name__}")
        raise
    except BaseException as error:
        log.add("".join(traceback.format_exception(error)).rstrip())
        raise
    finally:
        sys.stdout, sys.stderr = before
        if log.error is not None:
            print(f"WARNING: {log.path()}: lines are missing ({log.error.strerror})", file=sys.stderr)


def say_at_once(text: str) -> None:
    """Show a line on standard error from a signal's handler, where `print` could be in the midst of another line."""
    if (log := log_of(sys.stderr)) is not None:
        log.add(text.strip())
    try:
        os.write(2, text.encode())
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        discard_closed_terminal()


def discard_closed_terminal() -> None:
    """Discard what goes to standard output and error from now on, where they are a terminal that was closed.

    Linux answers every call on such a terminal with EIO, on other files this one with ENOTTY.
    """
    for number in (1, 2):
        try:
            os.tcgetpgrp(number)
        except OSError as error:
            if error.errno == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
