"""What holds on the real collection, where it is: skipped without XRAY_DATA."""

import pandas as pd
import pytest

from tests.conftest import settings_of
from xray_fastai.data.dataset import check_files
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.data.labelled import Request, labelled_images
from xray_fastai.data.splits import assign_validation, hold_out

pytestmark = pytest.mark.slow  # reading 5,232 images takes half a minute


def test_the_counts_are_the_collections(real_images):
    train = read_split(find_root(real_images), "train")
    assert train.label.value_counts().to_dict() == {"PNEUMONIA": 3875, "NORMAL": 1341}


@pytest.fixture(scope="module")
def checked(real_images):
    """The readable files of train and of val, with the digests of their content."""
    table = check_files(pd.concat([read_split(find_root(real_images), split) for split in ("train", "val")]))[0]
    return [table[table.split == split].reset_index(drop=True) for split in ("train", "val")]


def test_a_tenth_is_held_out_by_patient_and_no_identical_file_is_on_both_sides(checked):
    train, _ = checked
    assert train.digest.duplicated().any()  # 24 groups of identical files
    for seed in range(2):
        held_out = hold_out(train, 0.1, seed)
        assert abs(held_out.mean() - 0.1) < 0.01
        assert abs((train.label[held_out] == "NORMAL").mean() - 1341 / 5216) < 0.02
        for column in ("patient", "image"):
            assert not set(train[column][held_out]) & set(train[column][~held_out])


def test_auto_validation_takes_val_too(checked):
    _, line, leaking = assign_validation(*checked, "auto", 42)
    assert "val/, which is too small alone (16 images)" in line and leaking == 0


def test_one_epoch_on_real_images_already_tells_the_classes_apart(real_images, run, tmp_path):
    """On one image in eight, as links; the export then finds its validation images again."""
    table = read_split(find_root(real_images), "train").iloc[::8]
    for row in table.itertuples():
        link = tmp_path / row.file
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"{find_root(real_images).resolve()}/{row.file}")
    args = ["--arch", "resnet18", "--size", 32, "--weights", "none", "--batch-size", 32, "--valid", "0.25"]
    result = run("fit", "--data", tmp_path, *args, "--epochs", 3, "--lr", 1e-3, "--exports", tmp_path, "--name", "real")
    assert result.exit_code == 0, result.output
    model = settings_of(tmp_path / "real")
    assert model["best"]["roc_auc"] > 0.9
    valid = labelled_images(model, Request(None, "valid")).table
    assert len(valid) == sum(model["data"]["valid"].values())
    assert not set(valid.patient) & set(labelled_images(model, Request(None, "train")).table.patient)
