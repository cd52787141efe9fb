"""One look at an image file: decoded to its end, and what its header and its pixels tell of it."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xray_fastai.data.dicom.reader import FORMAT as DICOM
from xray_fastai.data.duplicates import perceptual_hash
from xray_fastai.data.images import MAX_PIXELS, check_file, open_file, open_image
from xray_fastai.system.errors import ImageError

SIZE = 112
"""Side in pixels that images are decoded for: enough for the hash, and half of 224, which JPEGs give at once."""
STANDARD_QUANTISATION = 3688
"""The sum of the luminance table of JPEG (ITU-T T.81, table K.1), which libjpeg calls quality 50."""
TURNED_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
CHROMA, COLOURED_SHARE = 20, 0.005
"""A picture has colours where more than this share of it is further than this from grey in Cb or Cr (0 to 255):
above what JPEG does to a grey picture, and below a mark in one corner."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a readable file without looking at what the X-ray shows."""

    digest: str  # MD5 of the content, in hexadecimal
    bytes: int
    format: str  # as Pillow names it, by the content: JPEG, PNG, ...; or DICOM
    mode: str  # likewise: L, RGB, I;16, ...; or DICOM's photometric interpretation: MONOCHROME1, ...
    width: int  # in pixels, upright
    height: int
    quality: float  # of a JPEG, on libjpeg's scale from 0 to 100; NaN for other formats
    orientation: int  # EXIF's: 1 is upright
    transparent: bool
    coloured: bool  # its channels differ visibly
    contrast: float  # standard deviation of the grey values, 0 to 255
    hash: bytes  # as `duplicates.perceptual_hash`


def examine(path: Path | str) -> Facts:
    """Decode a file to its end, and gather what it tells.

    Args:
        path: the file.

    Raises:
        ImageError: as `images.open_image`; the text names the file.
    """
    try:
        check_file(path)
        content = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from None
    if not content:
        raise ImageError(f"{path}: the file is empty (0 bytes)")
    try:
        try:
            image = open_file(content, "image")
            told = _header(image)
            _decode_in_colour(image)
        except ImageError:
            raise
        except Exception as error:
            open_image(content, SIZE)  # says what is wrong
            raise ImageError(f"image: broken header ({type(error).__name__})") from None
        grey = open_image(image, SIZE)
    except ImageError as error:
        raise ImageError(f"{path}{str(error).removeprefix('image')}") from None
    small = grey.resize((64, 64), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return Facts(
        digest=hashlib.md5(content, usedforsecurity=False).hexdigest(),
        bytes=len(content),
        **told,
        coloured=_is_coloured(image),
        contrast=round(float(np.asarray(small).std()), 2),
        hash=perceptual_hash(small),
    )


def examine_all(paths: Iterable[str]) -> Iterator[Facts | ImageError]:
    """`examine` for many files, in their order, on all cores (Pillow decodes without Python's lock)."""

    def examined(path: str) -> Facts | ImageError:
        try:
            return examine(path)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            yield from pool.map(examined, paths)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _header(image: Image.Image) -> dict[str, Any]:
    orientation = image.getexif().get(0x0112, 1)
    width, height = image.size[::-1] if orientation in TURNED_SIDEWAYS else image.size
    return {
        "format": image.format,
        "mode": image.info["photometric"] if image.format == DICOM else image.mode,
        "width": width,
        "height": height,
        "quality": _quality(image),
        "orientation": orientation,
        "transparent": image.has_transparency_data,
    }


def _quality(image: Image.Image) -> float:
    """libjpeg's quality setting, from how coarse the luminance table is (the inverse of `jpeg_quality_scaling`)."""
    table = (getattr(image, "quantization", None) or {}).get(0)
    if not table:
        return float("nan")
    scale = 100 * sum(table) / STANDARD_QUANTISATION
    return round((200 - scale) / 2 if scale <= 100 else 5000 / scale, 1)


def _decode_in_colour(image: Image.Image) -> None:
    """Decode a three-channel JPEG into luminance and chroma, so that one decoding serves both."""
    if image.format == "JPEG" and image.mode == "RGB" and image.width * image.height <= MAX_PIXELS:
        image.draft("YCbCr", (SIZE, SIZE))
        image.load()


def _is_coloured(image: Image.Image) -> bool:
    if image.mode not in ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
        return False
    if image.mode in ("P", "PA"):
        image = image.convert("RGB")
    image = image.reduce(max(1, min(image.size) // 64))
    if image.mode != "YCbCr":
        image = image.convert("RGB").convert("YCbCr")
    (_, _), *extrema = image.getextrema()
    if all(low >= 128 - CHROMA and high <= 128 + CHROMA for low, high in extrema):
        return False
    chroma = np.abs(np.asarray(image)[..., 1:].astype(np.int16) - 128).max(axis=2)  # (h, w)
    return bool((chroma > CHROMA).mean() > COLOURED_SHARE)
