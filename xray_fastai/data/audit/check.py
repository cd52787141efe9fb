"""Find what is wrong with a data set before the training: `check_data`, and `fit_notes` for the images of a fit.

Every finding has a severity. An error would spoil a result: a fit refuses the data, or a figure would mean less than it
says. A warning needs a look. A remark is good to know.
"""

import os
import time
from itertools import chain, islice
from pathlib import Path

import pandas as pd

from xray_fastai.data.audit import file_checks, split_checks
from xray_fastai.data.audit.findings import SPLITS, Audit
from xray_fastai.data.audit.shortcuts import find_shortcuts
from xray_fastai.data.dataset import (
    PHANTOM_NAME,
    Collection,
    class_folders,
    class_of,
    default_data,
    find_images,
    find_root,
    with_facts,
)
from xray_fastai.data.duplicates import same_image
from xray_fastai.data.image_facts import examine_all
from xray_fastai.data.images import is_hidden, is_image_file, walk
from xray_fastai.data.patients import check_listed, numbered, patient_rule, patients_in
from xray_fastai.data.sources.phantom import cached
from xray_fastai.data.splits import ENOUGH_TO_VALIDATE
from xray_fastai.system.errors import UserError
from xray_fastai.system.progress import track
from xray_fastai.system.text import count_of


def check_data(
    data: str | Path | None = None, patient_pattern: str | None = None, *, patients: str | None = None
) -> Audit:
    """Check every file of a data set.

    Args:
        data: the folder with train/CLASS/* (and val, test). None is ./chest_xray if it exists, else the phantom. A
            folder of classes without splits is checked as well; the missing train/ is then one of the findings.
        patient_pattern: regular expression that finds the patient in a file name; None takes PatientID in DICOM
            files, then the names of public collections.
        patients: a .csv file with the columns file and patient.

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
    root, splits = (cached(), SPLITS[:3]) if data is None else _find_splits(data)
    listed = pd.concat([_listed(root, split) for split in splits], ignore_index=True)
    is_image = ~listed.hidden & (listed.label != "") & listed.path.map(is_image_file)
    table = listed[is_image].drop(columns="hidden").reset_index(drop=True)
    table = numbered(table.assign(patient=patients_in(table, patient_rule(patient_pattern, patients))))
    check_listed(table, patients)
    facts = list(track(examine_all(table.path), "reading", len(table)))
    images = with_facts(table, facts)
    images["image"] = same_image(images)
    shortcuts = find_shortcuts(images[images.split == "train"] if "train" in splits else images)
    findings = [
        *split_checks.layout(root, splits, table, images),
        *file_checks.unreadable(table, facts),
        *split_checks.copies(images),
        *split_checks.patients(images, patient_pattern),
        *split_checks.shortcuts(shortcuts),
        *split_checks.sizes_of_splits(images, splits),
        *file_checks.odd_images(images),
        *file_checks.conversions(images),
        *file_checks.other_files(listed[~is_image]),
    ]
    seconds = time.perf_counter() - started
    return Audit(PHANTOM_NAME if data is None else str(data), root, images, findings, shortcuts, seconds)


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
    fewest = data.valid.label.value_counts().min()
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
            if root.is_dir() and any(find_images(folder) for folder in class_folders(root)):
                return root, ("",)
            raise
    return root, tuple(split for split in SPLITS[:3] if (root / split).is_dir())


def _listed(root: Path, split: str) -> pd.DataFrame:
    """List all files of a split.

    Returns:
        The columns of `dataset.read_split`, with `hidden` instead of `patient`. The label of a file outside the class
        folders is "".
    """
    rows, base = [], root / split

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
