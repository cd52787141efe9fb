"""Find what is wrong with a data set before the training: `check_data`, and `fit_notes` for the images of a fit.

Every finding has a severity. An error would spoil a result: a fit refuses the data, or a figure would mean less than it
says. A warning needs a look. A remark is good to know.
"""

import os
import time
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import pandas as pd

from xray_fastai.data.audit import file_checks, split_checks
from xray_fastai.data.audit.findings import SPLITS, Audit, File, Finding
from xray_fastai.data.audit.shortcuts import find_shortcuts
from xray_fastai.data.dataset import PHANTOM_NAME, Collection, default_data, with_facts
from xray_fastai.data.duplicates import same_image
from xray_fastai.data.folders import class_folders, class_of, find_images, find_root, split_folder, unused_folders
from xray_fastai.data.image_facts import examine_all
from xray_fastai.data.images import is_hidden, is_image_file, walk
from xray_fastai.data.patients import PatientRule, check_listed, numbered, patient_rule, patients_in
from xray_fastai.data.sources.phantom import cached
from xray_fastai.data.splits import ENOUGH_TO_VALIDATE
from xray_fastai.data.table import Data, Source, check_for_table, is_table, name_of, read_table, with_patients
from xray_fastai.data.table_columns import Column
from xray_fastai.data.table_labels import Naming
from xray_fastai.system.errors import UserError
from xray_fastai.system.progress import track
from xray_fastai.system.text import count_of, shown


def check_data(
    data: Data | None = None,
    patient_pattern: str | None = None,
    *,
    patients: str | None = None,
    images: str | Path | None = None,
    column: Column = None,
    positive: str | None = None,
) -> Audit:
    """Check every file of a data set.

    Args:
        data: the folder with train/CLASS/* (and val, test). None is ./chest_xray if it exists, else the phantom. A
            folder of classes without splits is checked as well; the missing train/ is then one of the findings. Or a
            table of images, a .csv file or a data frame (`data.table`).
        patient_pattern: regular expression that finds the patient in a file name; None takes PatientID in DICOM
            files, then the names of public collections.
        patients: a .csv file with the columns file and patient.
        images: the folder of the images of a table; None is the one that holds the table.
        column: the headers of a table's columns, as in {"label": "Finding"}; None finds them by their names.
        positive: the class that 1 means, or the finding to detect, in a table.

    Returns:
        The findings: `print(audit)`, `audit.ok`, `audit.findings`, `audit.to_dict()`, `audit.write_fix("LIST.csv")`.

    Raises:
        UserError: the folder is missing, or holds nothing that could be a data set.

    Examples:
        >>> audit = check_data("chest_xray")
        >>> [finding.text for finding in audit.of("error")]
        []
    """
    started = time.perf_counter()
    if data is None:
        data = default_data()
    check_for_table(data, images, column)
    rule = patient_rule(patient_pattern, patients)
    if data is not None and is_table(data):
        listed = _listed_table(Source(data, images, column, Naming(positive)), rule)
    else:
        listed = _listed_folders(data, rule)
    check_listed(listed.table, patients)
    facts = list(track(examine_all(listed.table.path), "reading", len(listed.table)))
    readable = with_facts(listed.table, facts)
    readable["image"] = same_image(readable)
    shortcuts = find_shortcuts(readable[readable.split == "train"] if "train" in listed.labels else readable)
    findings = [
        *split_checks.layout(listed.labels, listed.table, readable),
        *listed.findings,
        *file_checks.unreadable(listed.table, facts),
        *split_checks.copies(readable),
        *split_checks.patients(readable, patient_pattern),
        *split_checks.shortcuts(shortcuts),
        *split_checks.sizes_of_splits(readable, tuple(listed.labels)),
        *file_checks.odd_images(readable),
        *file_checks.conversions(readable),
        *file_checks.other_files(listed.others),
    ]
    seconds = time.perf_counter() - started
    return Audit(PHANTOM_NAME if data is None else name_of(data), listed.root, readable, findings, shortcuts, seconds)


@dataclass(frozen=True)
class _Listing:
    """The files of a data set as folders or a table name them."""

    root: Path  # the files are relative to it
    table: pd.DataFrame  # as of `folders.read_split`
    labels: dict[str, list[str]]  # the classes of each split, also those without an image
    others: pd.DataFrame  # files in folders that are no images
    findings: list[Finding]


def _listed_folders(data: str | Path | None, rule: PatientRule) -> _Listing:
    root, splits = (cached(), SPLITS[:3]) if data is None else _find_splits(data)
    listed = pd.concat([_files_in(root, split) for split in splits], ignore_index=True)
    is_image = ~listed.hidden & (listed.label != "") & listed.path.map(is_image_file)
    table = listed[is_image].drop(columns="hidden").reset_index(drop=True)
    table = numbered(table.assign(patient=patients_in(table, rule)))
    labels = {split: _classes_in(root, split) for split in splits}
    classes = {label for of_split in labels.values() for label in of_split}
    unused = unused_folders(root, SPLITS[:3], classes) if splits != ("",) else []
    return _Listing(root, table, labels, listed[~is_image], split_checks.unused(unused))


