"""What a fit adds to fastai's training loop, one purpose a callback."""

import contextlib
import io
import math
import os
import signal
import sys
import time
from collections.abc import Sequence

import torch
from fastai.vision.all import (
    Callback,
    CancelFitException,
    EarlyStoppingCallback,
    MixedPrecision,
    TrackerCallback,
    TrainEvalCallback,
    to_detach,
    to_float,
)
from torch.nn.functional import cross_entropy

from xray_fastai.export.schema import HISTORY_COLUMNS
from xray_fastai.system import distributed


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, which further training leaves alone."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def standard_error(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None) -> float:
    """Of the mean cross-entropy: sqrt(sum((w (l - mean))**2)) / sum(w) for losses l and weights w of the images.

    Args:
        logits: (N, classes).
        targets: (N,), indices of classes.
        weight: (classes,), as in the cross-entropy; None weighs all alike.
    """
    losses = cross_entropy(logits, targets, reduction="none")  # (N,)
    weights = torch.ones_like(losses) if weight is None else weight[targets]
    mean = (weights * losses).sum() / weights.sum()
    return float((weights * (losses - mean)).norm() / weights.sum())


class Autocast(Callback):
    "Run the forward pass and the loss in bfloat16 off CUDA, where fastai's `MixedPrecision` does nothing."

    order = MixedPrecision.order

    def __init__(
        self,
        device_type: str,  # as torch.autocast names it: "cpu" or "mps"
    ):
        self.device_type = device_type

    def before_batch(self):
        self.context = torch.autocast(self.device_type, torch.bfloat16)
        self.context.__enter__()

    def after_pred(self):
        self.learn.pred = to_float(self.pred)

    def after_loss(self):
        self.context.__exit__(None, None, None)
        self.context = None


def precision_callbacks(precision: str, device: torch.device) -> Sequence[Callback]:
    """What makes fastai's loop compute in a precision."""
    if precision == "fp32":
        return []
    return [MixedPrecision(amp_mode=precision) if device.type == "cuda" else Autocast(device.type)]


class FrozenBody(Callback):
    "Keep a frozen backbone in evaluation mode: batch norm's running statistics stay, stochastic depth is off."

    run_after = TrainEvalCallback

    def before_train(self):
        self.model[0].eval()


class Schedule(TrackerCallback):
    """Warm up, stay at the peak, cut the rate when the monitored value stands still, and come down in the last epochs.

    A one-cycle schedule stretched over the longest fit allowed is still near its peak when early stopping ends the fit.
    Here the rate comes down whichever comes first: by cuts while the validation loss stands still (as fastai's
    `ReduceLROnPlateau`), or along a cosine over the last epochs (as `fit_flat_cos`).
    """

    order = TrackerCallback.order + 2

    def __init__(
        self,
        patience: int,  # epochs without a new best before a cut
        factor: float = 5.0,  # what a cut divides the rate by
        warmup: float = 1.0,  # epochs of linear rise to the peak
        cooldown: float = 0.4,  # the share of the epochs, at the end, over which the rate falls to nothing
    ):
        super().__init__()
        self.patience, self.factor, self.warmup, self.cooldown = patience, factor, warmup, cooldown

    def before_fit(self):
        super().before_fit()
        self.peaks = [hyper["lr"] for hyper in self.opt.hypers]
        self.wait, self.cut = 0, 1.0

    def before_batch(self):
        if self.training:
            scale = self.scale(self.train_iter / self.n_iter, 1 / self.n_iter)
            for hyper, peak in zip(self.opt.hypers, self.peaks, strict=True):
                hyper["lr"] = peak * scale

    def scale(self, epochs: float, step: float) -> float:
        "Share of the peak rate after `epochs`, a step being `step` epochs long."
        scale = self.cut * min(1.0, (epochs + step) / self.warmup)
        start = max(self.warmup, (1 - self.cooldown) * self.n_epoch)
        if epochs > start:
            scale *= 0.5 * (1 + math.cos(math.pi * (epochs - start) / (self.n_epoch - start)))
        return scale

    def after_epoch(self):
        super().after_epoch()
        self.wait = 0 if self.new_best else self.wait + 1
        if self.wait >= self.patience:
            self.wait, self.cut = 0, self.cut / self.factor


