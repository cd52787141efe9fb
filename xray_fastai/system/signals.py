"""End a command at SIGTERM, when its terminal is closed, and when the reader of its output has closed the pipe."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator

from xray_fastai.system.run_log import discard_closed_terminal

HANGUP = getattr(signal, "SIGHUP", None)
"""The signal of a terminal that was closed; Windows has none."""


class Terminated(KeyboardInterrupt):
    """Raised at SIGTERM and SIGHUP, as `KeyboardInterrupt` is at Ctrl-C."""

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__(signal.Signals(number).name)
        self.number = number


def ends_by_hangup() -> bool:
    """Return whether a closed terminal ends this process; not with nohup, which ignores the signal."""
    return HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM and SIGHUP, so that unfinished files are deleted.

    (Training stops after the batch instead.)
    """

    def terminate(number, _frame):
        if number == HANGUP:
            discard_closed_terminal()
        raise Terminated(number)

    previous = {}
    with contextlib.suppress(ValueError):  # only the main thread can set a handler
        for number in (signal.SIGTERM, HANGUP) if ends_by_hangup() else (signal.SIGTERM,):
            previous[number] = signal.signal(number, terminate)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
