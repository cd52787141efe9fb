"""What is odd about splits and classes: missing, empty, too small, or with the same image or patient in two of them."""

import math
from pathlib import Path

import pandas as pd

from xray_fastai.data.audit.findings import File, Finding
from xray_fastai.data.audit.shortcuts import Shortcut
from xray_fastai.data.dataset import class_folders
from xray_fastai.data.dicom.reader import FORMAT as DICOM
from xray_fastai.data.images import EXTENSIONS
from xray_fastai.data.patients import CAUSE, is_numbered
from xray_fastai.data.splits import ENOUGH_TO_VALIDATE
from xray_fastai.system.text import count_of

KEPT_FIRST = ("test", "val", "train", "")
"""Of copies in several splits the one in the first of these stays: a test is not to be changed after the fact."""
FEW = 100
"""Images of a class below which a figure says little: of 100 with a sensitivity of 0.9 its 95 % interval is 0.83 to
0.94."""
IMBALANCE = 3.0  # images of the largest class for one of the smallest


def layout(root: Path, splits: tuple[str, ...], table: pd.DataFrame, images: pd.DataFrame) -> list[Finding]:
    """Splits and classes that are missing, empty or too many."""
    found = []
    if "train" not in splits:
        text, advice = "there is no train/", "a fit needs train/CLASS/*"
        if splits == ("",):
            text += f", but folders of classes: {', '.join(folder.name for folder in class_folders(root))}"
            advice = "move them into a folder train/, and a part of the patients into test/CLASS/*"
        found.append(Finding("error", "no-train", text, advice))
    first = splits[0]
    classes = [folder.name for folder in class_folders(root / first)]
    if len(classes) < 2:
        found.append(
            Finding(
                "error",
                "one-class",
                f"{first}/ has {count_of(len(classes), 'class folder')}",
                "give one folder for each of two or more classes, such as NORMAL and PNEUMONIA",
            )
        )
    for split in splits:
        here = [folder.name for folder in class_folders(root / split)]
        for label in here:
            mine = (table.split == split) & (table.label == label)
            if not mine.any():
                text, advice = "no image in it", f"put images into it ({' '.join(EXTENSIONS)}), or remove the folder"
            elif not ((images.split == split) & (images.label == label)).any():
                text, advice = "no readable image in it", "give images that can be read"
            else:
                continue
            found.append(Finding("error", "empty-class", f"{Path(split, label)}: {text}", advice))
        if split == first:
            continue
        if surplus := sorted(set(here) - set(classes)):
            text = f"{split}/ holds class {', '.join(surplus)}, which {first}/ does not"
            found.append(Finding("error", "surplus-class", text, "use the same class folders in each split"))
        if missing := sorted(set(classes) - set(here)):
            text = f"{split}/ has no class {', '.join(missing)}"
            advice = "use the same class folders in each split"
            if split == "test":
                advice += "; what needs both classes (specificity, AUC) can't be measured"
            found.append(Finding("error" if split == "val" else "warning", "missing-class", text, advice))
    return found


def copies(images: pd.DataFrame) -> list[Finding]:
    """Files that show the same image: under two classes, in two splits, or merely twice."""
    kinds: dict[str, list[File]] = {"two-classes": [], "two-splits": [], "two-patients": [], "copies": []}
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
            if row.file == kept.file:
                twin, how = rows.iloc[1], "identical to" if row.digest == rows.digest.iloc[1] else "shows the same as"
            else:
                twin, how = kept, "identical to" if row.digest == kept.digest else "shows the same as"
            out = kind == "two-classes" or row.file != kept.file
            kinds[kind].append(File(row.file, f"{how} {twin.file}", leave_out=out))
    told = {
        "two-classes": (
            "error",
            "the same image is in more than one class",
            "one of its labels is wrong: find out which; --fix leaves all of them out",
        ),
        "two-splits": (
            "error",
            "the same image is in more than one split",
            "a result on it would flatter: --fix leaves out the copies in train/ (then val/), and keeps those in test/",
        ),
        "two-patients": (
            "warning",
            "the same image is there under the names of two patients",
            "see whether the names are right; fit keeps copies on one side, --fix leaves out all but the first",
        ),
        "copies": (
            "remark",
            "the same image is there more than once, in one class, split and patient",
            "harmless to validation (fit keeps copies on one side); --fix leaves out all but the first",
        ),
    }
    findings = []
    for kind, files in kinds.items():
        if files:
            severity, text, advice = told[kind]
            same = sum(file.detail.startswith("identical") for file in files)
            text += f": {count_of(len(files), 'file')}, {same:,} of them identical, the others near-identical"
            if same == len(files):
                text = text.replace(f", {same:,} of them identical, the others near-identical", ", identical")
            findings.append(Finding(severity, kind, text, advice, files))
    return findings


