"""Folders become a table, and a table a training and a validation side that share no patient and no file."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import QUICK, draw_collection, settings_of
from xray_fastai.data.dataset import check_files
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.data.patients import PatientRule
from xray_fastai.data.splits import assign_validation, hold_out, of_one_patient
from xray_fastai.system.errors import UserError


def table(patients, labels, images=None):
    files = [f"train/{label}/{i}.jpeg" for i, label in enumerate(labels)]
    frame = pd.DataFrame({"path": files, "file": files, "label": labels, "split": "train", "patient": patients})
    return frame.assign(image=images if images is not None else files)


def test_other_names_are_patients_of_their_own_and_a_pattern_finds_others(tmp_path):
    root = draw_collection(tmp_path, {"train/A": 3, "train/B": 3})
    assert read_split(root, "train").patient.nunique() == 6
    assert set(read_split(root, "train", rule=PatientRule(r"train(\d)")).patient) == {"0", "1", "2"}


def test_the_kaggle_archive_is_read_as_it_comes(tmp_path):
    root = draw_collection(tmp_path / "chest_xray" / "chest_xray", {"train/NORMAL": 3, "train/PNEUMONIA": 3})
    (tmp_path / "chest_xray" / "__MACOSX" / "train").mkdir(parents=True)
    (root / "train" / "__MACOSX").mkdir()
    (root / "train" / ".DS_Store").write_bytes(b"\0")
    normal = root / "train" / "NORMAL"
    (normal / ".DS_Store").write_bytes(b"\0")
    (normal / "._IM-train0.jpeg").write_bytes(b"\0")
    (normal / "Thumbs.db").write_bytes(b"\0")
    (normal / "IM-train0.jpeg").rename(normal / "IM-train0.JPEG")
    assert find_root(tmp_path) == root
    found = read_split(root, "train")
    assert found.label.value_counts().to_dict() == {"NORMAL": 3, "PNEUMONIA": 3}
    assert "train/NORMAL/IM-train0.JPEG" in set(found.file)


def test_held_out_images_are_stratified_and_share_no_patient():
    patients = [f"p{i // 4}" for i in range(400)] + [f"q{i // 2}" for i in range(200)]
    labels = ["PNEUMONIA"] * 400 + ["NORMAL"] * 200
    frame = table(patients, labels)
    held_out = hold_out(frame, 0.1, seed=1)
    assert not set(frame.patient[held_out]) & set(frame.patient[~held_out])
    assert frame.label[held_out].value_counts().to_dict() == pytest.approx({"PNEUMONIA": 40, "NORMAL": 20}, abs=4)
    assert (hold_out(frame, 0.1, seed=1) == held_out).all()
    assert (hold_out(frame, 0.1, seed=2) != held_out).any()


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.3, 0.5])
def test_the_fraction_is_met(fraction):
    frame = table([f"p{i}" for i in range(300)], ["A", "B"] * 150)
    assert hold_out(frame, fraction, seed=0).mean() == pytest.approx(fraction, abs=0.02)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("few", [2, 3, 5])
def test_few_patients_of_one_class_do_not_change_the_fraction(few, fraction):
    frame = table([f"a{i}" for i in range(400)] + [f"b{i}" for i in range(few)], ["A"] * 400 + ["B"] * few)
    held_out = hold_out(frame, fraction, seed=0)
    assert held_out.mean() == pytest.approx(fraction, abs=0.02)
    assert set(frame.label[held_out]) == set(frame.label[~held_out]) == {"A", "B"}


@pytest.mark.parametrize(("patients", "said"), [(2, "50% instead of 10%"), (12, "")])
def test_another_fraction_is_said(patients, said):
    labels = [label for label in "AB" for _ in range(20 * patients)]
    frame = table([f"{label}{i // 20}" for i, label in enumerate(labels)], labels)
    _, line, _ = assign_validation(frame, None, "0.1", 0)
    assert ("instead of" in line) == bool(said) and said in line


def test_identical_files_stay_on_one_side():
    images = [f"d{i // 2}" for i in range(80)]  # each image twice, as two patients
    frame = table([f"p{i}" for i in range(80)], ["A"] * 40 + ["B"] * 40, images)
    held_out = hold_out(frame, 0.25, seed=0)
    assert not set(frame.image[held_out]) & set(frame.image[~held_out])


def test_few_patients_are_still_split_and_one_patient_is_an_error():
    frame = table(["a", "b", "c", "d"], ["A", "A", "B", "B"])
    held_out = hold_out(frame, 0.1, seed=0)
    assert set(frame.label[held_out]) == set(frame.label[~held_out]) == {"A", "B"}
    with pytest.raises(UserError, match="train/A: all images are of one patient"):
        hold_out(table(["a", "a", "c", "d"], ["A", "A", "B", "B"]), 0.1, seed=0)


@pytest.fixture
def with_val(tmp_path):
    """A hundred images, and a `val` of 50 and 50 in which one patient and one file of `train` recur."""
    counts = {"train/NORMAL": 50, "train/PNEUMONIA": 50, "val/NORMAL": 50, "val/PNEUMONIA": 50}
    root = draw_collection(tmp_path, counts)
    shutil.copy(root / "train/NORMAL/IM-train0.jpeg", root / "val/NORMAL/IM-val0.jpeg")
    (root / "train/PNEUMONIA/persontrain1.jpeg").rename(root / "train/PNEUMONIA/person7_virus_1.jpeg")
    (root / "val/PNEUMONIA/personval1.jpeg").rename(root / "val/PNEUMONIA/person7_bacteria_2.jpeg")
    both = check_files(pd.concat([read_split(root, s) for s in ("train", "val")]))[0]
    return tuple(both[both.split == s].reset_index(drop=True) for s in ("train", "val"))


def test_auto_uses_a_large_val_as_it_stands_and_leaves_out_what_leaks(with_val):
    frame, line, leaking = assign_validation(*with_val, "auto", 0)
    assert line == "val/ (100 images)"
    assert leaking == 2
    assert frame.is_valid.sum() == 100 and (~frame.is_valid).sum() == 98
    for column in ("patient", "image"):
        assert not set(frame[column][frame.is_valid]) & set(frame[column][~frame.is_valid])


@pytest.mark.slow
def test_a_class_validated_on_one_patient_is_said(run, tmp_path):
    counts = {"train/NORMAL": 8, "train/PNEUMONIA": 8, "val/NORMAL": 3, "val/PNEUMONIA": 3}
    root = draw_collection(tmp_path / "data", counts)
    for i, path in enumerate(sorted((root / "val/PNEUMONIA").iterdir())):
        path.rename(path.with_name(f"person7_virus_{i}.jpeg"))
    options = ["--valid", "folder", *QUICK, "--weights", "none", "--epochs", 1, "--name", "one"]
    result = run("fit", "--data", root, *options)
    assert result.exit_code == 0, result.output
    said = "WARNING: the 3 validation images of PNEUMONIA are all of one patient"
    assert said in " ".join(result.output.split()) and "images of NORMAL are all" not in result.output
    assert any(note.startswith(said) for note in settings_of(Path("exports/one"))["data"]["notes"])


def test_a_fold_with_one_patient_of_a_class_is_said():
    rows = [("A", "a", 0), ("A", "a", 0), ("A", "b", 1), ("A", "c", 1), ("A", "d", 2)]
    rows += [("B", f"{fold}{i}", fold) for fold in range(3) for i in range(2)]
    table = pd.DataFrame(rows, columns=["label", "patient", "fold"]).assign(is_valid=False)
    (note,) = of_one_patient(table)
    assert note.startswith("WARNING: in 1 of 3 folds all images of A are of one patient, on whom the epoch")
    assert not of_one_patient(table[table.patient != "a"])


def test_auto_looks_at_the_smallest_class_of_val(with_val):
    train, val = with_val
    _, line, _ = assign_validation(train, val.drop(val.index[val.label == "PNEUMONIA"][-1]), "auto", 0)
    assert "too small alone (99 images)" in line  # 50 NORMAL, 49 PNEUMONIA


def test_auto_adds_a_tenth_of_train_to_a_small_val(with_val):
    train, val = with_val
    frame, line, _ = assign_validation(train, val[val.index % 2 == 0], "auto", 0)
    assert "held out of train/" in line and "too small alone (50 images)" in line
    assert frame[frame.split == "train"].is_valid.mean() == pytest.approx(0.1, abs=0.03)
    assert frame[frame.split == "val"].is_valid.all()
