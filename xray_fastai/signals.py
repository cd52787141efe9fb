"""Ctrl-C and SIGTERM: before training they stop at once and leave nothing; in training, after the batch."""

import contextlib
import os
import signal
from collections.abc import Iterator

from fastai.vision.all import Callback, CancelFitException


class Terminated(KeyboardInterrupt):
    """SIGTERM, where Ctrl-C would raise a `KeyboardInterrupt`."""


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Have SIGTERM raise `Terminated`, so that what is half done is cleaned up."""

    def terminate(_number, _frame):
        raise Terminated

    before = None
    with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch
        before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class StopOnSignal(Callback):
    """Stop after the batch at Ctrl-C or SIGTERM; a second Ctrl-C stops at once. Used as a context around the fit.

    Loading processes are forked while it holds, so that a Ctrl-C, which reaches them too, doesn't break them.
    """

    signals = (signal.SIGINT, signal.SIGTERM)
    received: int | None = None

    def __enter__(self):
        self.before, self.process = {}, os.getpid()
        with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch
            for number in self.signals:
                self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, _frame):
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None and os.getpid() == self.process:  # the loading processes hear it too
            os.write(2, b"\nStopping after this batch, then exporting the best weights; Ctrl-C again gives up.\n")
        self.received = number

    def after_batch(self):
        if self.received is not None:
            raise CancelFitException
