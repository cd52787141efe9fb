"""Several networks in one export: folds by patient, each image judged by a network that left it out, and resuming."""

import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import Callback
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from tests.conftest import QUICK, draw_collection, settings_of
from tests.small_network import NAME as SMALL
from tests.training.forked_fits import ForkedFits
from tests.training.test_resume import damage
from xray_fastai import fit, load_learner
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.image_keys import file_key
from xray_fastai.data.images import open_image
from xray_fastai.data.labelled import Request, labelled_images
from xray_fastai.data.splits import assign_folds, patient_groups
from xray_fastai.evaluation import interpret as interpretation
from xray_fastai.evaluation import out_of_fold
from xray_fastai.evaluation.statement import _on_data, _on_model
from xray_fastai.export.runs import Auc, list_runs
from xray_fastai.export.weights_file import split_tensors
from xray_fastai.inference.model import open_model
from xray_fastai.metrics.comparison import Called
from xray_fastai.metrics.scored import Scored
from xray_fastai.model.architectures import backbones_of
from xray_fastai.model.ensemble import split
from xray_fastai.system.errors import UserError
from xray_fastai.training import ensemble_export, lr_find, trackers
from xray_fastai.training.loop import Trainer
from xray_fastai.training.members import LEAST_SECONDS, Members
from xray_fastai.training.pace import EXPORT_SHARE
from xray_fastai.training.trackers import LogEpochs

BATCH = "xray_fastai.training.stopping:StopOnNonFiniteLoss.after_batch"
OF_NETWORK = 3 * 10
"""Batches of the first and of the second: three epochs of six to train on and four to validate on."""
PATTERN = r"((?:IM-|person)[a-z]+\d*?)\d\.jpeg"
"""Ten images of a patient at most: persontrain12 is one of persontrain1."""
SETTINGS = {
    "data": "data", "weights": "weights.pth", "arch": SMALL, "size": 32, "batch_size": 8, "workers": 0, "device": "cpu",
    "freeze_epochs": 1, "epochs": 2, "lr": 2e-3, "patient_pattern": PATTERN, "members": 3,
}  # fmt: skip
COUNTS = {"train/NORMAL": 33, "train/PNEUMONIA": 42, "val/NORMAL": 2, "val/PNEUMONIA": 2}


@pytest.fixture(scope="module")
def fits(tmp_path_factory, forked):
    fits = ForkedFits(tmp_path_factory.mktemp("members"), forked)
    draw_collection(fits.root / "data", COUNTS)
    yield fits
    shutil.rmtree(fits.root)


@pytest.fixture(scope="module")
def whole(fits):
    """The export of an uninterrupted fit."""
    output = fits(**SETTINGS, name="whole")
    (fits.exports / "whole.txt").write_text(output)
    return fits.exports / "whole"


def same(a: Path, b: Path) -> None:
    """Check that two exports have bit for bit the same history, weights and predictions, and the same results."""
    for name in ("history.csv", "model.safetensors", "out_of_fold.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    models = [settings_of(path) for path in (a, b)]
    for model in models:
        del model["data"]["contents"]  # each export has a salt of its own
        for member in model["training"]["members"]:
            del member["seconds"]
    for key in ("status", "ensemble", "temperature", "threshold", "calibration", "data", "members"):
        assert models[0][key] == models[1][key], key
    assert models[0]["training"]["members"] == models[1]["training"]["members"]
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())


def images(patients: dict[str, int], copies: list[tuple[int, int]] = ()) -> pd.DataFrame:
    """A table of patients by class, two images each; the pairs of images are copies of each other."""
    rows = [(label, f"{label}{i}") for label, count in patients.items() for i in range(count) for _ in range(2)]
    table = pd.DataFrame(rows, columns=["label", "patient"])
    table["file"] = table["path"] = [f"{i}.png" for i in range(len(table))]
    table["image"] = range(len(table))
    for a, b in copies:
        table.loc[b, "image"] = table.image[a]
    return table


