"""List the images of a folder by split and class: `DIR/{train,val,test}/CLASS/*`, the layout of the Kaggle collection.

The oddities of its archive are accepted: a second `chest_xray/chest_xray`, `__MACOSX`, `.DS_Store`, extensions in
capitals. So are the names that other tools give to splits (`SPELLINGS`).
"""

import os
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd

from xray_fastai.data.images import EXTENSIONS, is_hidden, is_image_file, walk
from xray_fastai.data.patients import ANY, PatientRule, patients_in
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import shown

SPELLINGS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""The names of a split's folder, in any capitals. `valid` is fastai's and Roboflow's, `validation` ultralytics'."""
ARCHIVES = {"zipfile": (".zip",), "tarfile": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")}
"""The extensions of archives, by the module of Python that unpacks them on the command line."""


def split_of(name: str) -> str | None:
    """Return the split that a name stands for: train, val or test; None if it stands for none.

    >>> split_of("Validation"), split_of("month2")
    ('val', None)
    """
    return next((split for split, names in SPELLINGS.items() if name.lower() in names), None)


def split_folder(root: Path, split: str) -> Path | None:
    """Find the folder of a split by any of its names.

    Args:
        root: the folder that holds it.
        split: train, val or test. Another text is the folder's own name.

    Returns:
        The folder, or None if there is none.

    Raises:
        UserError: two folders are named as the split.
    """
    if split not in SPELLINGS:
        return root / split if (root / split).is_dir() else None
    found = sorted(entry for entry in root.iterdir() if split_of(entry.name) == split and entry.is_dir())
    if len(found) > 1:
        names = " and ".join(f"{folder.name}/" for folder in found)
        raise UserError(f"{names} are both folders of one split; merge or rename them", value=root)
    return found[0] if found else None


def find_root(
    data: str | Path, split: str = "train", classes: Sequence[str] = ("NORMAL", "PNEUMONIA")
) -> Path:  # fmt: skip
    """Find the folder that holds `split`: `data` itself, or `chest_xray` or `chest_xray/chest_xray` in it.

    Args:
        data: where to look.
        split: see `split_folder`.
        classes: for errors, the classes that the split may have.

    Raises:
        UserError: `data` is missing or a file, none of these folders has the split, or one has two folders for it.
    """
    data = Path(os.path.expanduser(data))
    try:
        return _find_root(data, split, classes)
    except OSError as error:  # a name too long, or no permission
        raise UserError(f"cannot be read ({error.strerror}); give another folder", option="data", value=data) from None


def _find_root(data: Path, split: str, classes: Sequence[str]) -> Path:
    layout = f"expected folders such as {' and '.join(f'{split}/{name}' for name in classes[:2])} in it"
    if split == "test":
        layout += f", or {' and '.join(classes[:2])} without splits; xray-fastai data split makes a test split"
    if not data.exists():
        raise UserError(f"no such folder; {layout}", option="data", value=data)
    if not data.is_dir():
        advice = unpacking(data) or f"a file, not a folder; give the folder that holds {split}/"
        raise UserError(advice, option="data", value=data)
    for root in (data, data / "chest_xray", data / "chest_xray" / "chest_xray"):
        if root.is_dir() and split_folder(root, split) is not None:
            return root
    above = data.parent if data.name else data.resolve().parent
    if split_of(data.resolve().name) and split_folder(above, split) is not None:
        raise UserError(f"is one split; give the folder above, {above}", option="data", value=data)
    if split == "train":
        layout += "; xray-fastai data split makes them of folders of classes"
    entries = sorted(entry.name for entry in data.iterdir() if not is_hidden(entry.name))
    if not entries:
        raise UserError(f"the folder is empty; {layout}", option="data", value=data)
    raise UserError(f"no {split}/ in it (it has {', '.join(entries[:5])}); {layout}", option="data", value=data)


def lacks_test(data: str | None) -> bool:
    """Return whether a fit's folder has no test images; False where that is not seen: a table, a folder that is gone.

    Args:
        data: the setting `data` of a fit; None is the drawn X-rays, which have test images.
    """
    try:
        return data is not None and split_folder(find_root(data), "test") is None
    except (UserError, OSError):
        return False


def unpacking(path: Path) -> str | None:
    """Return what to do with an archive, by its name; None for another file."""
    for module, extensions in ARCHIVES.items():
        for extension in extensions:
            if path.name.lower().endswith(extension):
                folder = str(path)[: -len(extension)] or "."
                return f'an archive; unpack it by python -m {module} -e "{path}" "{folder}", then give {folder}'
    return None


def unused_folders(root: Path, used: Collection[str], classes: Collection[str]) -> list[str]:
    """Name the folders beside the splits that look like a split, and are not read: with images or class folders in it.

    Args:
        root: the folder that holds the splits.
        used: the splits that are read, or that the reader need not hear of.
        classes: the names of the classes.
    """
    known = {class_of(name).lower() for name in classes}

    def looks_like_one(folder: Path) -> bool:
        with os.scandir(folder) as entries:
            return any(
                class_of(entry.name).lower() in known if entry.is_dir() else entry.name.lower().endswith(EXTENSIONS)
                for entry in entries
                if not is_hidden(entry.name)
            )

    return [
        entry.name
        for entry in class_folders(root)
        if split_of(entry.name) not in used and class_of(entry.name).lower() not in known and looks_like_one(entry)
    ]


def note_on_unused(folders: Sequence[str]) -> list[str]:
    """Return a line about folders that are not read; no line if there are none."""
    return [f"not used: {', '.join(f'{shown(name)}/' for name in folders)}"] if folders else []


def find_images(folder: Path) -> list[str]:
    """List the image files (`images.is_image_file`) in a folder, at any depth, as sorted relative paths.

    Hidden files and folders are left out.
    """
    return [name for name in _find_files(folder) if is_image_file(str(folder / name))]


def _find_files(folder: Path) -> list[str]:
    names = []
    for parent, files in walk(folder):
        inside = os.path.relpath(parent, folder)
        names += [Path(inside, name).as_posix() for name in files if not is_hidden(name)]
    return sorted(names)


def class_folders(folder: Path) -> list[Path]:
    """List the folders in a split's folder. Each is a class."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))


