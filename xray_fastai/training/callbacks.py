"""The callbacks that a fit adds to fastai's training loop; each has one purpose."""

import math
from collections.abc import Sequence

import torch
from fastai.vision.all import (
    Callback,
    MixedPrecision,
    TrackerCallback,
    TrainEvalCallback,
    to_float,
)
from torch import nn
from torch.nn.functional import cross_entropy

BACKBONE = "0."
"""The names of the backbone's tensors begin with this; it does not change in the frozen phase."""
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
"""Batch norm of torchvision's networks and timm's, some of which (LeViT) have it behind linear layers."""
OWN_METRICS = ("accuracy", "roc_auc")
"""The metrics of every fit, by their columns of the history; the user's come after them."""


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies on the CPU, which further training does not change."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def standard_error(logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor | None) -> float:
    """Return the standard error of the mean cross-entropy of images with losses l and weights w.

    It is sqrt(sum((w (l - mean))**2)) / sum(w).

    Args:
        logits: (N, classes).
        targets: (N,), indices of classes.
        weight: (classes,), as in the cross-entropy; None gives all classes the same weight.
    """
    losses = cross_entropy(logits, targets, reduction="none")  # (N,)
    weights = torch.ones_like(losses) if weight is None else weight.to(targets.device)[targets]
    mean = (weights * losses).sum() / weights.sum()
    return float((weights * (losses - mean)).norm() / weights.sum())


class Autocast(Callback):
    "Run the forward pass and the loss in bfloat16 on a CPU or MPS, where fastai's `MixedPrecision` does nothing."

    order = MixedPrecision.order

    def __init__(
        self,
        device_type: str,  # "cpu" or "mps", for torch.autocast
    ):
        self.device_type, self.context = device_type, None

    def before_batch(self):
        self.context = torch.autocast(self.device_type, torch.bfloat16)
        self.context.__enter__()

    def after_pred(self):
        self.learn.pred = to_float(self.pred)

    def after_loss(self):
        self.close()

    def close(self):
        """Leave autocast, if an error ended a batch inside it.

        Else it stays on, and torch keeps its copies of the weights in half precision: all later batches of this process
        would compute with the weights of that moment.
        """
        if self.context is not None:
            self.context.__exit__(None, None, None)
            self.context = None


class CudaAutocast(MixedPrecision):
    "fastai's `MixedPrecision`, which can leave autocast after an error, as `Autocast` does."

    name = "mixed_precision"  # `learn.mixed_precision`, which fastai's callbacks look for
    context = None  # entered in a batch

    def before_batch(self):
        super().before_batch()
        self.context = self.autocast

    def after_loss(self):
        self.close()

    close = Autocast.close


def precision_callbacks(precision: str, device: torch.device) -> Sequence[Autocast | CudaAutocast]:
    """Return the callback that makes fastai's loop compute in a precision; none for float32.

    Whoever runs the loop calls its `close` at the end, also after an error.
    """
    if precision == "fp32":
        return []
    return [CudaAutocast(amp_mode=precision) if device.type == "cuda" else Autocast(device.type)]


class FrozenBody(Callback):
    "Keep a frozen backbone in evaluation mode: the statistics of batch norm stay fixed, stochastic depth is off."

    run_after = TrainEvalCallback

    def before_train(self):
        self.model[0].eval()


class FixedStatistics(Callback):
    """Keep the statistics of batch norm that pretrained weights were trained with; its weights and biases train.

    Statistics that follow the new images change what the layers behind them get, and a short phase does not make up for
    it. With EfficientNet-Lite0, ImageNet's weights and 797 images, the ROC AUC on images unlike those (the mean of
    three groups) after six epochs was 0.860 with fixed statistics and 0.851 with moving ones (batches of 16, 80 px),
    and 0.782 and 0.714 (batches of 80, 64 px). See tests/benchmarks/README.md, Transfer.
    """

    run_after = TrainEvalCallback

    def before_train(self):
        for layer in self.model.modules():
            if isinstance(layer, BATCH_NORM):
                layer.eval()


