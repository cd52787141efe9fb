"""Read a folder of images as a table with the path, label, split and patient of each.

The layout is that of the Kaggle collection: `DIR/{train,val,test}/CLASS/*`. The oddities of its archive are accepted: a
second `chest_xray/chest_xray`, `__MACOSX`, `.DS_Store`, extensions in capitals.
"""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from xray_fastai.config.class_names import check_classes
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.classes import positive_class
from xray_fastai.data.duplicates import same_image
from xray_fastai.data.exclusions import leave_out
from xray_fastai.data.image_facts import Facts, examine_all
from xray_fastai.data.images import EXTENSIONS, check_not_blank, is_hidden, is_image_file, walk
from xray_fastai.data.patients import ANY, PatientRule, check_listed, note_on, numbered, patient_rule, patients_in
from xray_fastai.data.sources.phantom import cached
from xray_fastai.data.splits import assign_validation, of_one_patient
from xray_fastai.system.errors import ImageError, UserError
from xray_fastai.system.progress import track
from xray_fastai.system.text import count_of

PHANTOM_NAME = "built-in phantom"
"""The displayed name of the X-rays that the package draws."""
DEFAULT_FOLDER = "chest_xray"
ARCHITECTURE = "resnet50"
DEFAULTS = {"weights": "imagenet", "size": 224, "batch_size": 80, "lr": 2e-3, "patience": 20, "min_delta": 0.0}
REHEARSAL = {"weights": "none", "size": 48, "batch_size": 16, "lr": 1e-3, "patience": 4, "min_delta": 0.1}
"""The defaults of options by data: of images that the user has, and of drawn ones.

A rehearsal starts from random weights and should end in minutes on two cores without bf16. From scratch, a ResNet50
learns by steps rather than by images, so it takes many small ones. Without `min_delta`, the loss falls a little for
many more epochs. With it, seeds 42, 1 and 2 end after 11, 10 and 13 epochs, with a test AUC of 0.999, 0.987 and 0.996.
"""


@dataclass(frozen=True)
class Collection:
    """The images of a fit.

    `table` has one row for each image. Its columns are path, file (relative to the root), label, split, patient,
    is_valid, the fields of `image_facts.Facts`, and image (a number, equal for files that show the same image).
    """

    name: str
    rehearsal: bool  # the images are the X-rays that the package draws
    classes: list[str]
    positive: str | None
    table: pd.DataFrame
    notes: list[str]
    skipped: list[str]  # the errors of the files that `skip_bad` left out

    @property
    def train(self) -> pd.DataFrame:
        return self.table[~self.table.is_valid]

    @property
    def valid(self) -> pd.DataFrame:
        return self.table[self.table.is_valid]


def read_collection(config: FitConfig) -> tuple[FitConfig, Collection]:
    """Read and check the images of a fit. The test split is not read.

    Returns:
        The settings, completed by `with_data_defaults` and `with_weights_of`, and the images.

    Raises:
        UserError: the folder is not such a collection, or an image cannot be read.
    """
    config = with_data_defaults(config)
    data = _read_collection(config)
    return config.with_weights_of(data.classes, data.positive), data


def with_data_defaults(config: FitConfig) -> FitConfig:
    """Fill in the settings that depend on the data. Without a data folder (`data` None) the fit is a rehearsal."""
    config = config.with_choices(data=default_data(), arch=ARCHITECTURE)
    config = config.with_choices(**(REHEARSAL if config.data is None else DEFAULTS))
    return config.with_choices(freeze_epochs=config.epochs)


def default_data() -> str | None:
    """Return the data folder to use if none is given: ./chest_xray, or None for the X-rays that the package draws."""
    return DEFAULT_FOLDER if Path(DEFAULT_FOLDER).is_dir() else None


def _read_collection(config: FitConfig) -> Collection:
    rehearsal = config.data is None
    root = cached() if rehearsal else find_root(config.data)
    rule = patient_rule(config.patient_pattern, config.patients)
    train = read_split(root, "train", rule=rule)
    classes = sorted(train.label.unique())
    check_classes(classes)
    positive = positive_class(classes, config.positive)
    config.with_weights_of(classes, positive)  # a fault is found before the files are read
    val = None
    if config.valid == "folder" or (config.valid == "auto" and (root / "val").is_dir()):
        val = read_split(root, "val", classes, rule)
    table = numbered(pd.concat([train, val], ignore_index=True))
    check_listed(table, config.patients)
    exclusions = []
    if config.exclude is not None:
        table, exclusions = leave_out(table, root, config.exclude)
    table, skipped = check_files(table, skip_bad=config.skip_bad)
    parts = {split: rows.reset_index(drop=True) for split, rows in table.groupby("split")}
    table, line, leaking = assign_validation(parts["train"], parts.get("val"), config.valid, config.seed)
    notes = [line, *of_one_patient(table), *filter(None, [note_on(table)]), *exclusions]
    if others := count_other_files(root, sorted(parts)):
        notes.append(f"not read, as their names are no images': {count_of(others, 'file')}; data check names them")
    if leaking:
        notes.append(f"left out of training: {leaking} images whose patient, or a copy, is in val/")
    if skipped:
        notes.append(f"left out, as they cannot be read: {count_of(len(skipped), 'image')}")
    name = PHANTOM_NAME if rehearsal else str(root)
    return Collection(name, rehearsal, classes, positive, table, notes, skipped)


