"""Ends a fit: early stopping, a loss that is not finite, Ctrl-C, SIGTERM, SIGHUP. (`Trainer` records which it was.)"""

import contextlib
import os
import signal
from collections.abc import Sequence

import torch
from fastai.vision.all import Callback, CancelFitException, TrackerCallback

from xray_fastai.system import distributed
from xray_fastai.system.run_log import say_at_once
from xray_fastai.system.signals import HANGUP, ends_by_hangup


class EarlyStopping(TrackerCallback):
    """End the phase after `patience` epochs without a new lowest validation loss, lower by more than `min_delta`.

    Unlike fastai's `EarlyStoppingCallback`, it prints nothing and remembers whether it ended the phase.
    """

    order = TrackerCallback.order + 3

    def __init__(
        self,
        patience: int,  # epochs without a new lowest loss
        min_delta: float = 0.0,  # a loss counts as lower if it is lower by more than this
    ):
        super().__init__(min_delta=min_delta)
        self.patience, self.stopped = patience, False

    def before_fit(self):
        super().before_fit()
        self.wait = 0

    def after_epoch(self):
        super().after_epoch()
        self.wait = 0 if self.new_best else self.wait + 1
        if self.wait >= self.patience:
            self.stopped = True
            raise CancelFitException

    def least(self, losses: Sequence[float]) -> int:
        """Return after how many more epochs the phase can end, given its validation losses so far.

        >>> EarlyStopping(patience=3, min_delta=0.1).least([0.9, 0.5, 0.45])
        2
        """
        best, wait = losses[0], 0
        for loss in losses[1:]:
            best, wait = (loss, 0) if loss - self.min_delta < best else (best, wait + 1)
        return max(0, self.patience - wait)


class StopOnNonFiniteLoss(Callback):
    """End the fit when a training or validation loss is infinite or not a number.

    Reading a loss from a GPU waits until it has computed all that was started. So there, the losses are read together,
    after some batches and at the end of the part.
    """

    order = -9
    run_valid = True
    where: str | None = None

    def __init__(
        self,
        every: int = 32,  # batches between two looks at the losses on a GPU
    ):
        super().__init__()
        self.every, self.finite = every, []

    def before_train(self):
        self.finite = []  # whether each loss is finite: 0-dimensional, on the device

    def before_validate(self):
        self.finite = []

    def after_batch(self):
        self.finite.append(torch.isfinite(self.loss.detach()))
        if self.loss.device.type == "cpu" or len(self.finite) == self.every:
            self._check()

    def after_train(self):
        self._check()

    def after_validate(self):
        self._check()

    def _check(self):
        finite = torch.stack(self.finite).tolist() if self.finite else []
        self.finite = []
        if not all(finite):
            part = "training" if self.training else "validation"
            batch = self.iter + 1 - len(finite) + finite.index(False) + 1
            self.where = f"epoch {self.epoch + 1}, {part} batch {batch}"
            raise CancelFitException


STOPPING = "\nStopping after this batch, then exporting the best weights; press Ctrl-C again to stop at once.\n"
HUNG_UP = "\nThe terminal was closed (SIGHUP): stopping after this batch, then exporting the best weights.\n"


class StopOnSignal(Callback):
    """Stop after the batch at Ctrl-C, SIGTERM or SIGHUP, and at once at a second Ctrl-C; a context around the fit.

    Loading processes are forked inside the context and inherit its handlers. So a Ctrl-C, which the terminal sends to
    them too, does not end them.
    """

    noted: int | None = None  # the signal that this process received
    received: int | None = None  # the signal that ends the fit; several processes agree on it in `due`

    def __enter__(self):
        self.before, self.process = {}, os.getpid()
        with contextlib.suppress(ValueError):  # only the main thread can set handlers
            for number in (signal.SIGINT, signal.SIGTERM, *([HANGUP] if ends_by_hangup() else [])):
                self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, kind, *_):
        # torchrun and a cluster's scheduler may both send SIGTERM, and torchrun also when another process failed
        ignore = distributed.world_size() > 1 and (kind is not None or self.received is not None)
        for number, handler in self.before.items():
            # a shell passes on the SIGHUP that the system has sent already
            again = number == HANGUP == self.received
            signal.signal(number, signal.SIG_IGN if ignore or again else handler)

    def receive(self, number, _frame):
        if self.noted == number == signal.SIGINT:
            raise KeyboardInterrupt
        if distributed.world_size() == 1:
            if self.noted is None and os.getpid() == self.process:  # not in a loading process
                say_at_once(HUNG_UP if number == HANGUP else STOPPING)
            self.received = number
        self.noted = number

    def due(self) -> bool:
        """Return whether to stop now. Several processes agree: if one received a signal, all stop at the same batch."""
        if distributed.world_size() > 1 and self.received is None:
            self.received = distributed.any_of(self.noted)
            if self.received is not None and distributed.rank() == 0:
                say_at_once(HUNG_UP if self.received == HANGUP else STOPPING)
        return self.received is not None

    def after_batch(self):
        if self.due():
            raise CancelFitException
