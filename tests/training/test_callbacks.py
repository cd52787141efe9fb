"""A user's fastai callbacks in `fit`, and the learning rates that they see."""

from pathlib import Path

import pytest
import torch
import torchvision
from fastai.vision.all import Callback, CancelFitException

from tests.conftest import settings_of
from xray_fastai import fit

LR = 1e-3


@pytest.fixture
def settings(collection, tmp_path):
    """Settings of a quick fit with pretrained weights, which are random ones."""
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "weights.pth")
    return {
        "data": str(collection), "weights": str(tmp_path / "weights.pth"), "arch": "resnet18", "size": 32, "lr": LR,
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


def test_a_callback_sees_both_phases_and_changes_nothing(settings):
    """Earlier layers train at lower rates in the unfrozen phase, as in fastai's `fine_tune`."""
    spy = Spy()
    with_callback, without = fit(**settings, name="spied", callbacks=[spy]), fit(**settings, name="plain")
    assert with_callback.history == without.history
    assert [row["phase"] for row in with_callback.history] == ["frozen"] * 2 + ["unfrozen"] * 2
    assert spy.batches == [4] * 4  # of 36 images, the last 4 make no whole batch
    frozen, unfrozen = spy.rates
    assert frozen[-1] == pytest.approx(LR)
    assert unfrozen == pytest.approx([LR / 200, LR / 20, LR / 2])


class Interfere(Spy):
    "Runs out of memory in the first batch of the fit, and cancels the second epoch of the unfrozen phase."

    def after_pred(self):
        if len(self.rates) == 1 and self.training:
            raise torch.OutOfMemoryError("no memory, for a test")
        if len(self.rates) == 3 and len(self.batches) == 5:  # one epoch, then two, then the second
            raise CancelFitException


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
