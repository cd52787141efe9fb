"""List the images, with their true classes, that an export is evaluated or interpreted on, and say which of them its
fit has seen (`data.image_keys`).
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from xray_fastai.config.choices import members_of
from xray_fastai.data.exclusions import leave_out
from xray_fastai.data.folders import (
    SPELLINGS,
    class_folders,
    class_of,
    find_root,
    note_on_unused,
    read_split,
    split_folder,
    split_of,
    unpacking,
    unused_folders,
)
from xray_fastai.data.image_keys import file_key, uses_in_fit
from xray_fastai.data.patients import PatientRule, check_listed, numbered, patient_rule
from xray_fastai.data.sources.phantom import cached
from xray_fastai.data.table import Data, Source, check_for_table, is_table, name_of, read_table, with_patients
from xray_fastai.data.table_columns import Column
from xray_fastai.data.table_labels import Naming
from xray_fastai.system.errors import OptionError, UserError
from xray_fastai.system.text import count_of


@dataclass(frozen=True)
class Labelled:
    """The images of a split.

    `table` is like that of `folders.read_split`, with a column `group:NAME` for each further column of a table that is
    named by `column="NAME=HEADER"`.
    """

    table: pd.DataFrame
    split: str  # that was asked for; test where the data set has no splits
    notes: list[str]  # on images that were left out, and on those that the fit has seen
    seen: dict[str, int] | None  # images by their use in the fit, train or valid; None: the export does not know it


@dataclass(frozen=True)
class Request:
    """Which images are wanted."""

    data: Data | None  # the folder that holds the split, classes without splits, or a table; None is the fit's data
    split: str | None  # train, test or valid; None: `data` itself holds the folders of the classes
    exclude: str | None = None  # a list of files to leave out (`exclusions`)
    patients: str | None = None  # a list of patients (`patients.patient_rule`); None: the fit's, if `data` is None
    images: str | Path | None = None  # the folder of the images of a table (`table.Source`)
    column: Column = None  # the columns of a table
    out_of_fold: frozenset[str] | None = None  # keys of files (`image_keys`) that `valid` is, of an ensemble on folds

    @property
    def name(self) -> str | None:
        """What to call the data; None is the data of the fit."""
        return None if self.data is None else name_of(self.data)


def has_folds(model: dict[str, Any]) -> bool:
    """Return whether each network of an ensemble left out another part of the images: none is new to all of them.

    Args:
        model: the content of the export's `model.json`.
    """
    return members_of(model) > 1 and not model["data"]["valid_files"]


def labelled_images(model: dict[str, Any], wanted: Request) -> Labelled:
    """List the images of a split.

    `valid` is exactly the files that the fit validated on, from train/ and val/. `train` is what it trained on: train/
    without these, and without what the fit left out.

    Args:
        model: the content of the export's `model.json`.
        wanted: which images. Classes may be missing.

    Raises:
        UserError: the folder or split is missing, two folders are named as it, a class is unknown to the model,
            validation files are missing, or no image is left.
    """
    contents = model["data"].get("contents")
    listed = _listed(model, wanted)
    table, root, split, notes = listed.table, listed.root, listed.split, listed.notes
    if wanted.exclude is not None:
        table, left_out = leave_out(table, root, wanted.exclude)
        notes += left_out
    uses = None if contents is None else uses_in_fit(table, contents)
    if split == "train":
        table, uses, note = _trained_on(table, uses)
        notes += note
    seen = None if uses is None else {use: int((uses == use).sum()) for use in ("train", "valid")}
    if split == "test" and seen is not None and any(seen.values()):
        notes.append(
            f"WARNING: of {count_of(len(table), 'image')}, the model was trained on {seen['train']:,} and chosen on "
            f"{seen['valid']:,}: expect less of new images"
        )
    return Labelled(table, split, notes, seen)


def split_named(text: str) -> str:
    """Return the name of a split, train, valid or test, by any of the names that its folder may have.

    Raises:
        UserError: it is none of them.
    """
    split = split_of(text)
    if split is None:
        raise OptionError("choose one of test, valid, train", option="split", value=text)
    return "valid" if split == "val" else split


@dataclass(frozen=True)
class _Listed:
    """The images as the folders name them."""

    table: pd.DataFrame
    root: Path  # the files of the table are relative to it
    split: str
    notes: list[str]


def _listed(model: dict[str, Any], wanted: Request) -> _Listed:
    """List the files of the split by their names."""
    settings = model["settings"]
    of_fit = wanted.patients is None and wanted.data is None
    rule = patient_rule(settings["patient_pattern"], settings.get("patients") if of_fit else wanted.patients)
    of_fits_table = wanted.data is None and is_table(settings["data"])
    if wanted.data is not None or not of_fits_table:
        check_for_table(wanted.data, wanted.images, wanted.column)
    if is_table(wanted.data) or of_fits_table:
        listed = _listed_table(model, wanted, rule)
    else:
        listed = _listed_folders(model, wanted, rule)
        listed = replace(listed, table=numbered(listed.table))
    check_listed(listed.table, wanted.patients)
    return _used_in_fit(model, listed, wanted.out_of_fold) if listed.split in ("train", "valid") else listed


def _listed_table(model: dict[str, Any], wanted: Request, rule: PatientRule) -> _Listed:
    """List the rows of a split; all rows of a table without splits, unless the fit has validated on some of them."""
    settings, split = model["settings"], wanted.split or "test"
    naming = Naming(model["positive"], model["classes"])
    if wanted.data is None:
        images = settings.get("images") if wanted.images is None else wanted.images
        source = Source(settings["data"], images, wanted.column or settings.get("column"), naming)
    else:
        source = Source(wanted.data, wanted.images, wanted.column, naming)
    listing = read_table(source)
    table, notes = listing.table, listing.summary
    whole = wanted.split is None or not listing.has_splits
    if whole and wanted.data is None and split == "test":
        message = "the fit's table has no column of splits, so no image is kept for testing; give other images by data="
        raise UserError(message, option="split", value=split)
    if split in ("train", "valid"):
        table = table[table.split != "test"]
        known = table.file.map(file_key).isin(model["data"]["valid_files"]).any()
        folds = wanted.data is None and has_folds(model)
        if whole and not known and not folds:
            notes.append(f"no splits in it: all images are used, not only those of {split}")
            split = "test"
    elif not whole:
        table = table[table.split == split]
    if table.empty:
        raise UserError(f"no row of split {split}", option="data", value=source.name)
    table = table.reset_index(drop=True)
    return _Listed(with_patients(table, listing, rule), source.root, split, notes)


def _listed_folders(model: dict[str, Any], wanted: Request, rule: PatientRule) -> _Listed:
    """List the files in the folder of the split; those of train/ and val/ for `valid`."""
    classes, split = model["classes"], wanted.split
    if wanted.data is not None and (split is None or _holds_classes(wanted.data, classes)):
        root, folder = _class_root(wanted.data, classes)
        notes = [] if split in (None, "test") else [f"no splits in it: all images are used, not only those of {split}"]
        return _Listed(read_split(root, folder, classes, rule, partial=True), root, "test", notes)
    split = split or "test"
    folder = "train" if split == "valid" else split
    if wanted.data is not None:
        root = find_root(wanted.data, folder, classes)
    else:
        root = cached() if model["data"]["rehearsal"] else _root_of_fit(model["settings"]["data"], folder, classes)
    parts = [read_split(root, folder, classes, rule, partial=True)]
    if split == "valid" and split_folder(root, "val") is not None:
        parts.append(read_split(root, "val", classes, rule, partial=True))
    return _Listed(
        pd.concat(parts, ignore_index=True), root, split, note_on_unused(unused_folders(root, SPELLINGS, classes))
    )


def _used_in_fit(model: dict[str, Any], listed: _Listed, out_of_fold: frozenset[str] | None) -> _Listed:
    """Keep the files that the fit validated on, for `valid`, or all others.

    Args:
        model: the content of `model.json`.
        listed: all files that may be among them.
        out_of_fold: see `Request`.

    Raises:
        UserError: there are none, or files that the fit validated on are missing.
    """
    keys = set(model["data"]["valid_files"]) if out_of_fold is None else out_of_fold
    if listed.split == "valid" and has_folds(model) and out_of_fold is None:
        raise UserError(
            "an ensemble has none: each image was left out by one network, but learnt from by the others. report.html "
            "has the figures of the network that left it out; 'xray-fastai interpret' shows its errors, if it has "
            "out_of_fold.csv; give other images by data=",
            option="split",
            value="valid",
        )
    validated = listed.table.file.map(file_key).isin(keys)
    if listed.split == "train":
        if validated.all():
            raise UserError("fit validated on all of its images; choose another split", option="split", value="train")
        return replace(listed, table=listed.table[~validated].reset_index(drop=True))
    if (missing := len(keys) - validated.sum()) > 0:
        raise UserError(
            f"{missing} of the {len(keys)} files that the fit validated on are missing; give its data folder by data=",
            value=listed.root,
        )
    return replace(listed, table=listed.table[validated].reset_index(drop=True))


def _holds_classes(data: str | Path, classes: list[str]) -> bool:
    """Return whether a folder holds no splits, but folders of the model's classes."""
    folder = Path(os.path.expanduser(data))
    if not folder.is_dir():
        return False
    names = [path.name for path in class_folders(folder)]
    return not any(map(split_of, names)) and bool({class_of(name) for name in names} & {class_of(c) for c in classes})


