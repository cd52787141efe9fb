"""A user's fastai callbacks in `fit`, the learning rates that they see, and the fit's own callbacks."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from fastai.vision.all import Callback, CancelFitException
from torch import nn

from tests.conftest import settings_of
from tests.small_network import NAME as SMALL
from xray_fastai import fit
from xray_fastai.training.callbacks import Autocast, CudaAutocast, FixedStatistics, Schedule, precision_callbacks
from xray_fastai.training.frozen_features import NextView
from xray_fastai.training.stopping import EarlyStopping, StopOnNonFiniteLoss

LR = 6e-3


@pytest.fixture
def settings(collection, tmp_path):
    """Settings of a quick fit with pretrained weights, which are random ones."""
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(SMALL).state_dict(), tmp_path / "weights.pth")
    return {
        "data": str(collection), "weights": str(tmp_path / "weights.pth"), "arch": SMALL, "size": 32, "lr": LR,
        "batch_size": 8, "workers": 0, "device": "cpu", "freeze_epochs": 2, "epochs": 2,
    }  # fmt: skip


class Spy(Callback):
    "Records the rates that each phase starts with, and the batches of each epoch."

    def __init__(self):
        self.rates, self.batches = [], []

    def before_fit(self):
        self.rates.append([hyper["lr"] for hyper in self.opt.hypers])

    def before_epoch(self):
        self.batches.append(0)

    def after_batch(self):
        self.batches[-1] += self.training


@pytest.mark.slow
def test_a_callback_sees_both_phases_and_changes_nothing(settings):
    """Earlier layers train at lower rates in the unfrozen phase, as in fastai's `fine_tune`."""
    spy = Spy()
    with_callback, without = fit(**settings, name="spied", callbacks=[spy]), fit(**settings, name="plain")
    assert with_callback.history == without.history
    assert [row["phase"] for row in with_callback.history] == ["frozen"] * 2 + ["unfrozen"] * 2
    assert spy.batches == [4] * 4  # of 36 images, the last 4 make no whole batch
    assert [row["lr"] for row in without.history if row["epoch"] == 1] == [0.006, 0.003]  # no 0.0030000000000000005
    frozen, unfrozen = spy.rates
    assert frozen[-1] == pytest.approx(LR)
    assert unfrozen == pytest.approx([LR / 200, LR / 20, LR / 2])


