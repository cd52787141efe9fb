"""Check splits and classes: missing, empty, too small, or with the same image or patient in two of them."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from scipy.stats import binomtest

from xray_fastai.data.audit.findings import File, Finding
from xray_fastai.data.audit.shortcuts import Shortcut
from xray_fastai.data.dicom.reader import FORMAT as DICOM
from xray_fastai.data.folders import SPELLINGS, note_on_unused
from xray_fastai.data.images import EXTENSIONS
from xray_fastai.data.patients import ADVICE, CAUSE, source_of, unknown
from xray_fastai.data.splits import ENOUGH_TO_VALIDATE
from xray_fastai.system.text import count_of

KEPT_FIRST = ("test", "val", "train", "")
"""Of copies in several splits, the one in the first of these splits stays, so that a test set does not change."""
FEW = 100
"""A class with fewer images than this gives a figure that says little: the 95 % interval of a sensitivity of 90 out of
100 is 0.83 to 0.94."""
IMBALANCE = 3.0  # ratio of the largest class to the smallest


def layout(labels: Mapping[str, Sequence[str]], table: pd.DataFrame, images: pd.DataFrame) -> list[Finding]:
    """Find splits and classes that are missing, empty or surplus.

    Args:
        labels: the classes that each split names, also those without an image.
        table: all images.
        images: those that can be read.
    """
    findings, splits = [], tuple(labels)
    if "train" not in splits:
        text, advice = "there is no train/", "a fit needs train/CLASS/*"
        if splits == ("",):
            text += f", but folders of classes: {', '.join(labels[''])}"
            advice = "divide the patients: xray-fastai data split makes train/ and test/ of them"
        findings.append(Finding("error", "no-train", text, advice))
    first = splits[0]
    classes = labels[first]
    if len(classes) < 2:
        findings.append(
            Finding(
                "error",
                "one-class",
                f"{first}/ has {count_of(len(classes), 'class folder')}",
                "give one folder for each of two or more classes, such as NORMAL and PNEUMONIA",
            )
        )
    for split in splits:
        for label in labels[split]:
            of_class = (table.split == split) & (table.label == label)
            if not of_class.any():
                text, advice = "no image in it", f"put images into it ({' '.join(EXTENSIONS)}), or remove the folder"
            elif not ((images.split == split) & (images.label == label)).any():
                text, advice = "no readable image in it", "give images that can be read"
            else:
                continue
            findings.append(Finding("error", "empty-class", f"{Path(split, label)}: {text}", advice))
        if split == first:
            continue
        if surplus := sorted(set(labels[split]) - set(classes)):
            text = f"{split}/ holds class {', '.join(surplus)}, which {first}/ does not"
            findings.append(Finding("error", "surplus-class", text, "use the same class folders in each split"))
        if missing := sorted(set(classes) - set(labels[split])):
            text = f"{split}/ has no class {', '.join(missing)}"
            advice = "use the same class folders in each split"
            if split == "test":
                advice += "; metrics of both classes (specificity, AUC) cannot be measured"
            findings.append(Finding("error" if split == "val" else "warning", "missing-class", text, advice))
    return findings


def unused(folders: Sequence[str]) -> list[Finding]:
    """Report folders beside the splits that look like splits, and that no command reads."""
    advice = f"name a split {', '.join(names[0] for names in SPELLINGS.values())}, or give the folder by itself"
    return [Finding("warning", "not-used", note, f"{advice}: evaluate --data") for note in note_on_unused(folders)]


COPIES = {  # by kind: severity, text, advice
    "two-classes": (
        "error",
        "the same image is in more than one class",
        "one of its labels is wrong: find out which; --fix leaves all of them out",
    ),
    "two-splits": (
        "error",
        "the same image is in more than one split",
        "results on it would be too good: --fix leaves out the copies in train/ (then val/), and keeps those in test/",
    ),
    "two-patients": (
        "warning",
        "the same image belongs to two patients",
        "check the names; fit keeps copies on one side, --fix leaves out all but the first",
    ),
    "copies": (
        "remark",
        "the same image is there more than once, in one class, split and patient",
        "harmless to validation (fit keeps copies on one side); --fix leaves out all but the first",
    ),
}


def copies(images: pd.DataFrame) -> list[Finding]:
    """Find files that show the same image: in two classes, in two splits, of two patients, or only twice."""
    files_of, identical = defaultdict(list), Counter()  # by kind
    order = images.split.map(KEPT_FIRST.index)
    for _, rows in images.assign(order=order)[images.image.duplicated(keep=False)].groupby("image"):
        rows = rows.sort_values(["order", "file"])
        kept = rows.iloc[0]
        kind = "copies"
        for column, name in (("label", "two-classes"), ("split", "two-splits"), ("patient", "two-patients")):
            if rows[column].nunique() > 1:
                kind = name
                break
        for row in rows.itertuples():
            twin = kept if row.file != kept.file else rows.iloc[1]
            same_bytes = row.digest == twin.digest
            identical[kind] += same_bytes
            detail = f"{'identical to' if same_bytes else 'shows the same as'} {twin.file}"
            leave_out = kind == "two-classes" or row.file != kept.file
            files_of[kind].append(File(row.file, detail, leave_out=leave_out))
    findings = []
    for kind, (severity, text, advice) in COPIES.items():
        if files := files_of[kind]:
            rest = ", the others near-identical"
            same = "identical" if identical[kind] == len(files) else f"{identical[kind]:,} of them identical{rest}"
            text = f"{text}: {count_of(len(files), 'file')}, {same}"
            findings.append(Finding(severity, kind, text, advice, files))
    return findings


def patients(images: pd.DataFrame, patient_pattern: str | None) -> list[Finding]:
    """Find patients in more than one split, and images without a known patient."""
    findings = []
    named = images[~unknown(images)]
    if missing := len(images) - len(named):
        where = "names or DICOM headers" if (images.format == DICOM).any() else "names"
        findings.append(
            Finding(
                "warning" if missing == len(images) else "remark",
                "no-patient",
                f"no patient in the {where} of {missing:,} of {len(images):,} images: each counts as one patient",
                f"{ADVICE}, here and in fit; otherwise images of one patient may be in training and in validation",
            )
        )
    elif len(images) > 1 and named.patient.nunique() == 1:
        return [
            Finding(
                "error",
                "one-patient",
                f"all {len(images):,} images are of one patient, by {source_of(named.patient.iloc[0])}",
                f"none can be held out for validation or test; if that is wrong, {ADVICE}, here and in fit",
            )
        ]
    shared, numbers = [], []  # files of patients in two splits, and one file for each number in two splits
    leaking = 0  # patients in two splits
    for patient, rows in named[named.groupby("patient").split.transform("nunique") > 1].groupby("patient"):
        causes = rows.file.map(lambda file: match.group(1) if (match := CAUSE.search(Path(file).name)) else "")
        by_split = rows.split.groupby(causes.to_numpy()).nunique()
        where = ", ".join(f"{n:,} in {split}/" for split, n in rows.split.value_counts().items())
        by_name = patient_pattern is None and source_of(patient) == "the file names"
        if by_name and "" not in by_split.index and by_split.max() == 1:
            numbers += [File(file, f"{patient}: {where}") for file in rows.file[:1]]
        else:
            leaking += 1
            kept = min(rows.split, key=KEPT_FIRST.index)
            shared += [File(row.file, f"{patient}: {where}", leave_out=row.split != kept) for row in rows.itertuples()]
    if shared:
        findings.append(
            Finding(
                "error",
                "patient-in-two-splits",
                f"{count_of(leaking, 'patient')} with images in more than one split: {count_of(len(shared), 'image')}",
                "results on them would be too good: --fix leaves them out of train/ (then val/), not of test/",
                shared,
            )
        )
    if numbers:
        findings.append(
            Finding(
                "remark",
                "number-in-two-splits",
                f"{count_of(len(numbers), 'patient number')} in more than one split, but never with the same cause "
                "(bacteria, virus)",
                "in the Kaggle collection these may be different children, which is not documented; nothing to do",
                numbers,
            )
        )
    return findings


SHORTCUTS = {  # by the names of `shortcuts.FEATURES`: text, advice
    "form": (
        "size, shape and channels of the files alone tell the classes apart",
        "a network does not see the size, since images are squashed to a square, but it sees distortion and sharpness: "
        "crop both classes to one shape, check with interpret where it looks, and test on images from elsewhere",
    ),
    "coding": (
        "the file format and JPEG quality alone tell the classes apart",
        "a network may see the traces of JPEG: encode both classes again from their sources in one way, check with "
        "interpret where it looks, and test on images from elsewhere",
    ),
    "detail": (
        "the number of bytes a pixel alone tells the classes apart",
        "one class is sharper, noisier or darker around the body, because of the disease or of how it was taken and "
        "saved: check with interpret where a network looks, and test on images from elsewhere",
    ),
}


def shortcuts(found: dict[str, Shortcut]) -> list[Finding]:
    """Report features of the files that tell the classes apart without the content of the images."""
    return [
        Finding(
            "warning",
            f"shortcut-{name}",
            f"{SHORTCUTS[name][0]}: {shortcut}; {shortcut.images:,} images, cross-validated",
            SHORTCUTS[name][1],
        )
        for name, shortcut in found.items()
        if shortcut.alarming
    ]


def precision_of(images: int) -> str:
    """Say how precisely a sensitivity can be measured on so many images: the 95 % interval of one of about 0.9.

    The interval is that of Wilson (Probable inference, JASA 1927).
    """
    detected = round(0.9 * images)
    interval = binomtest(detected, images).proportion_ci(method="wilson")
    return (
        f"if {detected} of {images} are detected, the sensitivity is {interval.low:.2f} to {interval.high:.2f} (95 %)"
    )


def sizes_of_splits(images: pd.DataFrame, splits: tuple[str, ...]) -> list[Finding]:
    """Find splits that are too small for their use, and classes of very different sizes."""
    findings = []
    for split in splits:
        counts = images[images.split == split].label.value_counts()
        if counts.empty:
            continue
        fewest, label = int(counts.min()), counts.idxmin()
        enough = ENOUGH_TO_VALIDATE if split == "val" else FEW
        if fewest < enough:
            text = f"{Path(split, label)} has {count_of(fewest, 'image')}, fewer than {enough}"
            advice = {
                "train": "little to learn from: add images, or start from pretrained weights",
                "val": f"{precision_of(fewest)}: fit adds a tenth of train/, by patient, unless --valid folder",
                "test": f"{precision_of(fewest)}: add images, or give the interval with every figure",
                "": "little to learn from: add images, or start from pretrained weights",
            }[split]
            findings.append(Finding("remark" if split == "val" else "warning", "few-images", text, advice))
        if counts.max() > IMBALANCE * fewest and split in ("train", ""):
            text = f"{counts.max() / fewest:.1f} times as many {counts.idxmax()} as {label}, {split or 'in all'}"
            advice = "fit weights the loss by class; accuracy is misleading here: use balanced accuracy"
            findings.append(Finding("remark", "imbalance", text, advice))
    if "train" in splits:
        for split, use in (("val", "fit holds out a tenth of train/, by patient"), ("test", "evaluate needs one")):
            if split not in splits:
                advice = (
                    "nothing to do"
                    if split == "val"
                    else "put patients that are not in train/ into test/, or run xray-fastai data split"
                )
                findings.append(Finding("remark", "no-split", f"there is no {split}/: {use}", advice))
    return findings
