"""Ctrl-C and SIGTERM in training: it stops after the batch."""

import contextlib
import os
import signal

from fastai.vision.all import Callback, CancelFitException


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