def test_folds_share_no_patient_and_no_copy_and_have_all_classes():
    table, line = assign_folds(images({"NORMAL": 9, "PNEUMONIA": 20}, [(0, 30), (19, 44)]), None, 5, seed=3)
    groups = patient_groups(table)
    assert table.groupby(groups).fold.nunique().max() == 1
    assert table.fold[0] == table.fold[30] and table.patient[0] != table.patient[30]
    assert set(table.fold) == set(range(5)) and not table.is_valid.any()
    counts = table.groupby("fold").label.value_counts().unstack()
    assert counts.NORMAL.between(2, 4).all() and counts.PNEUMONIA.between(6, 10).all()
    assert re.fullmatch(r"5 folds of \d+ to \d+ images, by patient: train/", line)


def test_val_that_is_too_small_is_in_the_folds():
    table, line = assign_folds(
        images({"A": 6, "B": 6}), images({"A": 2, "B": 2}), 2, seed=0, names=("train/", "valid/")
    )
    assert len(table) == 32 and line.endswith("train/ and valid/, which is too small alone (8 images)")


@pytest.mark.parametrize(("patients", "folds"), [({"A": 2, "B": 9}, 3), ({"A": 1, "B": 9}, 2)])
def test_too_few_patients_for_the_folds(patients, folds):
    with pytest.raises(UserError) as error:
        assign_folds(images(patients), None, folds, seed=0)
    assert error.value.option == "members" and error.value.value == folds
    count = "2 patients" if folds == 3 else "1 patient"
    assert f"{count} of A in train/ cannot be in as many folds; give a smaller number" in str(error.value)


@pytest.mark.parametrize("members", ["0", "21", "some", "2.5"])
def test_a_wrong_number_of_networks(members, run, collection):
    result = run("fit", collection, *QUICK, "--members", members)
    assert result.exit_code in (1, 2) and "--members" in result.output and "Traceback" not in result.output
    assert not Path("exports").exists()


@pytest.mark.slow
def test_every_image_is_judged_once_by_the_network_that_left_it_out(whole, fits):
    table = pd.read_csv(whole / "out_of_fold.csv")
    assert list(table.columns) == ["file", "label", "member", "p_NORMAL", "p_PNEUMONIA"]
    files = {file_key(f"{file.parent.parent.name}/{file.parent.name}/{file.name}"): file
             for file in (fits.root / "data").glob("*/*/*.jpeg")}  # fmt: skip
    assert sorted(table.file) == sorted(files) and len(files) == sum(COUNTS.values())
    assert [files[key].parent.name for key in table.file] == table.label.tolist()
    patients = [re.search(PATTERN, files[key].name)[1] for key in table.file]
    assert table.groupby(patients).member.nunique().max() == 1
    model = settings_of(whole)
    for member, rows in table.groupby("member"):
        record = model["training"]["members"][member - 1]
        assert record["valid"] == len(rows) and record["train"] == len(table) - len(rows)
        auc = roc_auc_score(rows.label == "PNEUMONIA", rows.p_PNEUMONIA)  # of its own best epoch: of its own outputs
        assert auc == pytest.approx(record["best"]["roc_auc"]) == record["roc_auc"][0]
    auc = roc_auc_score(table.label == "PNEUMONIA", table.p_PNEUMONIA)
    assert model["ensemble"]["metrics"]["roc_auc"][0] == pytest.approx(auc)
    assert model["called"]["PNEUMONIA"] == (table.p_PNEUMONIA >= model["threshold"]).sum()


