"""A fit that was killed, interrupted or starved goes on to what it would have given, and loses nothing on the way."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from tests.conftest import QUICK, draw_collection, settings_of
from xray_fastai import checkpoint, fit, load_learner
from xray_fastai.errors import UserError

FITS = Path(__file__).with_name("forked_fits.py")
COUNTS = {"train/NORMAL": 16, "train/PNEUMONIA": 24}  # 36 to train on: four batches; 4 to validate on: one
BATCH = "xray_fastai.callbacks:StopOnNonFiniteLoss.after_batch"  # five an epoch, the fifth in validation


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Run fits, each in a forked child; all on the same images, from a file of random weights in torch hub's cache."""
    root = tmp_path_factory.mktemp("fits")
    draw_collection(root / "data", COUNTS)
    hub = root / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), hub / "resnet18-f37072fd.pth")
    environment = os.environ | {"TORCH_HOME": str(root), "OMP_NUM_THREADS": "1"}

    def fits(*jobs):
        done = subprocess.run(
            [sys.executable, FITS], input=json.dumps(jobs), capture_output=True, text=True, env=environment, cwd=root
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    fits.exports = root / "exports"
    return fits


SETTINGS = {
    "data": "data", "arch": "resnet18", "size": 32, "batch_size": 8, "workers": 0, "device": "cpu",
    "patience": 2, "lr": 0.05, "freeze_epochs": 6,
}  # fmt: skip


@pytest.mark.parametrize(
    ("epochs", "best", "moments"),
    [
        # each phase ends by early stopping, after the rate was cut; the best epoch is of the second
        pytest.param(6, ("unfrozen", 3), {
            "before anything was kept but the settings": "xray_fastai.training:read_collection@1",
            "in the first epoch": f"{BATCH}@3",
            "while the second checkpoint is written": "xray_fastai.checkpoint:checked@4",
            "before a checkpoint has its name": "os:replace@7",
            "in the validation of the fourth epoch": f"{BATCH}@10",
            "between the phases, before that is kept": "xray_fastai.trainingstate:save_between_phases@1",
        }, id="frozen"),
        # the second phase ends with its last epoch, and the best epoch is of the first
        pytest.param(2, ("frozen", 3), {
            "between the phases, once that is kept": "xray_fastai.callbacks:Schedule.before_fit@2",
            "while old files are removed": "pathlib:Path.unlink@1",
            "in the last epoch": f"{BATCH}@4",
            "before the end is kept": "xray_fastai.trainingstate:save_between_phases@1",
            "while the export is written": "xray_fastai.curves:plot_curves@1",
        }, id="unfrozen"),
    ],
)  # fmt: skip
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(epochs, best, moments, fits):
    whole, name = f"whole{epochs}", f"killed{epochs}"
    killed = [{"fit": {"resume": name}, "kill": moment} for moment in moments.values()]
    killed[0]["fit"] = SETTINGS | {"epochs": epochs, "name": name}
    results = fits({"fit": SETTINGS | {"epochs": epochs, "name": whole}}, *killed, {"fit": {"resume": name}})
    assert [result["code"] for result in results] == [0, *[-signal.SIGKILL] * len(moments), 0], results[-1]["output"]
    a, b = fits.exports / whole, fits.exports / name
    assert (a / "history.csv").read_bytes() == (b / "history.csv").read_bytes()
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    models = [settings_of(path) for path in (a, b)]
    assert (models[0]["best"]["phase"], models[0]["best"]["epoch"]) == best
    for key in ("status", "best", "temperature", "threshold", "calibration", "data"):
        assert models[0][key] == models[1][key]
    assert models[0]["training"]["phases"] == models[1]["training"]["phases"]
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())
    assert not list(fits.exports.glob(".*"))
