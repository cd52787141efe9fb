"""`fit --lr find` searches the rate of each phase as fastai's `lr_find`, and leaves everything else as it was."""

import re
from pathlib import Path

import pytest
import torch
import torchvision

from tests.conftest import draw_collection, settings_of
from tests.small_network import NAME as SMALL
from xray_fastai import FitConfig, fit, verify
from xray_fastai.training import lr_find

BATCH = "xray_fastai.training.stopping:StopOnSignal.after_batch"  # the search's batches, too
SETTINGS = {
    "data": "data", "weights": "weights.pth", "valid": "folder", "arch": SMALL, "size": 32, "batch_size": 8,
    "workers": 0, "device": "cpu", "freeze_epochs": 2, "epochs": 2, "lr": "find",
}  # fmt: skip


@pytest.fixture
def settings():
    """Settings of a quick fit with pretrained weights, which are random ones."""
    counts = {"train/NORMAL": 16, "train/PNEUMONIA": 24, "val/NORMAL": 4, "val/PNEUMONIA": 4}
    draw_collection(Path("data"), counts)
    torch.manual_seed(1)
    torch.save(torchvision.models.get_model(SMALL).state_dict(), "weights.pth")
    return SETTINGS


def found(output: str) -> list[float]:
    return [float(rate) for rate in re.findall(r"^learning rate  found (\S+) \(valley; plot in lr_find", output, re.M)]


def test_each_phase_trains_at_the_rate_that_was_found(settings, capsys):
    """The earlier layers keep their share of the head's rate; model.json repeats the fit, and has the rates."""
    peaks = []

    class Spy(lr_find.Callback):
        def before_train(self):
            if self.epoch == 1:
                peaks.append([hyper["lr"] / self.schedule.scale(1, 0.2) for hyper in self.opt.hypers])

    result = fit(**settings, name="both", callbacks=[Spy()])
    output = capsys.readouterr().out
    frozen, unfrozen = found(output)
    assert "augmentation strong, learning rate searched in each phase, adaptive" in output
    model = settings_of(result.path)
    assert [phase["lr"] for phase in model["training"]["phases"]] == [frozen, unfrozen]
    assert FitConfig(**model["settings"]).lr == "find" and verify(result.path).ok
    assert result.lr == unfrozen and 1e-6 < frozen < 1
    assert (result.path / "lr_find.png").stat().st_size > 10_000
    assert 'alt="The loss of each search' in (result.path / "report.html").read_text()
    assert not Path("data/models").exists() and not Path("models").exists()