@pytest.mark.slow
def test_what_the_export_records_and_the_fit_prints(whole, fits):
    model, output = settings_of(whole), (fits.exports / "whole.txt").read_text()
    assert model["members"] == 3 and model["settings"]["members"] == 3 and model["best"] is None
    assert model["data"]["valid_files"] == [] and sum(model["data"]["train"].values()) == sum(COUNTS.values())
    records = model["training"]["members"]
    assert [record["seed"] for record in records] == [42, 43, 44]
    assert [[phase["epochs"] for phase in record["phases"]] for record in records] == [[1, 2]] * 3
    history = pd.read_csv(whole / "history.csv")
    assert list(history.columns[:3]) == ["member", "phase", "epoch"]
    assert history.groupby(["member", "phase"]).size().tolist() == [1, 2] * 3
    assert history.train_loss.nunique() == len(history)  # other images, other seeds
    lines = r"^member (\d) of 3: \d+ images to train on, \d+ images to validate on, seed (\d+)$"
    assert re.findall(lines, output, re.M) == [("1", "42"), ("2", "43"), ("3", "44")]
    assert re.search(r"^validation +3 folds of \d+ (to \d+ )?images, by patient: train/ and val/", output, re.M)
    found = re.search(r"^out of fold, 79 images of \d+ patients: ROC AUC ([\d.]+) \([\d.]+ to [\d.]+\)", output, re.M)
    assert float(found[1]) == pytest.approx(model["ensemble"]["metrics"]["roc_auc"][0], abs=5e-4)
    assert "then 2 networks more)" in " ".join(output.split())


@pytest.mark.slow
def test_what_report_runs_and_statement_say_of_the_networks(whole, fits):
    model, text = settings_of(whole), (whole / "report.html").read_text()
    assert "<h3>Out of fold: 79 images of " in text and text.count('class="best"') == 3
    value, low, high = model["ensemble"]["metrics"]["roc_auc"]
    assert f"{value:.3f}<small>{low:.3f} to {high:.3f}</small>" in text  # at a glance
    (row,) = [run for run in list_runs(fits.exports) if run.name == "whole"]
    assert row.valid == Auc(value, low, high) and row.network == f"3 x {SMALL} 32"
    sentences = _on_data(model, {"data": "data", "split": "test", "images": 1, "patients": 1, "counts": {}})
    assert " of 11 patients were divided into 3 folds by patient. " in sentences["partitions"]
    assert "another part of the images, by patient" in _on_model(model)["ensemble"]


QUICKLY = {
    "weights": "none", "arch": SMALL, "size": 32, "batch_size": 8, "workers": 0, "device": "cpu", "epochs": 1,
    "members": 2, "name": "two",
}  # fmt: skip


@pytest.mark.slow
def test_the_export_gives_the_mean_of_the_outputs(collection, monkeypatch):
    joined, join = [], ensemble_export.join
    monkeypatch.setattr(ensemble_export, "join", lambda *args: (joined.extend(args[0]), join(*args))[1])
    learn = load_learner(fit(collection, **QUICKLY).path)
    x = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        outputs = torch.stack([network.eval()(x) for network in joined])
        assert len(outputs) == 2 and not torch.allclose(outputs[0], outputs[1], atol=1e-2)
        torch.testing.assert_close(learn.model.eval()(x), outputs.mean(0), rtol=1e-5, atol=1e-5)


KILLED = [  # when; the place in a process that resumes after the previous kill; what that process says it resumes
    ("in the first network's first epoch", f"{BATCH}@3", None),
    ("in the first network's second epoch", f"{BATCH}@13", "from the beginning: no epoch was completed"),
    ("before the files of the first network's epochs go", "xray_fastai.training.checkpoint:Checkpoints.keep_newest@1",
     "with 0 of 3 networks done"),
    ("as the second network begins", "xray_fastai.training.checkpoint:Checkpoints.begin@1",
     "with 1 of 3 networks done"),
    ("in the second network's second epoch", f"{BATCH}@13", "with 1 of 3 networks done"),
    ("in the third network's unfrozen phase", f"{BATCH}@42", "with 1 of 3 networks done"),
    ("while the export is written", "xray_fastai.training.write_export:plot_curves@1", "with 2 of 3 networks done"),
]  # fmt: skip


def resumed(output: str) -> str:
    return re.search(r"^resuming +\S+ (.*?)(?:, as .*)?$", output, re.M)[1]


