"""The images of a split, of which an export knows which its fit has seen, in whatever folder and by whatever name."""

import base64
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import QUICK, draw_collection, settings_of
from xray_fastai.data.image_keys import contents_of
from xray_fastai.data.labelled import Request, labelled_images, split_named
from xray_fastai.system.errors import UserError

FIT = ["--weights", "none", "--epochs", 1, "--exports", ".", "--name", "model", "--valid", "0.25"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run):
    """An export of a fit that left two images out, and its data with a test split of new images."""
    root = tmp_path_factory.mktemp("labelled")
    data = draw_collection(root / "data", {"train/NORMAL": 16, "train/PNEUMONIA": 16})
    draw_collection(data, {"test/NORMAL": 6, "test/PNEUMONIA": 6}, seed=1)
    out = ["train/NORMAL/IM-train3.jpeg", "train/PNEUMONIA/persontrain4.jpeg"]
    pd.DataFrame({"file": out, "action": "leave out"}).to_csv(root / "list.csv", index=False)
    options = ["--exclude", root / "list.csv", "--exports", root]
    result = run("fit", "--data", data, *QUICK, *FIT, *options)
    assert result.exit_code == 0, result.output
    return root / "model", data


@pytest.fixture
def data(trained, tmp_path):
    return Path(shutil.copytree(trained[1], tmp_path / "copy"))


def images(model, *args, **kwargs):
    return labelled_images(settings_of(model), Request(*args, **kwargs))


def test_an_export_keeps_eight_bytes_an_image_and_no_digest(trained):
    model, _ = trained
    contents = settings_of(model)["data"]["contents"]
    counts = {use: sum(settings_of(model)["data"][use].values()) for use in ("train", "valid")}
    assert {use: len(contents[use]) for use in counts} == {use: 8 * count for use, count in counts.items()}
    assert sum(counts.values()) == 30
    table = pd.DataFrame({"digest": ["00" * 16, "ff" * 16], "is_valid": [False, True]})
    parts = type("Parts", (), {"train": table[:1], "valid": table[1:]})
    first, second = contents_of(parts), contents_of(parts)
    assert first["salt"] != second["salt"] and first["train"] != second["train"] != first["valid"]
    assert len(base64.b64decode(first["train"])) == 6


def test_train_is_what_fit_trained_on(trained):
    model, _ = trained
    found = images(model, None, "train")
    assert len(found.table) == sum(settings_of(model)["data"]["train"].values())
    assert not {"train/NORMAL/IM-train3.jpeg", "train/PNEUMONIA/persontrain4.jpeg"} & set(found.table.file)
    assert found.notes == ["left out, as fit did not train on them: 2 images"]
    assert found.seen == {"train": len(found.table), "valid": 0}
    valid = images(model, None, "valid")
    assert valid.seen == {"train": 0, "valid": len(valid.table)} and valid.notes == []
    assert len(found.table) + len(valid.table) == 30


def test_seen_images_are_found_in_another_folder_by_another_name(trained, data):
    model, _ = trained
    assert images(model, data, "test").seen == {"train": 0, "valid": 0}
    assert images(model, data, "test").notes == []
    train, valid = images(model, None, "train").table, images(model, None, "valid").table
    for i, path in enumerate([*train.path[:2], valid.path[0]]):
        shutil.copy(path, data / "test" / Path(path).parent.name / f"other{i}.jpeg")
    found = images(model, data, "test")
    assert found.seen == {"train": 2, "valid": 1}
    assert found.notes == [
        "WARNING: of 15 images, the model was trained on 2 and chosen on 1: expect less of new images"
    ]


def test_exclude(trained, data):
    model, _ = trained
    pd.DataFrame({"file": ["test/NORMAL/IM-test0.jpeg", "test/NORMAL/gone.jpeg"], "action": "leave out"}).to_csv(
        "x.csv"
    )
    found = images(model, data, "test", exclude="x.csv")
    assert len(found.table) == 11 and "test/NORMAL/IM-test0.jpeg" not in set(found.table.file)
    assert found.notes == ["left out by the list x.csv: 1 image", "named by the list x.csv, but missing: 1 file"]


