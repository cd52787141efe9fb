"""Links, extensions and spellings: what a folder holds is read once, and what is not read is counted."""

import os
import shlex
import shutil
import subprocess
import sys
import unicodedata

import pytest
from PIL import Image

from tests.conftest import draw_collection
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.audit.check import check_data
from xray_fastai.data.dataset import read_collection
from xray_fastai.data.file_lists import named
from xray_fastai.data.folders import read_split
from xray_fastai.data.images import EXTENSIONS
from xray_fastai.data.patients import PatientRule
from xray_fastai.inference.stream import image_sources

CLASSES = {"train/NORMAL": 20, "train/PNEUMONIA": 20}


def readers(root):
    """Return how many images a fit, `data check` and `predict --recursive` find in train/."""
    audit = check_data(root)
    return len(read_split(root, "train")), len(audit.images), len(list(image_sources([str(root / "train")], True)))


@pytest.mark.parametrize("links", [{"self": "."}, {"a": ".", "b": "."}, {"up": ".."}, {"up": "../..", "self": "."}])
def test_links_to_a_folder_above_add_no_image_and_end(tmp_path, links):
    root = draw_collection(tmp_path / "data", CLASSES)
    for name, target in links.items():
        os.symlink(target, root / "train" / "NORMAL" / name)
    assert read_split(root, "train").label.value_counts().to_dict() == {"NORMAL": 20, "PNEUMONIA": 20}
    assert readers(root) == (40, 40, 40)


def test_two_links_to_each_other(tmp_path):
    root = draw_collection(tmp_path, {**CLASSES, "train/NORMAL/a": 2, "train/NORMAL/b": 2})
    os.symlink("../b", root / "train" / "NORMAL" / "a" / "b")
    os.symlink("../a", root / "train" / "NORMAL" / "b" / "a")
    assert readers(root) == (44, 44, 44)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_every_extension_that_pillow_registers_is_taken(kind):
    Image.init()
    assert {extension for extension, of in Image.EXTENSION.items() if of == kind} <= set(EXTENSIONS)


def test_jfif_files_are_trained_on(tmp_path):
    root = draw_collection(tmp_path, CLASSES)
    for path in sorted((root / "train" / "NORMAL").iterdir())[:15]:
        path.rename(path.with_suffix(".jfif"))
    assert readers(root) == (40, 40, 40)


def test_a_fit_counts_what_it_does_not_take(tmp_path):
    root = draw_collection(tmp_path, CLASSES)
    for path in sorted((root / "train" / "NORMAL").iterdir())[:3]:
        path.rename(path.with_suffix(".picture"))
    (root / "train" / "NORMAL" / ".hidden").write_text("")
    _, data = read_collection(FitConfig(data=str(root)))
    assert [note for note in data.notes if "3 files" in note] == [
        "not read, as their names are no images': 3 files; data check names them"
    ]


def test_classes_are_compared_composed(tmp_path):
    """macOS decomposes accented letters in names of files."""
    name = "Pneumonie infectée"
    composed, decomposed = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    root = draw_collection(
        tmp_path, {f"train/{composed}": 3, "train/NORMAL": 3, "test/NORMAL": 3, f"test/{decomposed}": 3}
    )
    test = read_split(root, "test", ["NORMAL", composed], partial=True)
    assert set(test.label) == {"NORMAL", composed} and all(map(os.path.exists, test.path))
    assert set(read_split(root, "test", ["NORMAL", decomposed], partial=True).label) == {"NORMAL", decomposed}
    assert named(f"train/{decomposed}/x.png") == named(f"train/{composed}/x.png")
    assert not [found for found in check_data(root).findings if "class" in found.kind]


SPLITS = {"TRAINING/NORMAL": 20, "TRAINING/PNEUMONIA": 20, "Validation/NORMAL": 3, "Validation/PNEUMONIA": 3}


def test_other_names_of_splits_are_read_and_a_folder_that_is_none_is_named(tmp_path):
    root = draw_collection(tmp_path, SPLITS | {"Testing/NORMAL": 2, "holdout/normal": 1, "drawings/sketches": 1})
    (root / "loose").mkdir()
    shutil.copy(next(root.glob("Testing/NORMAL/*")), root / "loose")
    _, data = read_collection(FitConfig(data=str(root)))
    assert len(data.table) == 46 and data.table[data.table.split == "val"].is_valid.all()
    assert data.notes[0].startswith("4 images held out of TRAINING/, by image, and Validation/, which is too small")
    assert [note for note in data.notes if "not used" in note] == ["not used: holdout/, loose/"]
    findings = {finding.kind: finding for finding in check_data(root).findings}
    assert findings["not-used"].text == "not used: holdout/, loose/" and "no-train" not in findings
    assert set(check_data(root).images.split) == {"train", "val", "test"}
    _, data = read_collection(FitConfig(data=str(root), valid="0.2"))
    assert "not used: Validation/, holdout/, loose/" in data.notes


def test_the_folder_of_a_patient_is_found_below_any_name_of_a_split(tmp_path):
    root = draw_collection(tmp_path, {"training/A": 4, "training/B": 4})
    for path in sorted((root / "training" / "A").iterdir()):
        folder = path.parent / f"p{int(path.stem[-1]) // 2}"
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    table = read_split(root, "train", rule=PatientRule("^([^/]+)/"))
    assert set(table.patient[table.label == "A"]) == {"p0", "p1"} and set(table.split) == {"train"}


@pytest.mark.parametrize("command", [["fit", "--data"], ["data", "check"]])
def test_two_folders_for_one_split(command, tmp_path, run, refused):
    root = draw_collection(tmp_path / "data", SPLITS | {"val/NORMAL": 3, "val/PNEUMONIA": 3})
    refused(run(*command, root), "Validation/ and val/ are both folders of one split", root)
    shutil.rmtree(root / "val")
    shutil.copytree(root / "TRAINING", root / "train")
    refused(run(*command, root), "TRAINING/ and train/ are both folders of one split", root)


def test_a_split_or_an_archive_as_data(tmp_path, run, refused):
    root = draw_collection(tmp_path / "chest_xray", {"train/NORMAL": 2, "train/PNEUMONIA": 2, "test/NORMAL": 2})
    for split in ("train", "test"):
        refused(
            run("fit", "--data", root / split), f"--data {root / split}: is one split; give the folder above, {root}"
        )
    for name, module in (("month.zip", "zipfile"), ("month.tar.gz", "tarfile")):
        shutil.make_archive(tmp_path / "month", "zip" if module == "zipfile" else "gztar", root.parent, root.name)
        result = run("fit", "--data", tmp_path / name)
        refused(result, f'an archive; unpack it by python -m {module} -e "{tmp_path / name}" "{tmp_path / "month"}"')
        words = result.stderr.partition("unpack it by ")[2].partition(", then")[0]
        subprocess.run([sys.executable, *shlex.split(words)[1:]], check=True)
        assert read_split(tmp_path / "month" / "chest_xray", "train").label.nunique() == 2
        shutil.rmtree(tmp_path / "month")
