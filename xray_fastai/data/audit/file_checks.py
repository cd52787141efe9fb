"""Check single files: unreadable, blank, coloured, rotated, with a misleading name, or never read by a fit."""

from collections import Counter
from pathlib import Path

import pandas as pd
from PIL import Image

import xray_fastai.data.dicom.reader as dicom
from xray_fastai.data.audit.findings import File, Finding
from xray_fastai.data.depth import FLAT
from xray_fastai.data.image_facts import Facts
from xray_fastai.data.images import EXTENSIONS, FORMATS, SUFFIXES, check_file, has_no_extension
from xray_fastai.system.errors import ImageError
from xray_fastai.system.text import count_of

TINY, LONG = 64, 3.0  # pixels a side; ratio of the longer side to the shorter


def unreadable(table: pd.DataFrame, facts: list[Facts | ImageError]) -> list[Finding]:
    """Find files that cannot be read."""
    files = [
        File(row.file, error.message, leave_out=True)
        for row, error in zip(table.itertuples(), facts, strict=True)
        if isinstance(error, ImageError)
    ]
    if not files:
        return []
    text = f"{count_of(len(files), 'file')} cannot be read as one image"
    return [Finding("error", "unreadable", text, "repair or remove; or leave out by --fix, then fit --exclude", files)]


def odd_images(images: pd.DataFrame) -> list[Finding]:
    """Find images that can be read, but may not be X-rays, or too small or too long."""
    short, long = images[["width", "height"]].min(axis=1), images[["width", "height"]].max(axis=1)
    look = "look at them: like all images, a thumbnail is enlarged and a strip is squashed to a square"
    findings = []
    for severity, kind, which, text, advice in (
        (
            "error", "blank", images.contrast < FLAT, "of one tone, which show nothing",
            "remove; or leave out by --fix, then fit --exclude",
        ),
        (
            "warning", "coloured", images.coloured, "with colours",
            "look at them: photographs, screenshots or drawn marks? They are opened as grey",
        ),
        ("warning", "tiny", short < TINY, f"below {TINY} pixels a side", look),
        ("remark", "long", long > LONG * short, f"more than {LONG:g} times as long as wide", look),
    ):  # fmt: skip
        files = [
            File(row.file, f"{row.width} x {row.height} pixels", leave_out=kind == "blank")
            for row in images[which].itertuples()
        ]
        if files:
            findings.append(Finding(severity, kind, f"{count_of(len(files), 'image')} {text}", advice, files))
    return findings


def conversions(images: pd.DataFrame) -> list[Finding]:
    """Report how files are converted that are not upright 8-bit grey, and names that do not match the content."""
    findings, mode = [], images["mode"]
    ways = Counter()
    grey = ~images.coloured
    for name, which in {
        "of three channels, but grey": mode.isin(["RGB", "YCbCr"]) & grey,
        "of 16 or more bits, scaled to 8": mode.str.startswith("I") | (mode == "F"),
        "with a palette": mode.isin(["P", "PA"]),
        "of CMYK": mode == "CMYK",
        "with transparency, on black": images.transparent,
        "of one bit": mode == "1",
        "of DICOM": images.format == dicom.FORMAT,
        "inverted, by MONOCHROME1": mode == "MONOCHROME1",
    }.items():
        if which.any():
            ways[name] = int(which.sum())
    if ways:
        text = "opened as 8-bit grey like all others: " + ", ".join(f"{n:,} {name}" for name, n in ways.items())
        findings.append(Finding("remark", "modes", text, "nothing to do"))
    turned = images[images.orientation.between(2, 8)]
    if len(turned):
        files = [File(row.file, f"EXIF orientation {row.orientation}") for row in turned.itertuples()]
        text = f"{count_of(len(files), 'image')} turned by {'its' if len(files) == 1 else 'their'} EXIF header"
        findings.append(
            Finding("remark", "exif-rotation", text, "nothing to do: opened upright; other programs may not", files)
        )
    wrong = [
        File(row.file, f"holds {row.format}")
        for row in images.itertuples()
        if not row.file.lower().endswith(SUFFIXES.get(row.format, ())) and not has_no_extension(Path(row.file).name)
    ]
    if wrong:
        text = f"{count_of(len(wrong), 'file')} whose name does not match the content"
        findings.append(
            Finding("remark", "wrong-extension", text, "opened by the content; rename them for other programs", wrong)
        )
    return findings


def other_files(others: pd.DataFrame) -> list[Finding]:
    """Find files that no fit reads: images with another extension or outside class folders, and other files."""
    unread, system, other = [], [], []
    for row in others.itertuples():
        if row.hidden:
            system.append(File(row.file))
        elif content := _content(row.path):
            where = "outside the class folders" if not row.label else f"{content}, not read under this name"
            unread.append(File(row.file, where))
        else:
            other.append(File(row.file))
    groups = [
        (
            "warning", "not-read", unread, "with images that a fit does not read",
            f"move them into a class folder and convert them to one of {' '.join(EXTENSIONS)}; or remove them",
        ),
        (
            "remark", "no-image", other, "that is not an image" if len(other) == 1 else "that are not images",
            "ignored; nothing to do",
        ),
        ("remark", "system-file", system, "hidden or of the operating system", "ignored; nothing to do"),
    ]  # fmt: skip
    return [
        Finding(severity, kind, f"{count_of(len(files), 'file')} {text}", advice, files)
        for severity, kind, files, text, advice in groups
        if files
    ]


def _content(path: str) -> str | None:
    """Return the format of the image in a file by its first bytes, or None if it is not an image."""
    if dicom.has_mark(path):
        return None if Path(path).name.upper() == "DICOMDIR" else dicom.FORMAT
    try:
        check_file(path)  # opening a pipe may block
        with Image.open(path, formats=FORMATS) as image:
            return image.format
    except Exception:  # Pillow's readers raise errors of any class for a broken header
        return None