@pytest.mark.slow
def test_a_fit_killed_in_and_between_its_networks_gives_the_result_of_an_uninterrupted_one(fits, whole):
    """The weights that the networks start from are gone after the first kill of a fit with an epoch."""
    weights = fits.root / "weights.pth"
    for when, where, place in KILLED:
        settings = {"resume": "killed"} if place else SETTINGS | {"name": "killed"}
        output = fits(-signal.SIGKILL, {"do": "kill", "at": where}, **settings)
        assert place is None or resumed(output) == place, when
        if place and weights.exists():
            weights.rename(fits.root / "moved.pth")
    output = fits(resume="killed")
    assert resumed(output) == "with 3 of 3 networks done" and "to train on" not in output.partition("resuming")[2]
    (fits.root / "moved.pth").rename(weights)
    same(whole, fits.exports / "killed")
    assert not list(fits.exports.glob(".killed*"))


@pytest.mark.slow
def test_an_interrupted_fit_exports_the_networks_so_far_and_resumes(fits, whole):
    at = {"do": "terminate", "at": f"{BATCH}@{OF_NETWORK + 23}"}  # in the second network's second epoch
    output = fits(do=at, **SETTINGS, name="terminated")
    path = fits.exports / "terminated"
    model = settings_of(path)
    assert "2 of 3 networks are in the export: the others have no epoch yet" in output
    assert model["status"] == "interrupted" and model["members"] == 2 and model["ensemble"]["planned"] == 3
    assert model["training"]["members"][1]["phases"][-1]["end"] == "an interruption"
    table = pd.read_csv(path / "out_of_fold.csv")
    assert set(table.member) == {1, 2} and len(table) == model["ensemble"]["images"]
    load_learner(path)
    output = fits(resume="terminated")
    assert resumed(output) == "with 1 of 3 networks done"
    assert "member 2 of 3: " in output and "; resuming after unfrozen epoch 1" in output
    same(whole, fits.exports / "terminated-2")


@pytest.mark.slow
def test_a_fit_interrupted_before_any_epoch(fits):
    output = fits(do={"do": "terminate", "at": f"{BATCH}@2"}, **SETTINGS, name="early")
    assert "no epoch was completed: the export has the weights at the time of the stop" in output
    model = settings_of(fits.exports / "early")
    assert model.get("members") is None and model["settings"]["members"] == 3
    load_learner(fits.exports / "early")


@pytest.mark.slow
def test_damaged_files_of_networks_that_are_done(fits, whole):
    """The first network is trained again, from weights that are read again, and the third goes on.

    Where the first is interrupted before its first epoch, the epochs of the third are in the export, too.
    """
    fits(-signal.SIGKILL, {"do": "kill", "at": f"{BATCH}@{2 * OF_NETWORK + 21}"}, **SETTINGS, name="damaged")
    checkpoint = fits.exports / ".damaged.partial" / "checkpoint"
    assert sorted(file.name for file in checkpoint.iterdir()) == [
        "member-1", "member-2", "member-3", "settings.json", "start.safetensors"
    ]  # fmt: skip
    assert len(list((checkpoint / "member-2").glob("*.json"))) == 1
    assert not list((checkpoint / "member-2").glob("*.optimizer.*"))
    damage(next((checkpoint / "member-1").glob("*.outputs.safetensors")))
    damage(checkpoint / "start.safetensors")
    output = fits(do={"do": "terminate", "at": f"{BATCH}@2"}, resume="damaged")
    assert "2 of 3 networks are in the export: the others have no epoch yet" in output
    assert [member["member"] for member in settings_of(fits.exports / "damaged")["training"]["members"]] == [2, 3]
    assert re.search(r"member-1/\d+\.json: damaged \(\d+\.outputs\.safetensors has changed since it was written\); "
                     r"member 1 is trained again", output)  # fmt: skip
    assert "checkpoint/start.safetensors: damaged; reading the weights again from weights.pth" in output
    output = fits(resume="damaged")
    assert resumed(output) == "with 1 of 3 networks done"
    assert re.findall(r"^member (\d) of 3: .*(resuming after .*)?$", output, re.M)[0][0] == "1"
    assert "; resuming after unfrozen epoch 1" in output
    same(whole, fits.exports / "damaged-2")


