"""The frozen phase on features that are computed once trains as with the backbone in every epoch."""

import csv
import shutil
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from fastai.vision.all import Callback, DataLoaders, Learner, ProgressCallback

from tests.conftest import QUICK, draw_collection, settings_of
from tests.small_network import KINDS, WIDTHS
from tests.small_network import NAME as SMALL
from xray_fastai import fit, load_learner
from xray_fastai.model.learner import build_learner
from xray_fastai.model.loaders import make_loaders
from xray_fastai.training import frozen_features


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    counts = {"train/NORMAL": 16, "train/PNEUMONIA": 22, "val/NORMAL": 5, "val/PNEUMONIA": 6}
    return draw_collection(tmp_path_factory.mktemp("features") / "data", counts)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights, with statistics of batch norm other than 0 and 1, as after training."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(SMALL)
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def frozen(data, weights, run):
    """A function that fits three frozen epochs and one unfrozen, and returns history and output."""

    def frozen(name, *args):
        args = ["--data", data, "--valid", "folder", *QUICK, "--weights", weights, "--freeze-epochs", 3, *args]
        result = run("fit", *args, "--precision", "fp32", "--epochs", 1, "--name", name)
        assert result.exit_code == 0, result.output
        with Path("exports", name, "history.csv").open() as stream:
            rows = [{key: float(row[key]) for key in ("train_loss", "valid_loss")} for row in csv.DictReader(stream)]
        return rows, result.stdout

    return frozen


@pytest.mark.slow
def test_features_train_as_a_backbone_that_runs_every_epoch(frozen):
    """Batch for batch, with dropout; and the unfrozen phase after it is the same too."""
    options = ["--augment", "none"]
    once, output = frozen("once", *options)
    every, output_every = frozen("every", *options, "--frozen-views", 0)
    assert "features of 38 training images and of 11 validation images\ncomputed in" in output
    assert "features of" not in output_every
    assert len(once) == 4
    for a, b in zip(once, every, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    weights = [load_learner(f"exports/{name}").model.state_dict() for name in ("once", "every")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4, msg=name)


class Seen(Callback):
    "Keep the mean of each training image of each epoch, in an order that shuffling does not change."

    def __init__(self):
        self.epochs = []

    def before_train(self):
        self.means = []

    def before_batch(self):
        if self.training:
            self.means += self.x.as_subclass(torch.Tensor).mean((1, 2, 3)).tolist()

    def after_train(self):
        self.epochs.append(sorted(self.means))


@pytest.mark.slow
@pytest.mark.parametrize("in_every_epoch", [False, True], ids=["features", "as in several processes"])
def test_only_the_unfrozen_phase_varies_the_images(data, weights, monkeypatch, tmp_path, capsys, in_every_epoch):
    """The frozen phase has them as they are, also where the backbone runs in every epoch."""
    monkeypatch.chdir(tmp_path)
    if in_every_epoch:
        monkeypatch.setattr(frozen_features, "views", lambda *_: 0)
    settings = {"data": data, "valid": "folder", "arch": SMALL, "size": 32, "batch_size": 19, "workers": 0}
    settings |= {"weights": weights, "device": "cpu", "precision": "fp32", "epochs": 2}
    seen = {}
    for augment in ("strong", "none"):
        fit(**settings, augment=augment, callbacks=[(spy := Seen())], name=augment)
        said = "phases        frozen (at most 2 epochs, images not augmented)" in capsys.readouterr().out
        assert said == (augment == "strong")
        seen[augment] = spy.epochs
    assert seen["strong"][0] == pytest.approx(seen["strong"][1], abs=1e-6)
    assert seen["strong"][0] == pytest.approx(seen["none"][0], abs=1e-6)
    assert seen["none"][2] == pytest.approx(seen["none"][3], abs=1e-6)
    assert seen["strong"][2] != pytest.approx(seen["strong"][3], abs=1e-3)
    fit(**settings | {"epochs": 1, "freeze_epochs": 2}, frozen_views=2, callbacks=[(spy := Seen())], name="views")
    assert spy.epochs[0] != pytest.approx(seen["none"][0], abs=1e-3)
    assert "not augmented" not in capsys.readouterr().out


@pytest.mark.slow
def test_views_differ_and_a_file_on_the_disk_gives_what_memory_gives(frozen, monkeypatch):
    features, folders, loader = [], [], frozen_features.FeatureLoader
    monkeypatch.setattr(frozen_features, "FeatureLoader", lambda *args: features.append(args[0]) or loader(*args))
    in_memory, output = frozen("memory", "--frozen-views", 3)
    assert "features of 38 training images, 3 views each, and of 11 validation images" in output
    monkeypatch.setattr(frozen_features, "IN_MEMORY", 0)
    monkeypatch.setattr(frozen_features, "check_space", lambda folder, *_: folders.append(list(folder.iterdir())))
    mapped, _ = frozen("mapped", "--frozen-views", 3)
    assert mapped == in_memory
    assert all(
        {path.name for path in folder} == {"checkpoint", "fit.log"} for folder in folders
    )  # the file has no name
    assert len(folders) == 2
    train, valid = features[:2]
    assert train.shape == (3, 38, WIDTHS[-1]) and valid.shape == (1, 11, WIDTHS[-1])
    assert all((train[i] != train[j]).any(dim=1).all() for i, j in [(0, 1), (0, 2), (1, 2)])


def test_features_that_the_disk_has_no_space_for_are_refused(data, weights, run, refused, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(frozen_features, "IN_MEMORY", 0)
    args = ["fit", "--data", data, "--valid", "folder", *QUICK, "--weights", weights, "--precision", "fp32"]

    def nearly_full(folder):  # after the check for checkpoints and export
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))

    monkeypatch.setattr(frozen_features, "_compute", _after(nearly_full, frozen_features._compute))
    refused(run(*args), "0 MB are free", "the features of the images, the checkpoints", "fewer --frozen-views")
    assert not list(Path("exports").iterdir())


