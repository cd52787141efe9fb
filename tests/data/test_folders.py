"""Links, extensions and spellings: what a folder holds is read once, and what is not read is counted."""

import os
import unicodedata

import pytest
from PIL import Image

from tests.conftest import draw_collection
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.audit.check import check_data
from xray_fastai.data.dataset import read_collection, read_split
from xray_fastai.data.file_lists import named
from xray_fastai.data.images import EXTENSIONS
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