FAULTS = {  # by kind (`table.Fault`): severity, advice
    "no-file": ("warning", "such rows are left out: correct the names, or give the folder by --images"),
    "several-files": ("warning", "such rows are left out: write the path below the folder of the images"),
    "no-name": ("warning", "such rows are left out"),
    "no-label": ("warning", "such rows are left out: give a label, or remove them"),
    "uncertain-label": ("remark", "such rows are left out"),
    "unknown-label": ("warning", "such rows are left out"),
    "unknown-split": ("warning", "such rows are left out: name a split train, val or test"),
    "conflict": ("error", "such files are left out: one of the rows is wrong"),
    "repeated": ("remark", "nothing to do"),
    "no-row": ("remark", "such files are left out: add rows, or ignore them"),
}


def _listed_table(source: Source, rule: PatientRule) -> _Listing:
    listing = read_table(source)
    table = with_patients(listing.table, listing, rule)
    labels = {
        split: sorted(table.label[table.split == split].unique()) for split in SPLITS[:3] if split in set(table.split)
    }
    findings = []
    if listing.notes:
        text = "; ".join(listing.notes)
        findings.append(Finding("remark", "columns", text, "if this is wrong, name the columns by --column"))
    for fault in listing.faults:
        if fault.kind in FAULTS:  # others are found by the images, too
            severity, advice = FAULTS[fault.kind]
            values = [] if fault.examples == fault.files[: len(fault.examples)] else fault.examples
            text = ": ".join(filter(None, [fault.text, ", ".join(map(shown, values))]))
            findings.append(Finding(severity, fault.kind, text, advice, [File(name) for name in fault.files]))
    return _Listing(source.root, table, labels, pd.DataFrame(columns=["path", "file", "label", "hidden"]), findings)


def fit_notes(data: Collection) -> list[str]:
    """Return at most four lines on the findings that matter most for a fit, from the facts that it has read.

    They name no file.
    """
    notes, table = [], data.table
    copies = table.groupby("image")
    conflict = copies.label.transform("nunique") > 1
    if conflict.any():
        notes.append(f"same image under two classes: {count_of(int(conflict.sum()), 'file')}; data check names them")
    strangers = (copies.patient.transform("nunique") > 1) & ~conflict
    if strangers.any():
        notes.append(f"same image under two patients: {count_of(int(strangers.sum()), 'file')}, kept on one side")
    for name, shortcut in find_shortcuts(table).items():
        if shortcut.alarming:
            text = split_checks.SHORTCUTS[name][0]
            notes.append(f"{text}: AUC {shortcut.auc.value:.2f}; data check says more")
    fewest = (data.table if data.has_folds else data.valid).label.value_counts().min()
    if fewest < ENOUGH_TO_VALIDATE:
        notes.append(f"few validation images: {fewest} of a class; {split_checks.precision_of(fewest)}")
    return notes[:4]


def _find_splits(data: str | Path) -> tuple[Path, tuple[str, ...]]:
    """Find the folder that holds the splits, and the splits in it; ("",) if it holds classes without splits."""
    try:
        root = find_root(data)
    except UserError:
        for split in SPLITS[1:3]:
            try:
                root = find_root(data, split)
                break
            except UserError:
                continue
        else:
            root = Path(data)
            if root.is_dir():
                for split in SPLITS[:3]:
                    split_folder(root, split)  # two folders for one split are no classes
            if root.is_dir() and any(find_images(folder) for folder in class_folders(root)):
                return root, ("",)
            raise
    return root, tuple(split for split in SPLITS[:3] if split_folder(root, split) is not None)


def _classes_in(root: Path, split: str) -> list[str]:
    folder = split_folder(root, split)
    return sorted({class_of(entry.name) for entry in class_folders(folder)}) if folder else []


def _files_in(root: Path, split: str) -> pd.DataFrame:
    """List all files of a split.

    Returns:
        The columns of `dataset.read_split`, with `hidden` instead of `patient`. The label of a file outside the class
        folders is "".
    """
    rows, base = [], split_folder(root, split) or root

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot be read ({error.strerror})", value=error.filename) from None

    outside = islice(walk(base, refuse), 1)
    folders = sorted(entry for entry in base.iterdir() if entry.is_dir())
    # each by itself, as a fit reads them: a link to another class's folder gives its files a second class
    for parent, files in chain(outside, *(walk(entry, refuse, hidden=True) for entry in folders)):
        inside = Path(parent).relative_to(base).parts
        if not split and not inside:  # files beside class folders are not part of the data set
            continue
        for name in files:
            file = Path(parent, name).relative_to(root).as_posix()
            hidden = any(map(is_hidden, (*inside, name)))
            label = class_of(inside[0]) if inside else ""
            rows.append((os.path.join(parent, name), file, label, split, hidden))
    return pd.DataFrame(rows, columns=["path", "file", "label", "split", "hidden"])