class BestWeights(TrackerCallback):
    """Keep the weights of the best epoch of all phases, and its validation outputs; put them back at the end.

    The best is the epoch with the lowest validation loss or, where the learning rate comes down, the last one whose
    loss is within a standard error of the lowest (as in Breiman et al., Classification and Regression Trees, 1984,
    3.4.3). Random validation images can't tell such epochs apart, and the later come of lower rates: on images unlike
    those trained on that was better in one fit of four (ROC AUC 0.913 for 0.892), and the same in three.

    fastai's `SaveModelCallback` writes over its file in place; here they are in memory, and in checkpoints.
    """

    order = TrackerCallback.order + 1

    def __init__(
        self,
        history: list[dict],  # as `EpochLog` fills it
        later: bool = False,  # whether a later epoch within a standard error is better
    ):
        super().__init__(reset_on_fit=False)
        self.history, self.later = history, later
        self.margin = 0.0  # above the lowest loss, within which a later epoch is better
        self.kept = False  # whether the weights are those of the epoch that just ended
        self.row: dict | None = None  # the best epoch's row of the history
        self.logits: torch.Tensor | None = None  # (validation images, classes)
        self.targets: torch.Tensor | None = None  # (validation images,)

    def before_validate(self):
        self.outputs = []

    def after_batch(self):
        if not self.training:
            self.outputs.append((to_detach(self.pred, gather=False), to_detach(self.yb[0], gather=False)))

    def after_epoch(self):
        super().after_epoch()
        self.kept = self.new_best or bool(self.recorder.values[-1][self.idx] <= self.best + self.margin)
        if self.kept:
            self.row = self.history[-1]
            self.logits, self.targets = (torch.cat(parts) for parts in zip(*self.outputs, strict=True))
            self.state = copied(self.model.state_dict())
        if self.new_best and self.later:
            self.margin = standard_error(self.logits.float(), self.targets, self.loss_func.func.weight)

    def after_fit(self):
        super().after_fit()
        self.restore(self.model)

    def restore(self, model: torch.nn.Module):
        "Put the best weights into the model, where an epoch was completed."
        if self.row is not None:
            model.load_state_dict(self.state)


class EarlyStopping(EarlyStoppingCallback):
    "fastai's, without its line on standard output, which counts epochs from 0."

    stopped = False

    def after_epoch(self):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                super().after_epoch()
        except CancelFitException:
            self.stopped = True
            raise


class StopOnNonFiniteLoss(Callback):
    "End the fit at a loss, in training or validation, that is infinite or not a number."

    order = -9
    run_valid = True
    where: str | None = None

    def after_batch(self):
        if not torch.isfinite(self.loss):
            part = "training" if self.training else "validation"
            self.where = f"epoch {self.epoch + 1}, {part} batch {self.iter + 1}"
            raise CancelFitException


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


class EpochLog(Callback):
    "Keep the history; show one row an epoch, and a progress bar where standard output is a terminal."

    order = TrackerCallback.order - 1

    def __init__(
        self,
        history: list[dict],  # receives a row an epoch, with the keys `HISTORY_COLUMNS`
        phase: str,  # "frozen" or "unfrozen"
    ):
        self.history, self.phase, self.bar = history, phase, None

    def before_fit(self):
        print(f"\n{'phase':<9}{'epoch':>9}{'train loss':>12}{'valid loss':>12}{'accuracy':>10}{'AUC':>8}{'time':>8}")
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, transient=True)
            self.task = self.bar.add_task("")
            self.bar.start()

    def before_epoch(self):
        self.start = time.perf_counter()

    def _start_bar(self, part: str):
        if self.bar is not None:
            self.bar.reset(self.task, total=len(self.dl), description=f"epoch {self.epoch + 1} {part}")

    def before_train(self):
        self._start_bar("training")

    def before_validate(self):
        self._start_bar("validation")

    def after_batch(self):
        if self.bar is not None:
            self.bar.advance(self.task)

    def after_epoch(self):
        values = [float(value) for value in self.recorder.values[-1]]
        row = [self.phase, self.epoch + 1, *values, self.opt.hypers[-1]["lr"]]
        self.history.append(dict(zip(HISTORY_COLUMNS, row, strict=True)))
        seconds = round(time.perf_counter() - self.start)
        epoch = f"{self.epoch + 1}/{self.n_epoch}"
        text = f"{self.phase:<9}{epoch:>9}{values[0]:>12.4f}{values[1]:>12.4f}{values[2]:>10.3f}{values[3]:>8.3f}"
        text += f"{seconds // 60:>5}:{seconds % 60:02}"
        (self.bar.console.print if self.bar else print)(text, **({"highlight": False} if self.bar else {"flush": True}))

    def close(self):
        "Take the bar off the terminal, however the fit ended."
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