def class_of(name: str) -> str:
    """Return the class of a folder by its name, in Unicode's composed form (NFC).

    macOS writes names decomposed (NFD), so that equal names may differ in their characters.
    """
    return unicodedata.normalize("NFC", name)


def list_split(folder: Path) -> dict[str, list[str]]:
    """List the images in a split's folder by class, relative to that folder; a class without images has an empty list.

    Nothing is checked here: see `check_split`.
    """
    images: dict[str, list[str]] = {}
    for entry in class_folders(folder):
        images.setdefault(class_of(entry.name), []).extend(f"{entry.name}/{name}" for name in find_images(entry))
    return images


def count_other_files(root: Path, splits: Sequence[str]) -> int:
    """Count the files in class folders that are not taken for images by their names."""
    found = filter(None, (split_folder(root, split) for split in splits))
    folders = [folder for split in found for folder in class_folders(split)]
    return sum(not is_image_file(str(folder / name)) for folder in folders for name in _find_files(folder))


def check_split(folder: Path, images: dict[str, list[str]], classes: Sequence[str] | None, partial: bool) -> None:
    """Check the classes and the images of a split.

    Args:
        folder: the split's folder, for the messages.
        images: the images by class (`list_split`).
        classes: see `read_split`.
        partial: see `read_split`.

    Raises:
        UserError: see `read_split`.
    """
    no_image = f"no image in it (supported: {' '.join(EXTENSIONS)})"
    if not images and partial:
        unlabelled = ", but images without a class" if find_images(folder) else ""
        expected = ", ".join(classes or ["CLASS"])
        raise UserError(f"no class folders in it{unlabelled}; expected one of {expected}", value=folder)
    if classes is None and len(images) < 2:
        problem = f"one class only ({', '.join(images)})" if images else "no class folders"
        expected = "expected one folder for each of two or more classes, such as NORMAL and PNEUMONIA"
        raise UserError(f"{problem}; {expected}", value=folder)
    if classes is not None and (surplus := sorted(images.keys() - set(map(class_of, classes)))):
        known = ", ".join(classes)
        raise UserError(f"holds class {', '.join(surplus)}; the known classes are {known}", value=folder)
    if classes is not None and not partial and (missing := sorted(set(map(class_of, classes)) - images.keys())):
        raise UserError(f"no folder for class {', '.join(missing)}, which train/ has", value=folder)
    if empty := [label for label, names in images.items() if not names and not partial]:
        raise UserError(no_image, value=folder / empty[0])
    if not any(images.values()):
        raise UserError(no_image, value=folder)


def read_split(
    root: Path,
    split: str,
    classes: Sequence[str] | None = None,
    rule: PatientRule = ANY,
    partial: bool = False,
) -> pd.DataFrame:
    """List and check one split.

    Args:
        root: the folder that holds the split's folder.
        split: see `split_folder`.
        classes: the classes that the split must have; it must have no others. None accepts any two or more classes.
        rule: the user's list of patients and regular expression.
        partial: some of `classes` may be missing or empty, as in a split to evaluate on.

    Returns:
        A table with one row for each image: `path`, `file` (relative to `root`), `label`, `split`, `patient` (from
        `patients.patients_in`; call `numbered` on the table of all splits).

    Raises:
        UserError: the split or a class is missing or empty, or the split has fewer or other classes.
    """
    folder = split_folder(root, split)
    if folder is None:
        raise UserError("no such folder", value=root / split)
    images = list_split(folder)
    check_split(folder, images, classes, partial)
    spelled = {class_of(label): label for label in classes or ()}
    rows = [
        (str(folder / name), f"{folder.name}/{name}", spelled.get(label, label), split)
        for label, names in sorted(images.items())
        for name in names
    ]
    table = pd.DataFrame(rows, columns=["path", "file", "label", "split"])
    return table.assign(patient=patients_in(table, rule))
