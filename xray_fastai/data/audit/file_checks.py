"""What is odd about single files: unreadable, blank, coloured, turned, named for what they are not, or never read."""

from collections import Counter
from pathlib import Path

import pandas as pd
from PIL import Image

import xray_fastai.data.dicom.reader as dicom
from xray_fastai.data.audit.findings import File, Finding
from xray_fastai.data.duplicates import FLAT
from xray_fastai.data.image_facts import Facts
from xray_fastai.data.images import EXTENSIONS, FORMATS, check_file, has_no_extension
from xray_fastai.system.errors import ImageError
from xray_fastai.system.text import count_of

SUFFIXES = {
    "JPEG": (".jpeg", ".jpg"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "DICOM": dicom.EXTENSIONS,
}
TINY, LONG = 64, 3.0  # pixels a side; longer side by shorter


def unreadable(table: pd.DataFrame, found: list[Facts | ImageError]) -> list[Finding]:
    files = [
        File(row.file, str(error).removeprefix(f"{row.path}: "), leave_out=True)
        for row, error in zip(table.itertuples(), found, strict=True)
        if isinstance(error, ImageError)
    ]
    if not files:
        return []
    text = f"{count_of(len(files), 'file')} can't be read as one image"
    return [Finding("error", "unreadable", text, "mend or remove; or leave out by --fix, then fit --exclude", files)]


def odd_pictures(images: pd.DataFrame) -> list[Finding]:
    """Pictures that open, but may not be what they should."""
    short, long = images[["width", "height"]].min(axis=1), images[["width", "height"]].max(axis=1)
    look = "look at them: a thumbnail is enlarged, a strip is squashed to a square, like all others"
    findings = []
    for severity, kind, which, text, advice in (
        ("warning", "blank", images.contrast < FLAT, "of one tone, which show nothing", "look; --fix leaves them out"),
        (
            "warning", "coloured", images.coloured, "with colours",
            "look at them: photographs, screenshots or marks drawn in? They are opened as grey",
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


def ways_of_opening(images: pd.DataFrame) -> list[Finding]:
    """What is done to files that are not upright eight-bit grey, and names that belie their content."""
    findings, mode = [], images["mode"]
    ways = Counter()
    grey = ~images.coloured
    for name, which in {
        "of three channels, though grey": mode.isin(["RGB", "YCbCr"]) & grey,
        "of 16 or more bits, scaled to 8": mode.str.startswith("I") | (mode == "F"),
        "with a palette": mode.isin(["P", "PA"]),
        "of CMYK": mode == "CMYK",
        "with transparency, laid on black": images.transparent,
        "of one bit": mode == "1",
        "of DICOM": images.format == dicom.FORMAT,
        "inverted, by MONOCHROME1": mode == "MONOCHROME1",
    }.items():
        if which.any():
            ways[name] = int(which.sum())
    if ways:
        text = "opened as eight-bit grey like all others: " + ", ".join(f"{n:,} {name}" for name, n in ways.items())
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
        text = f"{count_of(len(wrong), 'file')} whose name does not fit the content"
        findings.append(
            Finding("remark", "wrong-extension", text, "opened by the content; rename for other programs", wrong)
        )
    return findings


def other_files(others: pd.DataFrame) -> list[Finding]:
    """Files that no fit reads: images under another name or outside class folders, and what systems leave behind."""
    unread, system, strange = [], [], []
    for row in others.itertuples():
        if row.hidden:
            system.append(File(row.file))
        elif content := _content(row.path):
            where = "outside of class folders" if not row.label else f"{content}, not read under this name"
            unread.append(File(row.file, where))
        else:
            strange.append(File(row.file))
    told = [
        (
            "warning", "not-read", unread, "with images that fit does not read",
            f"move them into a class folder and convert them to one of {' '.join(EXTENSIONS)}; or remove them",
        ),
        ("remark", "no-image", strange, "that are no images", "left aside; nothing to do"),
        ("remark", "system-file", system, "hidden or of the operating system", "left aside; nothing to do"),
    ]  # fmt: skip
    return [
        Finding(severity, kind, f"{count_of(len(files), 'file')} {text}", advice, files)
        for severity, kind, files, text, advice in told
        if files
    ]


def _content(path: str) -> str | None:
    """What kind of image a file holds by its first bytes; None is none."""
    if dicom.has_mark(path):
        return None if Path(path).name.upper() == "DICOMDIR" else dicom.FORMAT
    try:
        check_file(path)  # to open a pipe may take for ever
        with Image.open(path, formats=FORMATS) as image:
            return image.format
    except Exception:  # Pillow's readers raise whatever a strange header leads them to
        return None
