"""fastai's losses and metrics, kept on the device until a part of an epoch ends, so that no batch waits for a GPU.

fastai copies them to the CPU after each batch: six times in a batch that validates. The values are fastai's, except for
a weighted validation loss (`EpochLoss`).
"""

import torch
from fastai.learner import AvgSmoothLoss
from fastai.metrics import ActivationType
from fastai.vision.all import AccumMetric, AvgLoss, AvgMetric, Metric, Recorder, find_bs

COLUMNS = {"roc_auc_score": "roc_auc"}
"""The columns of the history whose names are not those of fastai's metrics."""


class EpochAverage(AvgMetric):
    "Averages `func` over the images of an epoch."

    def accumulate(self, learn):
        size = find_bs(learn.yb)
        self.total += self.func(learn.pred, *learn.yb).detach() * size
        self.count += size


class EpochLoss(AvgLoss):
    """Averages the loss over the images of an epoch: sum(w l) / sum(w), whatever the batches are.

    fastai averages the losses of the batches by their number of images. With class weights that is another value: the
    weights cancel inside a batch of one class. A loss function without `total_weight` weighs all images equally.
    """

    def accumulate(self, learn):
        weight = getattr(learn.loss_func, "total_weight", len)(learn.yb[0])
        self.total += learn.loss.detach().mean() * weight
        self.count += weight


class SmoothLoss(AvgSmoothLoss):
    "Averages the losses of the last batches."

    def accumulate(self, learn):
        self.count += 1
        loss = learn.loss.detach().as_subclass(torch.Tensor).mean()  # fastai's tensors are slow
        self.val = torch.lerp(loss, self.val.to(loss.device), self.beta)


class EpochMetric(Metric):
    """Computes a metric of scikit-learn once an epoch, from the probabilities of all images, on the CPU.

    The probabilities are in fp64, which fastai's own metrics make fp32: there those of a network that is very sure are
    all 1, so that images tie.
    """

    def __init__(
        self,
        metric: AccumMetric,  # of probabilities: `RocAucBinary()`, or `RocAuc()`
    ):
        self.metric = metric

    def reset(self):
        self.preds, self.targs = [], []

    def accumulate(self, learn):
        self.preds.append(learn.pred.detach())
        self.targs.append(learn.y.detach())

    @property
    def value(self):
        if not self.preds:
            return None
        self.preds, self.targs = ([torch.cat(parts).cpu()] for parts in (self.preds, self.targs))
        probabilities = self.preds[0].double().softmax(1).numpy()  # (N, classes)
        if self.metric.activation == ActivationType.BinarySoftmax:
            probabilities = probabilities[:, -1]
        return self.metric.func(self.targs[0].numpy(), probabilities, **self.metric.kwargs)

    @property
    def name(self):
        return self.metric.name


class EpochRecorder(Recorder):
    """fastai's `Recorder` with these losses, and a history of all fits of the learner.

    `losses` are on the CPU when an epoch's training, or the fit, has ended. fastai's own `values` are those of the last
    fit, and `validate` deletes them.
    """

    name = "recorder"  # `learn.recorder`, as fastai's

    def __init__(self):
        super().__init__()
        self.loss, self.smooth_loss = EpochLoss(), SmoothLoss(self.smooth_loss.beta)
        self.history = []  # a row for each epoch that trained: phase, epoch, losses, metrics by name, lr

    def before_fit(self):
        super().before_fit()
        self.copied = 0  # the losses before this one are on the CPU
        self.has_trained = False  # whether this epoch trains; `validate` is an epoch without training

    def before_epoch(self):
        super().before_epoch()
        self.has_trained = False

    def after_train(self):
        super().after_train()
        self.has_trained = True
        self._copy()

    def after_epoch(self):
        super().after_epoch()
        if self.has_trained:
            self.history.append(self._row())

    def _row(self) -> dict:
        phase = "unfrozen" if next(self.model.parameters()).requires_grad else "frozen"
        epoch = sum(row["phase"] == phase for row in self.history) + 1
        row = {"phase": phase, "epoch": epoch}
        names = ["train_loss", "valid_loss", *self.metrics.attrgot("name").map(lambda name: COLUMNS.get(name, name))]
        for i, (name, value) in enumerate(zip(names, self.values[-1], strict=False)):  # a callback may skip validation
            row[f"{name}_{i - 1}" if name in row else name] = float(value)
        return row | {"lr": float(self.opt.hypers[-1]["lr"])}

    def after_fit(self):
        self._copy()  # where the fit was cancelled in an epoch

    def _copy(self):
        if losses := self.losses[self.copied :]:
            self.losses[self.copied :] = torch.stack(losses).cpu().unbind()
            self.copied, self.learn.smooth_loss = len(self.losses), self.losses[-1]
