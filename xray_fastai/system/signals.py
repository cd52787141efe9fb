"""End a command at SIGTERM, and when the reader of its output has closed the pipe."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator


class Terminated(KeyboardInterrupt):
    """Raised at SIGTERM, as `KeyboardInterrupt` is at Ctrl-C."""


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM, so that unfinished files are deleted. (Training stops after the batch instead.)"""

    def terminate(_number, _frame):
        raise Terminated

    previous = None
    with contextlib.suppress(ValueError):  # only the main thread can set a handler
        previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def output_is_closed(error: OSError) -> bool:
    """Return whether an error says that the reader of standard output has closed the pipe.

    Windows reports it as an invalid argument, which without a file's name comes from an open stream.
    """
    on_windows = sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or on_windows


def ignore_closed_output() -> int:
    """Discard further output after the reader has closed the pipe (`| head`), and return the exit code of SIGPIPE, 141.

    Python flushes standard output at its end. Without this it would raise `BrokenPipeError` again there.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
