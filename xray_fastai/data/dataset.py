"""Split folders become a table (path, label, split, patient), and the table a fastai `DataBlock` and `DataLoaders`.

The layout is the Kaggle collection's: `DIR/{train,val,test}/CLASS/*`. What is odd in its archive (a second
`chest_xray/chest_xray`, `__MACOSX`, `.DS_Store`, extensions in capitals) is taken as it comes.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from xray_fastai.config import FitConfig, check_classes
from xray_fastai.data.duplicates import same_image
from xray_fastai.data.exclusions import read_list
from xray_fastai.data.image_facts import Facts, examine_all
from xray_fastai.data.images import EXTENSIONS, is_hidden, is_image_file
from xray_fastai.data.patients import numbered, patients_in
from xray_fastai.data.sources.phantom import cached
from xray_fastai.data.splits import assign_validation
from xray_fastai.system.errors import ImageError, UserError
from xray_fastai.system.progress import track
from xray_fastai.system.text import count_of

REHEARSAL = "built-in phantom"
"""The name of the collection that the package draws itself."""


@dataclass(frozen=True)
class Collection:
    """The images of a fit.

    `table` has an image a row: path, file (relative to the root), label, split, patient, is_valid, what `facts.Facts`
    has, and image (a number, equal for files that show the same).
    """

    name: str
    classes: list[str]
    positive: str | None
    table: pd.DataFrame
    notes: list[str]
    skipped: list[str]  # what is wrong with each file that `skip_bad` left out

    @property
    def rehearsal(self) -> bool:
        return self.name == REHEARSAL

    @property
    def train(self) -> pd.DataFrame:
        return self.table[~self.table.is_valid]

    @property
    def valid(self) -> pd.DataFrame:
        return self.table[self.table.is_valid]


def read_collection(config: FitConfig) -> tuple[FitConfig, Collection]:
    """Read and check the images of a fit; `test` is never looked at.

    Returns:
        The settings, with what they left to the kind of data filled in, and the images.

    Raises:
        UserError: the folder is not such a collection, or an image can't be read; by name.
    """
    data = config.data
    if data is None and Path("chest_xray").is_dir():
        data = "chest_xray"
    if data is None:
        root = cached()
        config = config.with_choices(weights="none", size=64)
    else:
        root = find_root(data)
        config = config.with_choices(data=data, weights="imagenet", size=224)
    config = config.with_choices(freeze_epochs=config.epochs)
    train = read_split(root, "train", patient_pattern=config.patient_pattern)
    classes = sorted(train.label.unique())
    check_classes(classes)
    positive = positive_class(classes, config.positive)
    config.check_class_weights(classes)
    val = None
    if config.valid == "folder" or (config.valid == "auto" and (root / "val").is_dir()):
        val = read_split(root, "val", classes, config.patient_pattern)
    table = numbered(pd.concat([train, val], ignore_index=True))
    listed = []
    if config.exclude is not None:
        table, listed = leave_out(table, root, config.exclude)
    table, bad = check_files(table, skip_bad=config.skip_bad)
    parts = {split: rows.reset_index(drop=True) for split, rows in table.groupby("split")}
    table, line, leaking = assign_validation(parts["train"], parts.get("val"), config.valid, config.seed)
    notes = [line, *listed]
    if leaking:
        notes.append(f"left out of training: {leaking} images whose patient, or a copy, is in val/")
    if bad:
        notes.append(f"left out by --skip-bad: {len(bad)} images")
    return config, Collection(REHEARSAL if data is None else str(root), classes, positive, table, notes, bad)


def fingerprint(data: Collection) -> dict:
    """What tells these images, and their split, from others: counts, and a SHA-256 over names, labels and contents."""
    told = hashlib.sha256()
    for row in data.table[["file", "label", "patient", "digest", "is_valid"]].itertuples(index=False):
        told.update(repr(tuple(map(str, row))).encode())
    return {"train": len(data.train), "valid": len(data.valid), "sha256": told.hexdigest()}


def find_root(data: str | Path, split: str = "train") -> Path:
    """The folder that holds `split`: `data` itself, or a `chest_xray` (in a `chest_xray`) in it.

    Raises:
        UserError: `data` is missing, a file, or does not have the split anywhere it is looked for.
    """
    data = Path(data)
    try:
        return _find_root(data, split)
    except OSError as error:  # a name too long, or no permission
        raise UserError(f"can't be read ({error.strerror}); give another folder", option="data", value=data) from None


def _find_root(data: Path, split: str) -> Path:
    layout = f"expected {split}/NORMAL, {split}/PNEUMONIA and the like in it"
    if not data.exists():
        raise UserError(f"no such folder; {layout}", option="data", value=data)
    if not data.is_dir():
        raise UserError(f"a file, not a folder; give the folder that holds {split}/", option="data", value=data)
    for root in (data, data / "chest_xray", data / "chest_xray" / "chest_xray"):
        if (root / split).is_dir():
            return root
    inside = sorted(entry.name for entry in data.iterdir() if not is_hidden(entry.name))
    if not inside:
        raise UserError(f"the folder is empty; {layout}", option="data", value=data)
    raise UserError(f"no {split}/ in it (there is {', '.join(inside[:5])}); {layout}", option="data", value=data)


def find_images(folder: Path) -> list[str]:
    """Image files (`images.is_image_file`) below a folder, at any depth, as sorted relative paths, but hidden ones."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        found += [
            os.path.relpath(os.path.join(parent, name), folder)
            for name in files
            if not is_hidden(name) and is_image_file(os.path.join(parent, name))
        ]
    return sorted(Path(name).as_posix() for name in found)