def _after(first, then):
    def both(*args):
        first(args)
        return then(*args)

    return both


@pytest.mark.slow
def test_ctrl_c_while_features_are_computed_ends_as_in_a_first_epoch(data, weights, run, monkeypatch):
    monkeypatch.setattr(
        frozen_features, "_compute", _after(lambda _: signal.raise_signal(signal.SIGINT), frozen_features._compute)
    )
    args = ["fit", "--data", data, "--valid", "folder", *QUICK, "--weights", weights, "--name", "stopped"]
    result = run(*args)
    assert result.exit_code == 130, result.output
    assert "computed in" not in result.stdout
    assert settings_of(Path("exports/stopped"))["status"] == "interrupted"
    load_learner("exports/stopped")


def test_callbacks_get_the_events_that_fastai_gives_them():
    """In the same order; also a callback made of functions, one that is added in a fit, and one that does not run."""

    seen = []

    class Add(Callback):
        order = 5

        def before_batch(self):
            seen.append("add")
            if not self.iter and not self.epoch:
                self.learn.add_cb(Callback(after_batch=lambda self: seen.append("added")))

    class Quiet(Callback):
        def before_epoch(self):
            self.run = self.epoch == 0  # until the fit ends

        def after_batch(self):
            seen.append("quiet")

    found = {}
    for kind in (Learner, frozen_features.HeadLearner):
        seen.clear()
        batches = [(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))] * 2
        learn = kind(DataLoaders(batches, batches), torch.nn.Linear(3, 2), loss_func=torch.nn.functional.cross_entropy)
        learn.remove_cb(ProgressCallback)
        functions = Callback(before_epoch=lambda self: seen.append("epoch"), after_fit=lambda self: seen.append("fit"))
        quiet = Quiet()  # the same in both fits
        with learn.no_logging():
            for _ in range(2):
                learn.fit(2, 0.1, cbs=[functions, quiet, Add()])
            learn.validate(cbs=[functions])  # calls two events at once
        found[kind] = [*seen]
    assert found[Learner] == found[frozen_features.HeadLearner]
    assert {*found[Learner]} == {"add", "added", "epoch", "fit", "quiet"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", KINDS)
def test_folding_batch_norm_does_not_change_the_output(arch):
    """For each architecture, the pooled features have the head's size and give the same logits."""
    blank = np.zeros((3, 40, 40), np.uint8)
    table = pd.DataFrame({"path": list(blank), "label": ["a", "b", "a"], "is_valid": [False, False, True]})
    learn = build_learner(make_loaders(table, ["a", "b"], 32, 2, torch.device("cpu"), 0), arch)
    for part in learn.model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
    model, x = learn.model.eval(), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        pooled = frozen_features.pooling(model)(x)
        assert pooled.shape == (2, model[1][-1].in_features)
        logits = frozen_features.HeadAlone(*model)(pooled[..., None, None])
        torch.testing.assert_close(logits, model(x), rtol=1e-3, atol=1e-4)
    assert list(frozen_features.HeadAlone(*model).state_dict()) == list(model.state_dict())
