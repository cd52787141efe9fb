"""Values of an epoch are fastai's, but for the validation loss, a weighted mean; no batch waits for the device."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import AvgSmoothLoss
from fastai.vision.all import (
    AvgLoss,
    AvgMetric,
    L,
    RocAuc,
    RocAucBinary,
    TensorCategory,
    TensorImageBW,
    accuracy,
    to_detach,
)

from xray_fastai.model.learner import CalibratedCrossEntropy
from xray_fastai.model.loaders import make_loaders
from xray_fastai.model.recorder import EpochAverage, EpochLoss, EpochMetric, EpochRecorder, SmoothLoss

PAIRS = [
    (lambda classes: EpochAverage(accuracy), lambda classes: AvgMetric(accuracy)),
    (lambda classes: EpochLoss(), lambda classes: AvgLoss()),
    (lambda classes: SmoothLoss(), lambda classes: AvgSmoothLoss()),
    (
        lambda classes: EpochMetric(RocAucBinary() if classes == 2 else RocAuc()),
        lambda classes: RocAucBinary() if classes == 2 else RocAuc(),
    ),
]


def batches(classes: int) -> list[SimpleNamespace]:
    """Return what a metric sees of a learner after each batch; the last batch is smaller."""
    torch.manual_seed(0)
    seen, loss_func = [], CalibratedCrossEntropy()
    for size in (8, 8, 5):
        targets = TensorCategory(torch.arange(size) % classes)
        pred = torch.randn(size, classes, requires_grad=True)
        loss = torch.nn.functional.cross_entropy(pred, targets.as_subclass(torch.Tensor))
        parts = {"pred": pred, "y": targets, "yb": (targets,), "loss": loss}
        seen.append(SimpleNamespace(**parts, loss_func=loss_func, to_detach=to_detach))
    return seen


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("ours", "fastais"), PAIRS, ids=["average", "loss", "smooth loss", "area"])
def test_values_are_fastais(ours, fastais, classes):
    ours, fastais = ours(classes), fastais(classes)
    for _ in range(2):  # epochs
        for metric in (ours, fastais):
            metric.reset()
            for learn in batches(classes):
                metric.accumulate(learn)
        assert float(ours.value) == float(fastais.value)


def test_a_network_that_is_very_sure_still_ranks():
    """In fp32 all of these probabilities are 1."""
    metric, targets = EpochMetric(RocAucBinary()), torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[0.0, 20.0], [0.0, 22.0], [0.0, 24.0], [0.0, 26.0]])
    assert len(logits.softmax(1)[:, 1].unique()) == 1
    metric.reset()
    metric.accumulate(SimpleNamespace(pred=logits, y=targets))
    assert metric.value == 1 and metric.value == 1


def loss_in_batches(size: int, loss_func, logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the validation loss of logits (N, classes) and targets (N,) that come in batches of a size."""
    metric = EpochLoss()
    metric.reset()
    for pred, y in zip(logits.split(size), targets.split(size), strict=True):
        y = TensorCategory(y)
        metric.accumulate(SimpleNamespace(loss=loss_func(pred, y), yb=(y,), loss_func=loss_func))
    return float(metric.value)


@pytest.mark.parametrize("weight", [None, [3.0, 1.0], [0.2, 5.0]])
def test_the_validation_loss_is_the_weighted_mean_whatever_the_batches_are(weight):
    """The images are sorted by class, as in a validation table: whole batches are of one class."""
    torch.manual_seed(0)
    logits, targets = 2 * torch.randn(101, 2), (torch.arange(101) >= 37).long()
    weight = None if weight is None else torch.tensor(weight)
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    weights = torch.ones(101) if weight is None else weight[targets]
    expected = float((weights * each).sum() / weights.sum())
    loss_func = CalibratedCrossEntropy(weight=weight)
    for size in (1, 7, 16, 80, 101):
        assert loss_in_batches(size, loss_func, logits, targets) == pytest.approx(expected, rel=1e-5)


def test_a_loss_function_of_the_users_own_weighs_all_images_equally():
    logits, targets = torch.randn(9, 2), torch.arange(9) % 2
    mean = float(torch.nn.functional.cross_entropy(logits, targets))
    assert loss_in_batches(4, torch.nn.functional.cross_entropy, logits, targets) == pytest.approx(mean, rel=1e-5)


def test_columns_have_fastais_names():
    assert [ours(2).name for ours, _ in PAIRS[::3]] == [fastais(2).name for _, fastais in PAIRS[::3]]


@pytest.mark.parametrize("ours", [pair[0] for pair in PAIRS], ids=["average", "loss", "smooth loss", "area"])
def test_no_batch_is_read_from_the_device(ours):
    """Tensors on `meta` have no values: what reads one, or copies it to the CPU, raises."""
    metric = ours(2)
    metric.reset()
    for learn in batches(2):
        meta = {name: getattr(learn, name).detach().to("meta") for name in ("pred", "y", "loss")}
        rest = {"yb": (meta["y"],), "loss_func": learn.loss_func, "to_detach": to_detach}
        metric.accumulate(SimpleNamespace(**meta, **rest))


def recorder_of(device: str) -> EpochRecorder:
    """Return a recorder that has seen three training batches whose losses are on a device."""
    recorder = EpochRecorder()
    learn = recorder.learn = SimpleNamespace(metrics=L(), training=True, opt=SimpleNamespace(hypers=[{"lr": 1.0}]))
    for event in (recorder.before_fit, recorder.before_epoch, recorder.before_train):
        event()
    for batch in batches(2):
        learn.loss, learn.yb = batch.loss.detach().to(device), batch.yb
        recorder.after_batch()
    return recorder


def test_the_recorder_reads_no_batch_from_the_device():
    recorder = recorder_of("meta")
    assert {loss.device.type for loss in (*recorder.losses, recorder.learn.smooth_loss)} == {"meta"}


@pytest.mark.parametrize("end", ["after_train", "after_fit"])
def test_the_losses_are_copied_when_training_ends_and_when_a_fit_is_cancelled(end, monkeypatch):
    copied = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copied.append(tensor) or tensor + 1)
    recorder = recorder_of("cpu")
    losses = [*recorder.losses]
    for event in (getattr(recorder, end), recorder.after_fit):
        event()
    assert len(copied) == 1 and recorder.losses == [loss + 1 for loss in losses]
    assert recorder.learn.smooth_loss == losses[-1] + 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("augment", ["strong", "light"])
def test_no_augmented_batch_is_read_from_the_device(augment, training):
    blank = np.zeros((2, 32, 32), np.uint8)
    table = pd.DataFrame({"path": list(blank), "label": ["A", "B"], "is_valid": [False, True]})
    loaders = make_loaders(table, ["A", "B"], 32, 1, torch.device("cpu"), 0, augment=augment, contrast="equalize")
    loader = loaders.to(torch.device("meta"))[0 if training else 1]
    loader.before_iter()
    images = TensorImageBW(torch.empty(3, 1, 32, 32, dtype=torch.uint8, device="meta"))
    assert loader.after_batch((images, TensorCategory(torch.empty(3))))[0].shape == (3, 3, 32, 32)
