"""The built-in X-rays: laid out as the real ones, the same each time, learnable but not by brightness."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from tests.conftest import settings_of
from xray_fastai.data.dataset import DEFAULTS, REHEARSAL
from xray_fastai.data.folders import read_split
from xray_fastai.data.patients import published_patient


@pytest.fixture(scope="module")
def phantom(tmp_path_factory, run):
    folder = tmp_path_factory.mktemp("phantom") / "chest_xray"
    result = run("data", "phantom", folder, "--images", 150, "--seed", 3)
    assert result.exit_code == 0, result.output
    return folder


def test_splits_classes_and_patients_are_as_kaggles(phantom):
    table = pd.concat([read_split(phantom, split) for split in ("train", "val", "test")])
    assert len(table) == 150
    assert set(table.label) == {"NORMAL", "PNEUMONIA"}
    assert table.file.map(published_patient).notna().all()
    assert (table.groupby("patient").split.nunique() == 1).all()
    assert table.patient.value_counts().max() > 1


def test_mean_brightness_does_not_tell_the_class(phantom):
    table = pd.concat([read_split(phantom, split) for split in ("train", "val", "test")])
    brightness = [np.asarray(Image.open(path)).mean() for path in table.path]
    area = roc_auc_score(table.label == "PNEUMONIA", brightness)
    assert 0.35 < area < 0.65


@pytest.mark.slow
def test_the_same_seed_draws_the_same_files(phantom, run):
    for name, seed in [("again", 3), ("other", 4)]:
        assert run("data", "phantom", name, "--images", 24, "--seed", seed).exit_code == 0
    again, other = (
        {path.relative_to(name): path.read_bytes() for path in sorted(Path(name).rglob("*.jpeg"))}
        for name in ("again", "other")
    )
    assert len(again) == 24
    assert run("data", "phantom", "third", "--images", 24, "--seed", 3).exit_code == 0
    assert again == {path.relative_to("third"): path.read_bytes() for path in sorted(Path("third").rglob("*.jpeg"))}
    assert set(again.values()) & set(other.values()) == set()


def test_bad_input(phantom, run, refused):
    refused(run("data", "phantom", phantom), "not empty")
    refused(run("data", "phantom", "few", "--images", 5), "--images 5", "24 or more")
    Path("file").write_text("")
    refused(run("data", "phantom", "file"), "file")
    refused(run("data", "phantom", "file/below"), "file/below")


@pytest.mark.slow
def test_fit_without_data_is_a_rehearsal_of_both_phases_and_says_so(run, few_drawings):
    options = ["--arch", "resnet18", "--size", 32, "--freeze-epochs", 2, "--epochs", 1, "--device", "cpu"]
    result = run("fit", *options, "--name", "rehearsal")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("REHEARSAL") and "nothing about patients" in result.stdout
    assert "phases        frozen (at most 2 epochs, images not augmented), unfrozen (at most 1 epoch)" in result.stdout
    assert "frozen phase  only to show it: the head trains on random features" in result.stdout
    model = settings_of(Path("exports/rehearsal"))
    assert [phase["name"] for phase in model["training"]["phases"]] == ["frozen", "unfrozen"]
    assert model["data"]["rehearsal"] and model["settings"]["size"] == 32
    assert {name: model["settings"][name] for name in REHEARSAL} == REHEARSAL | {"size": 32}


@pytest.mark.slow
def test_only_a_rehearsal_trains_a_head_on_random_features(run, phantom):
    options = ["--weights", "none", "--arch", "resnet18", "--size", 32, "--epochs", 1, "--device", "cpu"]
    result = run("fit", "--data", phantom, *options, "--name", "scratch")
    assert result.exit_code == 0, result.output
    assert "frozen phase  skipped: the features are random without pretrained weights" in result.stdout
    model = settings_of(Path("exports/scratch"))
    assert [phase["name"] for phase in model["training"]["phases"]] == ["unfrozen"]
    given = {"weights": "none", "size": 32}
    assert DEFAULTS | given == {name: model["settings"][name] for name in DEFAULTS}