@pytest.mark.slow
def test_where_memory_ran_out_the_next_network_begins_with_smaller_batches(fits):
    at = {"do": "starve", "at": "xray_fastai.model.learner:CalibratedCrossEntropy.__call__@2", "max_images": 7}
    one_phase = {"weights": "none", "freeze_epochs": None, "epochs": 1, "members": 2}
    output = fits(**{"do": at} | SETTINGS | one_phase, name="starved")
    assert re.findall("^out of memory in (.*?):", output, re.M) == ["training", "validation"]
    assert settings_of(fits.exports / "starved")["members"] == 2


class Poison(Callback):
    "Make the outputs of one network, from one epoch on, not a number; it counts the networks, as it is used for all."

    def __init__(self, member: int, epoch: int):
        self.member, self.first, self.fits = member, epoch, 0

    def before_fit(self):
        self.fits += 1

    def after_pred(self):
        if self.fits == self.member and self.epoch >= self.first:
            self.learn.pred = self.pred * torch.nan


@pytest.mark.slow
def test_a_loss_that_diverges_ends_the_fit_with_the_networks_so_far(collection, capsys):
    result = fit(collection, **QUICKLY | {"members": 3, "epochs": 2}, callbacks=[Poison(2, 1)])
    assert result.status == "diverged"
    assert result.error == "member 2 of 3, unfrozen phase: the loss was not finite at epoch 2, training batch 1"
    model = settings_of(result.path)
    assert model["members"] == 2 and [len(member["phases"]) for member in model["training"]["members"]] == [1, 1]
    assert "2 of 3 networks are in the export" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"member 1 of 2, unfrozen phase: .* no epoch was completed, so nothing is exp"):
        fit(collection, **QUICKLY | {"name": "none"}, callbacks=[Poison(1, 0)])
    assert [path.name for path in Path("exports").iterdir()] == ["two"]


@pytest.mark.slow
@pytest.mark.parametrize("valid", ["folder", "0.3"])
def test_networks_that_all_validate_on_the_same_images(valid, tmp_path, capsys):
    """The outputs that are judged are the export's own: the means."""
    counts = {"train/NORMAL": 30, "train/PNEUMONIA": 30, "val/NORMAL": 12, "val/PNEUMONIA": 12}
    data = draw_collection(tmp_path / "data", counts)
    result = fit(data, **QUICKLY, valid=valid, lr=1e-4)
    output, model = capsys.readouterr().out, settings_of(result.path)
    assert ", on which both networks validate\n" in output
    assert " of each network train in the frozen phase" in output
    assert f"\n              {model['training']['parameters']['total']:,} in the export\n" in output
    number, train = (24, 60) if valid == "folder" else (18, 42)
    assert len(model["data"]["valid_files"]) == number and sum(model["data"]["train"].values()) == train
    assert not (result.path / "out_of_fold.csv").exists()
    assert [(member["train"], member["valid"]) for member in model["training"]["members"]] == [(train, number)] * 2
    table = labelled_images(model, Request(data, "valid")).table
    learn = load_learner(result.path)
    predicted, _ = learn.get_preds(dl=learn.dls.test_dl(table))
    auc = roc_auc_score(table.label == "PNEUMONIA", predicted[:, 1])
    assert model["ensemble"]["outputs"] == "validation" and model["ensemble"]["images"] == number
    assert model["ensemble"]["metrics"]["roc_auc"][0] == pytest.approx(auc)
    assert f"validation, by the mean of all networks, {number} images of " in output


