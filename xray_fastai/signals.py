"""Ctrl-C and SIGTERM in training: it stops after the batch."""

import contextlib
import os
import signal

from fastai.vision.all import Callback, CancelFitException

from xray_fastai import distributed

STOPPING = b"\nStopping after this batch, then exporting the best weights; Ctrl-C again gives up.\n"


class StopOnSignal(Callback):
    """Stop after the batch at Ctrl-C or SIGTERM; a second Ctrl-C stops at once. Used as a context around the fit.

    Loading processes are forked while it holds, so that a Ctrl-C, which reaches them too, doesn't break them.
    """

    signals = (signal.SIGINT, signal.SIGTERM)
    heard: int | None = None  # by this process
    received: int | None = None  # that the fit ends for; several processes agree on it in `due`

    def __enter__(self):
        self.before, self.process = {}, os.getpid()
        with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch
            for number in self.signals:
                self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, kind, *_):
        # torchrun and a cluster's scheduler may both send it, and torchrun also when another process has failed
        once = distributed.world_size() > 1 and (kind is not None or self.received is not None)
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if once else handler)

    def receive(self, number, _frame):
        if self.heard == number == signal.SIGINT:
            raise KeyboardInterrupt
        if distributed.world_size() == 1:
            if self.heard is None and os.getpid() == self.process:  # the loading processes hear it too
                os.write(2, STOPPING)
            self.received = number
        self.heard = number

    def due(self) -> bool:
        """Whether to stop here; of several processes all stop at the same place, whichever of them heard the signal."""
        if distributed.world_size() > 1 and self.received is None:
            self.received = distributed.any_of(self.heard)
            if self.received is not None and distributed.rank() == 0:
                os.write(2, STOPPING)
        return self.received is not None

    def after_batch(self):
        if self.due():
            raise CancelFitException
