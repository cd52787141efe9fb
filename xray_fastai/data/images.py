"""Read a file, PIL image or array as one 8-bit, one-channel X-ray image.

X-rays have one channel. Images keep one channel until the network's normalisation broadcasts them to three. JPEGs are
decoded at the smallest of libjpeg's scales (1, 1/2, 1/4, 1/8) that still covers twice the wanted size (Pillow's
`draft`). The same picture as a JPEG, a PNG or an array is then nearly the same for the network.
"""

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

import xray_fastai.data.dicom.reader as dicom
from xray_fastai.data import jpeg
from xray_fastai.system.errors import ImageError

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".tif", ".tiff", ".webp", *dicom.EXTENSIONS)
GAP = 2
"""JPEGs are decoded at this many times the wanted size or more, then resized (Pillow's `reducing_gap`).

Measured on 50 originals at 224 px, against full decoding: 71 images/s, 99 % of the grey values differ by at most 1, the
largest difference is 29. With a gap of 1: 96 images/s, 99 % differ by at most 5, the largest difference is 85.
"""
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that Pillow may open, whatever the file's name; not PostScript, for which Pillow runs Ghostscript."""
MAX_PIXELS, MAX_BYTES = 40_000_000, 500_000_000
"""Larger images are refused before memory is allocated. The largest X-ray detectors have about 20 million pixels. A
file of 5 kB can hold 40 million pixels, which take up to 0.7 GB during the conversion to grey."""

MAX_ASPECT = 8
"""A picture that is longer than this many times its width shows no chest. One of 1 x 39,000,000 took 12 s."""

# Pillow warns at 89 million pixels. `MAX_PIXELS` refuses such images anyway.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(source: Path | str | bytes | Image.Image | np.ndarray, size: int | None = None) -> Image.Image:
    """Read one image as 8-bit grey.

    Args:
        source: a path, an encoded image's bytes, a PIL image, or an array (H, W), (H, W, 1|3|4) or (1|3, H, W) with
            integers from 0 up or floats from 0 to 1.
        size: resize to a square with this side in pixels. The whole image is kept, its aspect ratio is not. None keeps
            the size.

    Returns:
        A PIL image of mode "L".

    Raises:
        ImageError: the source is not an image, is truncated or too large, or has several frames. `value` is the path.
    """
    name = str(source) if isinstance(source, (str, Path)) else "image"
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, (str, Path, bytes)):
            if not isinstance(source, bytes):
                check_file(source)
            image = open_file(source)
        else:
            image = _from_array(np.asarray(source))
        return _to_grey(image, size)
    except ImageError as error:
        raise ImageError(error.message, value=name) from None
    except FileNotFoundError:
        raise ImageError("no such file", value=name) from None
    except IsADirectoryError:
        raise ImageError("a folder, not an image", value=name) from None
    except PermissionError:
        raise ImageError("no permission to read it", value=name) from None
    except UnidentifiedImageError:
        if isinstance(source, (str, Path)) and Path(source).stat().st_size == 0:
            raise ImageError("the file is empty (0 bytes)", value=name) from None
        if name.lower().endswith(dicom.EXTENSIONS):
            raise ImageError(
                "not a DICOM file (the mark DICM is missing after the first 128 bytes)", value=name
            ) from None
        raise ImageError(f"not an image (supported: {', '.join(EXTENSIONS)})", value=name) from None
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels; no X-ray is that large", value=name) from None
    except Exception as error:  # Pillow's decoders raise whatever a broken stream leads them to
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"broken image ({text})", value=name) from None


def open_file(source: Path | str | bytes) -> Image.Image:
    """Open a file or its bytes by the content, not by the name: DICOM, or one of Pillow's `FORMATS`.

    Raises:
        ImageError: see `dicom.open_dicom`.
        Exception: see `Image.open`.
    """
    if dicom.has_mark(source):
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        return dicom.open_dicom(content, MAX_PIXELS)
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def size_of(path: Path | str) -> tuple[int, int]:
    """Return the width and height in pixels of a readable file, upright."""
    if dicom.has_mark(path):
        return dicom.size_of(path)
    with Image.open(path, formats=FORMATS) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # orientations that swap width and height
        return image.size[::-1] if turned else image.size


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or the resource folder of a macOS archive."""
    return name.startswith(".") or name == "__MACOSX"


def may_be_image(name: str) -> bool:
    """Return whether a name may be an image's: it has one of `EXTENSIONS`, or none, like many DICOM files."""
    return name.lower().endswith(EXTENSIONS) or has_no_extension(name)


def has_no_extension(name: str) -> bool:
    """Return whether a name has no extension, or only digits after its last dot.

    DICOM files are often named by an identifier such as 1.2.840.10008.1. A DICOMDIR holds a list, not an image.
    """
    extension = os.path.splitext(name)[1]
    return (not extension or extension[1:].isdigit()) and name.upper() != "DICOMDIR"


def is_image_file(path: str) -> bool:
    """Return whether the listing of a folder takes a file: by its extension, or, without one, if it is DICOM."""
    name = os.path.basename(path)
    return name.lower().endswith(EXTENSIONS) or (has_no_extension(name) and dicom.has_mark(path))


def check_file(path: Path | str) -> None:
    """Check that a file can be read to its end, and fits into memory.

    Raises:
        ImageError: the path is a folder, a pipe or a device, or the file is too large.
        OSError: the path cannot be inspected.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("a folder, not an image", value=path)
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("a pipe or a device, not a file", value=path)
    if status.st_size > MAX_BYTES:
        raise ImageError(f"{status.st_size:,} bytes; no X-ray is that large", value=path)


def _to_grey(image: Image.Image, size: int | None) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{image.width} x {image.height} pixels; no X-ray is that large")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ImageError(f"{image.width} x {image.height} pixels; no X-ray is that long and narrow")
    if frames := _frames(image):
        raise ImageError(f"{frames} frames; split it into one image a file")
    jpeg.load(image, draft=None if size is None else ("L", GAP * size))
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _from_array(np.asarray(image))
    elif image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        grey, alpha = image.convert("RGBA").convert("LA").split()
        image = ImageChops.multiply(grey, alpha)  # on a black background
    elif image.mode == "P":
        image = image.convert("RGB").convert("L")
    elif image.mode != "L":
        image = image.convert("L")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return image


def _frames(image: Image.Image) -> str | None:
    """Return the number of frames for a message, or None if there is one frame."""
    if getattr(image, "format", None) != "TIFF":
        frames = getattr(image, "n_frames", 1)
        return str(frames) if frames > 1 else None
    position = image.tell()
    try:
        # counting all frames takes quadratic time in Pillow: 81 s for a TIFF of 11 MB
        image.seek(position + 1)
    except EOFError:
        return None
    image.seek(position)
    return "several"


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ImageError(f"an array of shape {array.shape}; give (height, width) or (height, width, 3)")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        if not np.isfinite([low, high]).all() or low < 0:
            raise ImageError(f"values from {low:g} to {high:g}; give integers from 0, or floats from 0 to 1")
        if np.issubdtype(array.dtype, np.floating) and high <= 1:
            full = 1.0
        else:  # detectors store 12 bits in 16-bit files
            full = next((full for full in (255, 4095, 65535) if high <= full), high)
        scaled = np.multiply(array, 255.0 / full, dtype=np.float32)
        array = np.rint(scaled, out=scaled).astype(np.uint8)
    return Image.fromarray(array)