@pytest.mark.slow
def test_the_number_of_networks_cannot_change_when_a_fit_is_resumed(collection, run, refused):
    with pytest.raises(KeyboardInterrupt):
        fit(collection, **QUICKLY, callbacks=[Interrupt()])
    refused(run("fit", "--resume", "two", "--members", 3), "--members: cannot change when two is resumed; leave it out")


@pytest.mark.slow
def test_rates_that_were_found_before_a_fit_was_resumed(collection, monkeypatch):
    """All networks were done: none trains, and nothing is searched again."""
    rates = iter([3e-3, 5e-3])
    monkeypatch.setattr(lr_find, "suggestion", lambda *_: (next(rates), None))
    monkeypatch.setattr(lr_find, "STEPS", 12)
    with monkeypatch.context() as patch:
        patch.setattr(ensemble_export, "export", lambda *_: next(iter([])))
        with pytest.raises(StopIteration):
            fit(collection, **QUICKLY, lr="find")
    result = fit(resume="two")
    assert result.lr == 5e-3
    members = settings_of(result.path)["training"]["members"]
    assert [phase["lr"] for member in members for phase in member["phases"]] == [3e-3, 5e-3]


class Interrupt(Callback):
    def after_epoch(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_each_network_continues_from_its_own(collection, run, refused, monkeypatch):
    parent = fit(collection, **QUICKLY).path
    tensors = load_file(parent / "model.safetensors")
    learn = load_learner(parent)
    own = [network.state_dict() for network in split(learn.model, 2)]
    for state, expected in zip(split_tensors(tensors, 2), own, strict=True):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    starts = []
    train = Trainer.train_phases

    def watched(trainer):
        starts.append({name: tensor.clone() for name, tensor in trainer.learn.model.state_dict().items()})
        train(trainer)

    monkeypatch.setattr(Trainer, "train_phases", watched)
    again = {name: value for name, value in QUICKLY.items() if name not in ("weights", "arch", "size", "name")}
    child = fit(collection, **again, weights=str(parent), name="child")
    for start, expected in zip(starts, own, strict=True):
        assert all(torch.equal(start[name], tensor) for name, tensor in expected.items())
    assert settings_of(child.path)["lineage"][0]["name"] == "two"
    command = ["fit", collection, "--weights", parent, "--batch-size", 8, "--device", "cpu"]
    refused(run(*command), "holds 2 networks, which cannot go on as one; give --members 2 to train each on")
    refused(run(*command, "--members", 3), f"{parent} holds 2 networks; give 2, so that each is trained on")


def test_a_time_limit_is_shared_by_the_networks_that_are_left():
    members = Members.__new__(Members)
    members.plan = SimpleNamespace(config=FitConfig(time_limit="1000"))
    members.left, members.member = [0, 1, 2], 0
    members.trained = {}
    assert members._seconds() == pytest.approx(1000 / 3)
    members.left, members.member = [1, 2], 1
    members.trained = {0: SimpleNamespace(seconds=190.0)}
    first = members._seconds()
    assert 190 + 2 * (1 - EXPORT_SHARE) * first == pytest.approx((1 - EXPORT_SHARE) * 1000)
    members.trained = {0: SimpleNamespace(seconds=5000.0)}
    assert members._seconds() == LEAST_SECONDS


@pytest.mark.slow
def test_a_time_limit_ends_each_network(collection):
    result = fit(collection, **QUICKLY | {"epochs": 5000, "time_limit": "6"})
    ends = [phase["end"] for phase in settings_of(result.path)["training"]["phases"]]
    assert ends == ["the time limit"] * 2 and result.status == "complete"


def called_by(probabilities: np.ndarray, y_true: np.ndarray) -> Called:
    y_prob = np.stack([1 - probabilities, probabilities], axis=1)
    scored = Scored(y_true, y_prob, np.arange(len(y_true)), positive=1)
    return Called(scored, (probabilities > 0.5).astype(int))


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("noise", [1.0, 12.0])
def test_a_network_that_is_worse_than_another_by_more_than_chance_is_named(folds, noise):
    """Networks with the same noise differ by chance alone."""
    rng = np.random.default_rng(0)
    y_true = np.arange(200) % 2
    own = {}
    for number, spread in enumerate([1.0, noise, 1.0]):
        score = 2 * y_true - 1 + rng.normal(0, spread, 200)
        own[number] = called_by(1 / (1 + np.exp(-score)), y_true)
    whole = called_by(np.concatenate([one.scored.y_prob[:, 1] for one in own.values()]), np.tile(y_true, 3))
    plan = SimpleNamespace(data=SimpleNamespace(has_folds=folds, classes=["NORMAL", "PNEUMONIA"]))
    found = ensemble_export._weakest(whole if folds else own[0], own, plan)
    assert found is None if noise == 1 else found.startswith("the ROC AUC of member 2 is below that of member ")


@pytest.mark.slow
def test_trackers_tell_the_networks_apart(collection, monkeypatch):
    recorded = []

    class Recorder:
        def __init__(self, *_):
            self.callback = LogEpochs(lambda values, step: recorded.append((step, *values)))
            self.begin = self.callback.begin

        def finish(self, figures, export):
            recorded.append(figures)

        def close(self, failed):
            assert not failed

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Recorder)
    monkeypatch.setattr(trackers, "check_trackers", lambda config: None)
    monkeypatch.setattr("xray_fastai.training.fit.check_trackers", lambda config: None)
    result = fit(collection, **QUICKLY | {"epochs": 2}, log="mlflow")
    *epochs, figures = recorded
    assert [(step, names[0]) for step, *names in epochs] == [
        (1, "member_1/train_loss"), (2, "member_1/train_loss"), (3, "member_2/train_loss"), (4, "member_2/train_loss")
    ]  # fmt: skip
    assert figures["roc_auc"] == settings_of(result.path)["ensemble"]["metrics"]["roc_auc"][0]