def class_folders(folder: Path) -> list[Path]:
    """The folders in a split's folder: each is a class."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))


def read_split(
    root: Path,
    split: str,
    classes: Sequence[str] | None = None,
    patient_pattern: str | None = None,
    partial: bool = False,
) -> pd.DataFrame:
    """List one split.

    Args:
        root: the folder that holds the split's folder.
        split: train, val or test.
        classes: the classes that must be there, and no other; None takes the folders that there are, two or more.
        patient_pattern: regular expression that finds the patient in a file name; None is PatientID of DICOM files,
            and the Kaggle names'.
        partial: some of `classes` may be missing or empty, as in a split to evaluate on.

    Returns:
        A data frame, an image a row: `path`, `file` (relative to `root`), `label`, `split`, `patient` (as
        `patients.patients_in`, to be `numbered` once all splits are there).

    Raises:
        UserError: the split or a class is missing or empty, or there is a class too few or too many.
    """
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = [entry.name for entry in class_folders(folder)]
    if not found and partial:
        unlabelled = ", but images without a class" if find_images(folder) else ""
        raise UserError(
            f"{folder}: no class folders in it{unlabelled}; expected one of {', '.join(classes or ['CLASS'])}"
        )
    if classes is None:
        if len(found) < 2:
            raise UserError(
                f"{folder}: {'one class only (' + found[0] + ')' if found else 'no class folders'}; "
                "expected one folder for each of two or more classes, such as NORMAL and PNEUMONIA"
            )
        classes = found
    if surplus := sorted(set(found) - set(classes)):
        raise UserError(f"{folder}: holds class {', '.join(surplus)}; the classes known are {', '.join(classes)}")
    if (missing := sorted(set(classes) - set(found))) and not partial:
        raise UserError(f"{folder}: no folder for class {', '.join(missing)}, which train/ has")
    rows = []
    for label in sorted(set(classes) & set(found)):
        names = find_images(folder / label)
        if not names and not partial:
            raise UserError(f"{folder / label}: no image in it (looked for {' '.join(EXTENSIONS)})")
        for name in names:
            rows.append((str(folder / label / name), f"{split}/{label}/{name}", label, split))
    if not rows:
        raise UserError(f"{folder}: no image in it (looked for {' '.join(EXTENSIONS)})")
    table = pd.DataFrame(rows, columns=["path", "file", "label", "split"])
    return table.assign(patient=patients_in(table, patient_pattern))


def check_files(table: pd.DataFrame, *, skip_bad: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """Decode every file once, before hours go into training on them.

    Returns:
        The table with what `facts.Facts` has of each file and a column `image`, a number that is equal for identical
        and near-identical images; and the errors of the rows that `skip_bad` left out.

    Raises:
        UserError: a file can't be read, and `skip_bad` is off; or a class has no readable file left.
    """
    found = list(track(examine_all(table.path), "reading", len(table)))
    errors = [str(f) for f in found if isinstance(f, ImageError)]
    if errors and not skip_bad:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}; mend or remove it, or go on without it by --skip-bad")
    kept = with_facts(table, found)
    for split, label in {(s, c) for s, c in zip(table.split, table.label, strict=True)}:
        if not ((kept.split == split) & (kept.label == label)).any():
            raise UserError(f"{split}/{label}: no readable image in it; the first error: {errors[0]}")
    return kept.assign(image=same_image(kept)), errors


def with_facts(table: pd.DataFrame, found: Sequence[Facts | ImageError]) -> pd.DataFrame:
    """The readable rows of a table, with a column for each of the facts."""
    readable = [isinstance(f, Facts) for f in found]
    names = [field.name for field in fields(Facts)]
    values = [[getattr(f, name) for name in names] for f in found if isinstance(f, Facts)]
    kept = table[readable].reset_index(drop=True)
    return kept.assign(**pd.DataFrame(values, columns=names))


def leave_out(table: pd.DataFrame, root: Path, path: str) -> tuple[pd.DataFrame, list[str]]:
    """Drop the images that a list (`fixlist`) says to leave out.

    Returns:
        The rows that stay, and notes on what was done.

    Raises:
        UserError: not such a list, or it names every image of a class.
    """
    listed = read_list(path)
    dropped = table.file.isin(listed)
    kept = table[~dropped].reset_index(drop=True)
    for split, label in sorted({(s, c) for s, c in zip(table.split, table.label, strict=True)}):
        if not ((kept.split == split) & (kept.label == label)).any():
            raise UserError(f"names every image of {split}/{label}, so none is left", option="exclude", value=path)
    notes = [f"left out by --exclude: {count_of(int(dropped.sum()), 'image')}"]
    if gone := sum(not (root / file).exists() for file in listed - set(table.file)):
        notes.append(f"not there, but named by --exclude: {count_of(gone, 'file')}")
    return kept, notes


def positive_class(classes: Sequence[str], wanted: str | None = None) -> str | None:
    """The class to detect: the one wanted, PNEUMONIA where there is one, or of two the one that is not NORMAL.

    Returns:
        None where there are more than two classes, none is wanted and none is PNEUMONIA.

    Raises:
        UserError: the wanted class is not there.
    """
    if wanted is not None:
        if wanted not in classes:
            raise UserError(f"no such class; the classes are {', '.join(classes)}", option="positive", value=wanted)
        return wanted
    for name in classes:
        if name.upper() == "PNEUMONIA":
            return name
    if len(classes) == 2:
        return classes[0] if classes[1].upper() == "NORMAL" else classes[1]
    return None


def file_key(file: str) -> str:
    """A file's relative name as `model.json` knows it: the first 12 hexadecimal digits of its SHA-256.

    Enough to find the validation files again; and no file name, which may hold a patient's, goes where the model goes.
    """
    return hashlib.sha256(file.encode()).hexdigest()[:12]


def labelled_images(model: dict[str, Any], data: str | Path | None, split: str) -> pd.DataFrame:
    """The images, with their true classes, that an export is evaluated or interpreted on.

    Args:
        model: its `model.json`.
        data: the folder that holds the split; None is the one that `fit` used.
        split: train, test, or valid: exactly the files that `fit` validated on. A model's `train` is without these.

    Returns:
        As `read_split`; classes may be missing.

    Raises:
        UserError: no such folder or split, a class that the model does not know, or validation files that are gone.
    """
    if data is not None:
        root = find_root(data, "train" if split == "valid" else split)
    elif model["data"]["rehearsal"]:
        root = cached()
    else:
        root = find_root(model["settings"]["data"], "train" if split == "valid" else split)
    pattern = model["settings"]["patient_pattern"]
    if split == "test":
        return numbered(read_split(root, "test", model["classes"], pattern, partial=True))
    keys = set(model["data"]["valid_files"])
    parts = [read_split(root, "train", model["classes"], pattern, partial=True)]
    if split == "valid" and (root / "val").is_dir():
        parts.append(read_split(root, "val", model["classes"], pattern, partial=True))
    table = numbered(pd.concat(parts, ignore_index=True))
    validated = table.file.map(file_key).isin(keys)
    if split == "train":
        return table[~validated].reset_index(drop=True)
    if validated.sum() < len(keys):
        raise UserError(
            f"{root}: {len(keys) - validated.sum()} of the {len(keys)} files that fit validated on are not there; "
            "give the folder that it used by --data"
        )
    return table[validated].reset_index(drop=True)