def test_an_export_that_does_not_know(trained):
    settings = settings_of(trained[0])
    del settings["data"]["contents"]
    found = labelled_images(settings, Request(None, "train"))
    assert found.seen is None and "does not know what fit left out" in found.notes[0]
    assert labelled_images(settings, Request(None, "test")).notes == []


def test_train_where_no_image_is_what_it_was(trained, data):
    for path in data.glob("train/*/*"):
        path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UserError, match="split train: fit trained on none of these images, as they are now"):
        images(trained[0], data, "train")


def test_a_folder_of_the_models_classes_is_a_data_set(trained, data, monkeypatch):
    model, _ = trained
    month = Path(shutil.copytree(data / "test", data.parent / "month2"))
    for folder in (month, data / "test"):
        found = images(model, folder, "test")
        assert (len(found.table), found.split, found.notes) == (12, "test", [])
        assert found.table.label.value_counts().to_dict() == {"NORMAL": 6, "PNEUMONIA": 6}
    monkeypatch.chdir(month)
    found = images(model, ".", "valid")
    assert (len(found.table), found.split) == (12, "test")
    assert found.notes == ["no splits in it: all images are used, not only those of valid"]
    found = images(model, data / "train", "test")
    assert found.split == "test" and "the model was trained on" in found.notes[0]
    shutil.rmtree(month / "PNEUMONIA")
    assert images(model, month, "test").table.label.unique().tolist() == ["NORMAL"]
    (month / "NORMAL").rename(month / "OTHER")
    with pytest.raises(
        UserError, match=r"expected folders such as test/NORMAL and .*, or NORMAL and PNEUMONIA without"
    ):
        images(model, month, "test")


def test_names_of_splits(trained, data):
    model, _ = trained
    (data / "test").rename(data / "Testing")
    assert len(images(model, data, split_named("TEST")).table) == 12
    assert {split_named(name) for name in ("val", "valid", "Validation")} == {"valid"}
    with pytest.raises(UserError, match="split holdout: choose one of test, valid, train"):
        split_named("holdout")
    shutil.copytree(data / "Testing", data / "external")
    assert images(model, data, "test").notes == ["not used: external/"]


@pytest.mark.slow
def test_evaluate_and_interpret_say_so(trained, data, run, tmp_path):
    model, _ = trained
    shutil.copytree(data / "train", data / "test", dirs_exist_ok=True)
    pd.DataFrame({"file": ["test/NORMAL/IM-test0.jpeg"], "action": ["leave out"]}).to_csv("x.csv")
    options = ["--model", model, "--data", data, "--split", "test", "--exclude", "x.csv", "--output", tmp_path]
    counts = {use: sum(settings_of(model)["data"][use].values()) for use in ("train", "valid")}
    month = shutil.copytree(data / "test", tmp_path / "month2")
    for command in (["evaluate", "--split", "val"], ["interpret"], ["compare", model]):
        result = run(*command, *([model] if command[0] == "compare" else ["--model", model]), "--data", month)
        assert result.exit_code == 0, result.output
        assert "no splits in it: all images are used" in " ".join(result.stdout.split()) or command[0] == "compare"
    assert (model / "evaluation-test-month2").is_dir() and (model / "interpretation-test-month2").is_dir()
    said = f"of 43 images, the model was trained on {counts['train']} and chosen on {counts['valid']}: expect less"
    for command in ("evaluate", "interpret"):
        result = run(command, *options)
        assert result.exit_code == 0, result.output
        text = " ".join(result.stdout.split())
        assert said in text and "left out by the list x.csv: 1 image" in text
    summary = json.loads((tmp_path / "evaluation-test" / "metrics.json").read_text())
    assert summary["seen_in_fit"] == counts and any(said in note for note in summary["notes"])
    assert said in (tmp_path / "report.html").read_text()
