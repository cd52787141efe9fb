"""Decode one image file to its end, and collect facts from its header and its pixels."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xray_fastai.data import jpeg
from xray_fastai.data.depth import has_deep_colours
from xray_fastai.data.dicom.reader import FORMAT as DICOM
from xray_fastai.data.duplicates import perceptual_hash
from xray_fastai.data.images import (
    MAX_PIXELS,
    check_file,
    contrast_of,
    open_file,
    open_image,
    orientation_of,
    tell_note,
    upright_size,
)
from xray_fastai.data.metadata import without_metadata
from xray_fastai.system.errors import ImageError
from xray_fastai.system.parallel import map_in_threads

SIZE = 112
"""Side in pixels for decoding: enough for the hash, and half of 224 (libjpeg decodes at half the size directly)."""
STANDARD_QUANTISATION = 3688
"""Sum of JPEG's luminance table (ITU-T T.81, table K.1), which is quality 50 for libjpeg."""
CHROMA, COLOURED_SHARE = 20, 0.005
"""An image is coloured if more than this share of its pixels differs from grey by more than `CHROMA` in Cb or Cr (0 to
255). JPEG artefacts in a grey image stay below this; a coloured mark in one corner is above it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about a readable file that do not depend on what the X-ray shows."""

    digest: str  # MD5 of the content, in hexadecimal
    bytes: int
    format: str  # Pillow's name of the format of the content: JPEG, PNG, ...; or DICOM
    mode: str  # Pillow's: L, RGB, I;16, ...; or DICOM's photometric interpretation: MONOCHROME1, ...
    width: int  # in pixels, upright
    height: int
    quality: float  # of a JPEG, on libjpeg's scale from 0 to 100; NaN for other formats
    orientation: int  # EXIF's: 1 is upright
    transparent: bool
    coloured: bool  # the channels differ visibly
    contrast: float  # standard deviation of the grey values, 0 to 255
    hash: bytes  # `duplicates.perceptual_hash`


def examine(path: Path | str) -> Facts:
    """Decode a file to its end, and collect its facts.

    Raises:
        ImageError: see `images.open_image`; `value` is the path.
    """
    try:
        check_file(path)
        content = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(error.strerror or str(error), value=path) from None
    if not content:
        raise ImageError("the file is empty (0 bytes)", value=path)
    try:
        try:
            image, header, source = _opened(content)
        except ImageError:
            raise
        except Exception:
            open_image(content, SIZE)  # raises an error that says what is wrong
            try:
                image, header, source = _opened(without_metadata(content) or content)
            except Exception as error:
                raise ImageError(f"broken header ({type(error).__name__})") from None
        tell_note(image, str(path))
        grey = open_image(source, SIZE)
    except ImageError as error:
        raise ImageError(error.message, value=path) from None
    small = grey.resize((64, 64), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return Facts(
        digest=hashlib.md5(content, usedforsecurity=False).hexdigest(),
        bytes=len(content),
        **header,
        coloured=_is_coloured(image),
        contrast=contrast_of(small),
        hash=perceptual_hash(small),
    )


def examine_all(paths: Iterable[str]) -> Iterator[Facts | ImageError]:
    """Run `examine` on many files in parallel, and yield the results in order (Pillow releases Python's lock).

    A file that cannot be read yields its error.
    """

    def examined(path: str) -> Facts | ImageError:
        try:
            return examine(path)
        except ImageError as error:
            return error

    yield from map_in_threads(examined, paths)


def _opened(content: bytes) -> tuple[Image.Image, dict[str, Any], Image.Image | bytes]:
    """Return the image, decoded or not, what its header says, and from what its grey values are to be read."""
    image = open_file(content)
    source = content if has_deep_colours(image) else image  # reading the header may decode it with 8 bits
    header = _header(image)
    _decode_in_colour(image)
    return image, header, source


def _header(image: Image.Image) -> dict[str, Any]:
    width, height = upright_size(image)
    return {
        "format": image.format,
        "mode": image.info["photometric"] if image.format == DICOM else image.mode,
        "width": width,
        "height": height,
        "quality": _quality(image),
        "orientation": orientation_of(image),
        "transparent": image.has_transparency_data,
    }


def _quality(image: Image.Image) -> float:
    """Estimate libjpeg's quality setting from the luminance table (the inverse of its `jpeg_quality_scaling`)."""
    table = (getattr(image, "quantization", None) or {}).get(0)
    if not table:
        return float("nan")
    scale = 100 * sum(table) / STANDARD_QUANTISATION
    return round((200 - scale) / 2 if scale <= 100 else 5000 / scale, 1)


def _decode_in_colour(image: Image.Image) -> None:
    """Decode a three-channel JPEG as luminance and chroma, so that the file is decoded once for grey and colour."""
    if image.format == "JPEG" and image.mode == "RGB" and image.width * image.height <= MAX_PIXELS:
        jpeg.load(image, draft=("YCbCr", SIZE))


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