class Norms(Callback):
    "Keeps the statistics and the weights of batch norm, of the start of each phase and of its last epoch."

    def before_fit(self):
        self.first = self.now()

    def after_train(self):
        self.last = self.now()

    def now(self):
        layers = [layer for layer in self.model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
        names = ("running_mean", "running_var", "weight")
        return {name: torch.cat([getattr(layer, name).detach().clone() for layer in layers]) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed, move",
    [({}, False), ({"weights": "none"}, True), ({"recipe": "plain"}, True)],
    ids=["pretrained", "from scratch", "as the earlier work"],
)
def test_statistics_of_pretrained_batch_norm_stay(settings, changed, move):
    norms = Norms()
    fit(**settings | {"freeze_epochs": 0} | changed, callbacks=[norms])
    assert not torch.equal(norms.first["weight"], norms.last["weight"])
    for name in ("running_mean", "running_var"):
        assert torch.equal(norms.first[name], norms.last[name]) != move


class Interfere(Spy):
    "Runs out of memory in the first batch of the fit, and cancels the second epoch of the unfrozen phase."

    def after_pred(self):
        if len(self.rates) == 1 and self.training:
            raise torch.OutOfMemoryError("no memory, for a test")
        if len(self.rates) == 3 and len(self.batches) == 5:  # one epoch, then two, then the second
            raise CancelFitException


@pytest.mark.slow
def test_every_kind_of_batch_norm_keeps_its_statistics():
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
    model = nn.ModuleList([*(kind(4) for kind in kinds), nn.Dropout()]).train()
    fixed = FixedStatistics()
    fixed.learn = SimpleNamespace(model=model)
    fixed.before_train()
    assert [layer.training for layer in model] == [False, False, False, True]


def test_a_callback_stays_after_out_of_memory_and_can_end_a_phase(settings, capsys):
    spy = Interfere()
    result = fit(**settings, name="cancelled", schedule="constant", callbacks=[spy])
    assert "batches of 4 instead of 8 images" in capsys.readouterr().out
    assert spy.batches == [0, 9, 9, 9, 0]
    assert [(row["phase"], row["epoch"]) for row in result.history] == [("frozen", 1), ("frozen", 2), ("unfrozen", 1)]
    assert result.status == "complete"
    ends = [phase["end"] for phase in settings_of(Path("exports/cancelled"))["training"]["phases"]]
    assert ends == ["reaching its last epoch", "a callback"]
    assert spy.rates[-1] == pytest.approx([LR] * 3)  # a constant rate is the same for all layers


class EndAtOnce(Callback):
    """Ends the frozen phase before its first epoch."""

    def before_train(self):
        if not any(p.requires_grad for p in self.model[0].parameters()):
            raise CancelFitException


@pytest.mark.slow
def test_a_callback_can_end_a_phase_before_its_first_epoch(settings):
    result = fit(**settings, name="at-once", frozen_views=0, callbacks=[EndAtOnce()])
    assert [row["phase"] for row in result.history] == ["unfrozen", "unfrozen"]
    phases = settings_of(Path("exports/at-once"))["training"]["phases"]
    assert [(phase["best_epoch"] is None, phase["end"]) for phase in phases] == [
        (True, "a callback"),
        (False, "reaching its last epoch"),
    ]


@pytest.mark.parametrize(("epochs", "expected"), [(0, 0.25), (0.5, 0.75), (1, 1), (6, 1), (8, 0.5), (10, 0)])
def test_the_rate_warms_up_stays_and_falls_along_a_cosine(epochs, expected):
    schedule = Schedule(patience=2)
    schedule.learn, schedule.cut = SimpleNamespace(n_epoch=10), 1.0
    assert schedule.scale(epochs, 0.25) == pytest.approx(expected)
    schedule.cut = 0.2
    assert schedule.scale(epochs, 0.25) == pytest.approx(0.2 * expected)


def track(callback, losses):
    """Run `after_epoch` for each validation loss; return how many epochs it took part in."""
    callback.learn = SimpleNamespace(recorder=SimpleNamespace(values=[]))
    callback.idx, callback.best, callback.wait = 0, np.inf, 0
    for epoch, loss in enumerate(losses, start=1):
        callback.recorder.values.append([loss])
        try:
            callback.after_epoch()
        except CancelFitException:
            return epoch
    return None


def test_early_stopping_counts_epochs_since_the_last_best():
    early = EarlyStopping(patience=2)
    assert track(early, [3, 4, 2, 3, 1, 2, 0.5, 1]) is None and not early.stopped
    assert track(early, [3, 4, 2, 2, 3, 1]) == 5 and early.stopped


def test_early_stopping_does_not_count_a_loss_that_is_hardly_lower():
    early = EarlyStopping(patience=2, min_delta=0.5)
    losses = [3, 2.6, 2.4, 2, 1.95, 1]
    assert track(early, losses) == 5 and early.stopped
    assert [early.least(losses[:n]) for n in range(1, 6)] == [2, 1, 2, 1, 0]


def test_the_rate_is_cut_after_epochs_without_a_new_best():
    schedule = Schedule(patience=2)
    schedule.cut = 1.0
    track(schedule, [3, 4, 2, 3, 3, 4, 1, 2])
    assert schedule.cut == pytest.approx(1 / 5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("loss", "stops"), [(np.nan, True), (np.inf, True), (1.0, False)])
def test_a_loss_that_is_not_finite_stops_training_and_validation(training, loss, stops):
    callback = StopOnNonFiniteLoss()
    callback.learn = SimpleNamespace(training=training, loss=torch.tensor(loss), epoch=1, iter=2)
    try:
        callback("after_batch")
    except CancelFitException:
        assert stops and callback.where == f"epoch 2, {'training' if training else 'validation'} batch 3"
    else:
        assert not stops


@pytest.mark.parametrize(("bad", "seen"), [(0, 4), (3, 4), (4, 8), (8, 10)])
def test_losses_on_a_gpu_are_read_after_some_batches_and_at_the_end_of_the_part(bad, seen):
    """`meta` tensors stand for those of a GPU until they are read."""
    callback, read = StopOnNonFiniteLoss(every=4), 0
    callback._check = lambda: check()
    learn = callback.learn = SimpleNamespace(training=True, epoch=0, loss=torch.empty((), device="meta"))

    def check():
        callback.finite = [torch.tensor(read + i != bad) for i in range(len(callback.finite))]
        StopOnNonFiniteLoss._check(callback)

    callback("before_train")
    with pytest.raises(CancelFitException):
        for learn.iter in range(10):
            callback("after_batch")
            read += 0 if callback.finite else 4
        callback("after_train")
    assert callback.where == f"epoch 1, training batch {bad + 1}" and learn.iter + 1 == seen


def test_the_epochs_take_the_views_in_turn():
    callback, used = NextView(), []
    for epoch in range(4):
        callback.learn = SimpleNamespace(epoch=epoch, dl=SimpleNamespace(features=torch.zeros(3, 1, 1)))
        callback.before_train()
        used.append(callback.learn.dl.view)
    assert used == [0, 1, 2, 0]


class FailInABatch(Callback):
    """Ends the fit by an error between the forward pass and the loss."""

    def after_pred(self):
        raise ZeroDivisionError("for a test")


def autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def test_autocast_ends_when_an_error_ends_a_batch(settings):
    """Left on, it would make all later batches of the process compute with the weights of that moment."""
    with pytest.raises(ZeroDivisionError):
        fit(**settings | {"precision": "bf16", "weights": "none", "epochs": 1}, callbacks=[FailInABatch()])
    assert not torch.is_autocast_enabled("cpu") and autocast_depth() == 0


def test_autocast_of_cuda_ends_too():
    (callback,) = precision_callbacks("bf16", torch.device("cuda"))
    assert isinstance(callback, CudaAutocast) and callback.name == "mixed_precision"  # as fastai's
    callback.learn = SimpleNamespace()
    callback.before_fit()
    callback.before_batch()
    assert autocast_depth() == 1
    callback.after_fit()  # fastai forgets the context here
    callback.close()
    assert autocast_depth() == 0
    callback.close()
    assert autocast_depth() == 0


def test_the_precision_chooses_the_callback():
    assert precision_callbacks("fp32", torch.device("cuda")) == []
    (callback,) = precision_callbacks("bf16", torch.device("cpu"))
    assert isinstance(callback, Autocast)