def _root_of_fit(recorded: str, split: str, classes: list[str]) -> Path:
    """Return the folder that holds the split in the data folder of the fit.

    Raises:
        UserError: it is not there, or lacks the split; the user has not typed it, so the message says whose it is.
    """
    try:
        return find_root(recorded, split, classes)
    except UserError as error:
        where = "" if os.path.isabs(recorded) else " from the folder in which fit ran (the export's fit.log names it)"
        raise UserError(
            f"the data folder of the fit, {recorded}{where}, cannot be used ({error.message}); give its images by data="
        ) from None


def _class_root(data: str | Path | None, classes: list[str]) -> tuple[Path, str]:
    """Return the parent and the name of a folder whose subfolders are classes of the model.

    Raises:
        UserError: there is no such folder, or it holds no class.
    """
    folder = Path(os.path.expanduser(data or ".")).resolve()
    if not folder.is_dir():
        advice = unpacking(folder) or f"no such folder; give one with the folders {', '.join(classes)}"
        raise UserError(advice, option="data", value=data)
    names = [path.name for path in class_folders(folder)]
    if not {class_of(name) for name in names} & {class_of(name) for name in classes}:
        splits = [name for name in names if (folder / name).is_dir() and class_folders(folder / name)]
        advice = f"; did you mean {Path(str(data), splits[0])}?" if splits else ""
        held = f"it has {', '.join(names[:5])}" if names else "it has no folders"
        message = f"none of the folders {', '.join(classes)} is in it ({held}){advice}"
        raise UserError(message, option="data", value=data)
    return folder.parent, folder.name


def _trained_on(table: pd.DataFrame, uses: np.ndarray | None) -> tuple[pd.DataFrame, np.ndarray | None, list[str]]:
    """Keep the images that the fit trained on; return them, their uses, and notes."""
    if uses is None:
        return table, None, ["the export does not know what fit left out: such images may be among these"]
    kept = uses == "train"
    if not kept.any():
        message = "fit trained on none of these images, as they are now; give its data folder by data="
        raise UserError(message, option="split", value="train")
    left_out = int((~kept).sum())
    notes = [f"left out, as fit did not train on them: {count_of(left_out, 'image')}"] if left_out else []
    return table[kept].reset_index(drop=True), uses[kept], notes