class Schedule(TrackerCallback):
    """Warm up to the peak rate, cut it when the validation loss stops improving, and let it fall in the last epochs.

    A one-cycle schedule over the maximum number of epochs is still near its peak when early stopping ends the fit.
    Here the rate falls in two ways: it is cut when the validation loss stops improving (as in fastai's
    `ReduceLROnPlateau`), and it follows a cosine over the last epochs (as in `fit_flat_cos`).
    """

    order = TrackerCallback.order + 2
    epochs: int | None = None  # planned by a time limit; None is all of the phase

    def __init__(
        self,
        patience: int,  # epochs without a new lowest loss before a cut
        factor: float = 5.0,  # a cut divides the rate by this
        warmup: float = 1.0,  # epochs in which the rate rises linearly to the peak
        cooldown: float = 0.4,  # the last part of the epochs, in which the rate falls to zero
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
        "Return the rate after `epochs`, as a fraction of the peak; one step is `step` epochs long."
        scale = self.cut * min(1.0, (epochs + step) / self.warmup)
        end = self.epochs or self.n_epoch
        start = self.falls_from(end)
        if epochs > start:
            scale *= 0.5 * (1 + math.cos(math.pi * (epochs - start) / (end - start)))
        return scale

    def falls_from(self, end: int) -> float:
        "Return after how many epochs the rate begins to fall, if the phase has `end` epochs."
        return max(self.warmup, (1 - self.cooldown) * end)

    def after_epoch(self):
        super().after_epoch()
        self.wait = 0 if self.new_best else self.wait + 1
        if self.wait >= self.patience:
            self.wait, self.cut = 0, self.cut / self.factor


class BestWeights(TrackerCallback):
    """Keep the weights and validation outputs of the best epoch of all phases, and restore the weights at the end.

    The best epoch has the lowest validation loss or, if `later`, is the last whose loss is within a standard error of
    the lowest (as in Breiman et al., Classification and Regression Trees, 1984, 3.4.3). Random validation images cannot
    tell such epochs apart, and the later epochs had lower learning rates. On images unlike the training images, the
    later epoch was better in one fit of four (ROC AUC 0.913 instead of 0.892), and equal in three.

    fastai's `SaveModelCallback` overwrites its file in place. This one keeps the weights in memory and in checkpoints.
    """

    order = TrackerCallback.order + 1

    def __init__(
        self,
        history: list[dict],  # filled by `EpochLog`
        later: bool = False,  # whether to prefer a later epoch within a standard error
    ):
        super().__init__(reset_on_fit=False)
        self.history, self.later = history, later
        self.margin = 0.0  # added to the lowest loss: up to this sum, a later epoch is better
        self.is_best = False  # whether the epoch that just ended is the best so far
        self.row: dict | None = None  # the best epoch's row of the history
        self.logits: torch.Tensor | None = None  # (validation images, classes)
        self.targets: torch.Tensor | None = None  # (validation images,)

    def before_validate(self):
        self.outputs = []  # on the device: a copy to the CPU would wait for it

    def after_batch(self):
        if not self.training:
            self.outputs.append((self.pred.detach(), self.yb[0].detach()))

    def after_epoch(self):
        super().after_epoch()
        self.is_best = self.new_best or bool(self.recorder.values[-1][self.idx] <= self.best + self.margin)
        if self.is_best:
            before, self.row = self.row, self.history[-1]
            self.logits, self.targets = (torch.cat(parts).cpu() for parts in zip(*self.outputs, strict=True))
            state = self.model.state_dict()
            if before is not None and before["phase"] == self.row["phase"] == "frozen":  # the backbone has not changed
                self.state = self.state | copied({k: t for k, t in state.items() if not k.startswith(BACKBONE)})
            else:
                self.state = copied(state)
        if self.new_best and self.later:
            self.margin = standard_error(self.logits.float(), self.targets, self.loss_func.func.weight)

    def after_fit(self):
        super().after_fit()
        self.restore(self.model)

    def restore(self, model: torch.nn.Module):
        "Load the best weights into the model, if an epoch was completed."
        if self.row is not None:
            model.load_state_dict(self.state)