def fingerprint(data: Collection) -> dict:
    """Return what identifies the images and their split: counts, and a SHA-256 over names, labels and contents."""
    digest = hashlib.sha256()
    for row in data.table[["file", "label", "patient", "digest", "is_valid"]].itertuples(index=False):
        digest.update(repr(tuple(map(str, row))).encode())
    return {"train": len(data.train), "valid": len(data.valid), "sha256": digest.hexdigest()}


def find_root(data: str | Path, split: str = "train") -> Path:
    """Find the folder that holds `split`: `data` itself, or `chest_xray` or `chest_xray/chest_xray` in it.

    Raises:
        UserError: `data` is missing or a file, or none of these folders has the split.
    """
    data = Path(os.path.expanduser(data))
    try:
        return _find_root(data, split)
    except OSError as error:  # a name too long, or no permission
        raise UserError(f"cannot be read ({error.strerror}); give another folder", option="data", value=data) from None


def _find_root(data: Path, split: str) -> Path:
    layout = f"expected folders such as {split}/NORMAL and {split}/PNEUMONIA in it"
    if not data.exists():
        raise UserError(f"no such folder; {layout}", option="data", value=data)
    if not data.is_dir():
        raise UserError(f"a file, not a folder; give the folder that holds {split}/", option="data", value=data)
    for root in (data, data / "chest_xray", data / "chest_xray" / "chest_xray"):
        if (root / split).is_dir():
            return root
    entries = sorted(entry.name for entry in data.iterdir() if not is_hidden(entry.name))
    if not entries:
        raise UserError(f"the folder is empty; {layout}", option="data", value=data)
    raise UserError(f"no {split}/ in it (it has {', '.join(entries[:5])}); {layout}", option="data", value=data)


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
    folders = [folder for split in splits for folder in class_folders(root / split)]
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
        split: train, val or test.
        classes: the classes that the split must have; it must have no others. None accepts any two or more classes.
        rule: the user's list of patients and regular expression.
        partial: some of `classes` may be missing or empty, as in a split to evaluate on.

    Returns:
        A table with one row for each image: `path`, `file` (relative to `root`), `label`, `split`, `patient` (from
        `patients.patients_in`; call `numbered` on the table of all splits).

    Raises:
        UserError: the split or a class is missing or empty, or the split has fewer or other classes.
    """
    folder = root / split
    if not folder.is_dir():
        raise UserError("no such folder", value=folder)
    images = list_split(folder)
    check_split(folder, images, classes, partial)
    spelled = {class_of(label): label for label in classes or ()}
    rows = [
        (str(folder / name), f"{split}/{name}", spelled.get(label, label), split)
        for label, names in sorted(images.items())
        for name in names
    ]
    table = pd.DataFrame(rows, columns=["path", "file", "label", "split"])
    return table.assign(patient=patients_in(table, rule))


def check_files(table: pd.DataFrame, *, skip_bad: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """Decode every file once, so that a bad or blank file is found before the training.

    Returns:
        The table with the fields of `image_facts.Facts` and a column `image`, a number that is equal for identical and
        near-identical images; and the errors of the rows that `skip_bad` left out.

    Raises:
        UserError: a file cannot be read and `skip_bad` is off, or a class has no readable file left.
    """
    facts = [
        _unless_blank(path, item)
        for path, item in zip(table.path, track(examine_all(table.path), "reading", len(table)), strict=True)
    ]
    errors = [str(item) for item in facts if isinstance(item, ImageError)]
    if errors and not skip_bad:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}; repair or remove it, or leave out such files by skip_bad=True")
    kept = with_facts(table, facts)
    for split, label in {(s, c) for s, c in zip(table.split, table.label, strict=True)}:
        if not ((kept.split == split) & (kept.label == label)).any():
            raise UserError(f"{split}/{label}: no readable image in it; the first error: {errors[0]}")
    return kept.assign(image=same_image(kept)), errors


def _unless_blank(path: str, facts: Facts | ImageError) -> Facts | ImageError:
    try:
        if isinstance(facts, Facts):
            check_not_blank(facts.contrast)
    except ImageError as error:
        return ImageError(error.message, value=path)
    return facts


def with_facts(table: pd.DataFrame, facts: Sequence[Facts | ImageError]) -> pd.DataFrame:
    """Return the readable rows of a table, with a column for each field of their facts."""
    readable = [isinstance(item, Facts) for item in facts]
    names = [field.name for field in fields(Facts)]
    values = [[getattr(item, name) for name in names] for item in facts if isinstance(item, Facts)]
    kept = table[readable].reset_index(drop=True)
    return kept.assign(**pd.DataFrame(values, columns=names))
