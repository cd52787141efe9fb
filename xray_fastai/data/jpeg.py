"""Checks what libjpeg says nothing about: how many scans a JPEG file has, and whether their data are complete.

A file without its end is refused by Pillow. But where the data of a scan end early at a marker, libjpeg fills the rest
of the picture with grey 128, and only counts a warning, which Pillow does not pass on.
"""

import io
import re
from collections.abc import Iterator
from itertools import pairwise
from random import Random
from typing import Any

from PIL import Image

from xray_fastai.system.errors import ImageError

MAX_SCANS = 64
"""A baseline file has one scan, or one for each channel; libjpeg's progressive files have six or ten. A scan can repeat
the one before it in a few bytes: one of 6300 x 6300 pixels takes 0.04 s (400 scans in 260 kB: 16 s)."""

STRIPS_OR_TILES = ((273, 279), (324, 325))
"""TIFF's tags of the offsets and the lengths of its parts."""

_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
"""A marker among a scan's data, where FF 00 is a byte of data and FF D0 to FF D7 restart the decoder (T.81, B.1.1)."""
_EOI, _SOS = b"\xff\xd9", b"\xff\xda"

_FILLER = bytes(Random(0).choices(range(255), k=64))
"""A decoder skips it between the data of a complete scan and the next marker. Where data are missing it decodes it."""


def load(image: Image.Image, draft: tuple[str, int] | None = None) -> None:
    """Decode an image that Pillow opened. Check a JPEG's scans before, also in a TIFF, and a JPEG's data after.

    Args:
        image: any image.
        draft: the mode and the side in pixels that are wanted of a JPEG, as `Image.draft` takes them; None: all of it.

    Raises:
        ImageError: the file has more than `MAX_SCANS` scans, or the data of a scan end early.
        Exception: see `Image.load`.
    """
    stream: Any = getattr(image, "fp", None)
    if getattr(image, "format", None) not in ("JPEG", "TIFF") or stream is None:
        image.load()
        return
    position = stream.tell()
    stream.seek(0)
    content = stream.read()
    stream.seek(position)
    if image.format == "TIFF":
        for start, length in _parts_of_tiff(image):
            check_scans(content[start : start + length])
        image.load()
        return
    check_scans(content)
    _decode(image, draft)
    corner = image.getpixel((image.width - 1, image.height - 1))
    values = corner if isinstance(corner, tuple) else (corner,)
    if "progressive" not in image.info and any(abs(value - 128) > 1 for value in values):  # 127: an inverted 128
        return
    with Image.open(io.BytesIO(_filled(content)), formats=["JPEG"]) as filled:
        _decode(filled, draft)
        if filled.tobytes() != image.tobytes():
            raise ImageError("cut short: a part of the picture is missing")


def check_scans(content: bytes) -> None:
    """Check that a JPEG can be decoded in a moment.

    Raises:
        ImageError: it has more than `MAX_SCANS` scans.
    """
    if content.count(_SOS) > MAX_SCANS and len(_ends_of_scans(content)) > MAX_SCANS:
        raise ImageError(f"more than {MAX_SCANS} scans, which take too long; save it as a plain JPEG or a PNG")


def _parts_of_tiff(image: Any) -> Iterator[tuple[int, int]]:
    """Yield where each JPEG of a TIFF begins, and its length: its strips or tiles (TIFF 6.0, p. 40 and 67)."""
    if image.info.get("compression") == "jpeg":
        for starts, lengths in STRIPS_OR_TILES:
            yield from zip(image.tag_v2.get(starts, ()), image.tag_v2.get(lengths, ()), strict=False)


def _decode(image: Image.Image, draft: tuple[str, int] | None) -> None:
    if draft is not None:
        mode, side = draft
        image.draft(mode, (side, side))
    image.load()


def _ends_of_scans(content: bytes) -> list[int]:
    """Return where the data of each scan end (T.81, B.1.1.2)."""
    ends: list[int] = []
    position = 2
    while (marker := _MARKER.search(content, position)) and marker[1] != _EOI[1:]:
        position = marker.end()
        if marker[1] == b"\x01" or marker[1] == b"\xd8":  # TEM and SOI have no length
            continue
        position += int.from_bytes(content[position : position + 2], "big")
        if marker[1] == _SOS[1:]:
            following = _MARKER.search(content, position)
            ends.append(following.start() if following else len(content))
    return ends


def _filled(content: bytes) -> bytes:
    """Return the file with `_FILLER` after the data of each scan."""
    ends = _ends_of_scans(content)
    parts = [content[start:end] for start, end in pairwise([0, *ends, len(content)])]
    return _FILLER.join(parts)