def patients(images: pd.DataFrame, patient_pattern: str | None) -> list[Finding]:
    """Patients in more than one split, as far as the names tell."""
    findings = []
    named = images[images.patient != images.file]
    if len(named) < len(images):
        few = len(images) - len(named)
        where = "names or DICOM headers" if (images.format == DICOM).any() else "names"
        findings.append(
            Finding(
                "warning" if few == len(images) else "remark",
                "no-patient",
                f"no patient in the {where} of {few:,} of {len(images):,} images: each counts as a patient of its own",
                "if the names hold the patient, say how by --patient-pattern, here and in fit; else images of one "
                "patient may be both trained and measured on",
            )
        )
    elif len(images) > 1 and named.patient.nunique() == 1:
        headers = is_numbered(named.patient.iloc[0])
        return [
            Finding(
                "error",
                "one-patient",
                f"all {len(images):,} images are of one patient, by {'PatientID' if headers else 'their names'}",
                "none can be held out to validate or measure on; if that is not so, tell patients by file names with "
                "--patient-pattern, here and in fit",
            )
        ]
    shared, numbers = [], []
    for patient, rows in named[named.groupby("patient").split.transform("nunique") > 1].groupby("patient"):
        causes = rows.file.map(lambda file: match.group(1) if (match := CAUSE.search(Path(file).name)) else "")
        by_split = rows.split.groupby(causes.to_numpy()).nunique()
        where = ", ".join(f"{n:,} in {split}/" for split, n in rows.split.value_counts().items())
        if patient_pattern is None and not is_numbered(patient) and "" not in by_split.index and by_split.max() == 1:
            numbers += [File(file, f"{patient}: {where}") for file in rows.file[:1]]
        else:
            left = sorted(set(rows.split), key=KEPT_FIRST.index)[0]
            shared += [File(row.file, f"{patient}: {where}", leave_out=row.split != left) for row in rows.itertuples()]
    if shared:
        count = len({file.detail.partition(":")[0] for file in shared})
        findings.append(
            Finding(
                "error",
                "patient-in-two-splits",
                f"{count_of(count, 'patient')} with images in more than one split: {count_of(len(shared), 'image')}",
                "a result on them would flatter: --fix leaves them out of train/ (then val/), and keeps them in test/",
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
                "in the Kaggle collection these may be different children: nobody has documented it; nothing to do",
                numbers,
            )
        )
    return findings


SHORTCUTS = {
    "form": (
        "size, shape and channels of the files alone tell the classes apart",
        "a network sees no size, since images are squashed to a square, but it does see distortion and sharpness: "
        "cut both classes to one shape, see by interpret where it looks, and test on images from elsewhere",
    ),
    "coding": (
        "how the files are coded alone tells the classes apart",
        "a network may see JPEG's traces: code both classes anew from their sources in one way, see by interpret where "
        "it looks, and test on images from elsewhere",
    ),
    "detail": (
        "the number of bytes a pixel alone tells the classes apart",
        "one class is sharper, noisier or darker around the body, by the disease or by how it was taken and saved: see "
        "by interpret where a network looks, and test on images from elsewhere",
    ),
}


def shortcuts(found: dict[str, Shortcut]) -> list[Finding]:
    """What tells the classes apart without a look at what the images show."""
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


def wilson(images: int, share: float = 0.9, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share found in so many images (Wilson, Probable inference, JASA 1927)."""
    centre = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    return centre - half, centre + half


def sizes_of_splits(images: pd.DataFrame, splits: tuple[str, ...]) -> list[Finding]:
    """Splits that are too small for what they are used for, and classes of very different sizes."""
    findings = []
    for split in splits:
        counts = images[images.split == split].label.value_counts()
        if counts.empty:
            continue
        least, label = int(counts.min()), counts.idxmin()
        enough = ENOUGH_TO_VALIDATE if split == "val" else FEW
        if least < enough:
            low, high = wilson(least)
            width = f"with {least}, a sensitivity of 0.9 could be {low:.2f} to {high:.2f} (95 %)"
            text = f"{Path(split, label)} has {count_of(least, 'image')}, less than {enough}"
            advice = {
                "train": "little to learn from: add images, or start from pretrained weights",
                "val": f"{width}: fit adds a tenth of train/, held out by patient, unless --valid folder",
                "test": f"{width}: add images, or say the interval with every figure",
                "": "little to learn from: add images, or start from pretrained weights",
            }[split]
            findings.append(Finding("remark" if split == "val" else "warning", "few-images", text, advice))
        if counts.max() > IMBALANCE * least and split in ("train", ""):
            text = f"{counts.max() / least:.1f} times as many {counts.idxmax()} as {label}, {split or 'in all'}"
            advice = "fit weighs the loss by class; accuracy would flatter: look at balanced accuracy"
            findings.append(Finding("remark", "imbalance", text, advice))
    if "train" in splits:
        for split, use in (("val", "fit holds out a tenth of train/, by patient"), ("test", "evaluate needs one")):
            if split not in splits:
                advice = "nothing to do" if split == "val" else "put patients that are not in train/ into test/"
                findings.append(Finding("remark", "no-split", f"there is no {split}/: {use}", advice))
    return findings