@pytest.mark.slow
def test_interpret_shows_the_errors_of_the_network_that_left_an_image_out(collection, monkeypatch):
    exported = fit(collection, **QUICKLY).path
    mapped, make_cells = [], out_of_fold.make_cells
    monkeypatch.setattr(out_of_fold, "make_cells", lambda *args: (mapped.append(args), make_cells(*args))[1])
    found = interpretation.interpret(exported, top=3)
    folds = pd.read_csv(exported / "out_of_fold.csv").set_index("file")
    rows = folds.loc[found.images.file.map(file_key)]
    assert len(found.table) == len(folds) and out_of_fold.JUDGED in found.remarks
    assert f"training images, out of fold, {len(folds)} images" in str(found)
    (listed,) = list_runs("exports")
    assert listed.out_of_fold and listed.valid_images == len(folds)
    losses = found.images.loss.to_numpy()
    assert losses == pytest.approx(-np.log(np.where(rows.label == "NORMAL", rows.p_NORMAL, rows.p_PNEUMONIA)))
    assert found.table.groupby("member").size().tolist() == folds.groupby("member").size().tolist()
    assert [cell.path.item() for _, cell in mapped] == found.shown.path.tolist()
    model = open_model(exported, "cpu", "fp32")
    for own, row in mapped:  # its network is the one that gave the probability, but for its bias
        image = torch.from_numpy(np.array(open_image(row.path.item(), model.size)))[None, None]
        backbone = next(own.network[0].parameters())
        parts = [next(part.parameters()) for part in backbones_of(model.network)]
        assert [torch.equal(backbone, part) for part in parts] == [number == row.member.item() for number in (1, 2)]
        assert own.logits(image).shape == (1, 2)
    (exported / "out_of_fold.csv").write_text("file,member\n")
    with pytest.raises(UserError, match=r"out_of_fold.csv: damaged; get the export again"):
        interpretation.interpret(exported)
    (exported / "out_of_fold.csv").unlink()
    with pytest.raises(UserError, match="an ensemble has none"):
        interpretation.interpret(exported)
