"""A file, PIL image or array becomes one eight-bit, one-channel X-ray image; what can't become one is named.

X-rays are one-channel, so images stay one-channel until the network's normalisation broadcasts them to three. JPEGs are
decoded at the smallest of libjpeg's scales (1, 1/2, 1/4, 1/8) that still covers twice the wanted size (Pillow's
`draft`): so the same picture as a JPEG, a PNG or an array is the same to the network, or nearly so.
"""

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

import xray_fastai.data.dicom.reader as dicom
from xray_fastai.system.errors import ImageError

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".tif", ".tiff", ".webp", *dicom.EXTENSIONS)
GAP = 2
"""JPEGs are decoded at no less than this times the wanted size, and resized from there (Pillow's `reducing_gap`). On 50
originals at 224 px: 71 images/s, 99 % of the grey values within 1 of full decoding's, the worst 29 off; decoded at no
less than the size itself: 96 images/s, 99 % within 5, the worst 85 off."""
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take a file for, whatever its name: not, for one, PostScript, which it would have Ghostscript run."""
MAX_PIXELS, MAX_BYTES = 40_000_000, 500_000_000
"""Larger images are refused before memory is taken: the largest X-ray detectors have some 20 million pixels. A file of
5 kB can hold 40 million, which take up to 0.7 GB while they become grey."""

# Pillow warns at 89 million pixels; here `MAX_PIXELS` refuses, so the warning would only repeat it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_image(source: Path | str | bytes | Image.Image | np.ndarray, size: int | None = None) -> Image.Image:
    """Read one image as eight-bit grey.

    Args:
        source: a path, an encoded image's bytes, a PIL image, or an array (H, W), (H, W, 1|3|4) or (1|3, H, W):
            integers from 0, or floats from 0 to 1.
        size: the side in pixels to resize to; the whole image is kept, its aspect ratio is not. None: as it is.

    Returns:
        A PIL image of mode "L".

    Raises:
        ImageError: not an image, truncated, several frames, or too large; the text names the file.
    """
    name = str(source) if isinstance(source, (str, Path)) else "image"
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, (str, Path, bytes)):
            if not isinstance(source, bytes):
                check_file(source)
            image = open_file(source, name)
        else:
            image = _from_array(np.asarray(source))
        return _to_grey(image, name, size)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: a folder, not an image") from None
    except PermissionError:
        raise ImageError(f"{name}: no permission to read it") from None
    except UnidentifiedImageError:
        if isinstance(source, (str, Path)) and Path(source).stat().st_size == 0:
            raise ImageError(f"{name}: the file is empty (0 bytes)") from None
        if name.lower().endswith(dicom.EXTENSIONS):
            raise ImageError(f"{name}: no DICOM file (the mark DICM is missing behind its first 128 bytes)") from None
        raise ImageError(f"{name}: not an image (readable are {', '.join(EXTENSIONS)})") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels; no X-ray is that large") from None
    except Exception as error:  # Pillow's decoders raise whatever a broken stream leads them to
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"{name}: broken image ({text})") from None


def open_file(source: Path | str | bytes, name: str) -> Image.Image:
    """Open a file or its bytes as what its content is, whatever its name: DICOM, or one of Pillow's `FORMATS`.

    Raises:
        ImageError: as `dicom.open_dicom`.
        Exception: as `Image.open`.
    """
    if dicom.has_mark(source):
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        return dicom.open_dicom(content, name, MAX_PIXELS)
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def size_of(path: Path | str) -> tuple[int, int]:
    """Width and height in pixels of a readable file, upright."""
    if dicom.has_mark(path):
        return dicom.size_of(path)
    with Image.open(path, formats=FORMATS) as image:
        turned = image.getexif().get(0x0112, 1) >= 5  # orientations that swap width and height
        return image.size[::-1] if turned else image.size


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def may_be_image(name: str) -> bool:
    """Whether a file's name allows that it is an image: it has one of `EXTENSIONS`, or none, as many DICOM files."""
    return name.lower().endswith(EXTENSIONS) or has_no_extension(name)


def has_no_extension(name: str) -> bool:
    """Digits are none: DICOM files are often called by an identifier such as 1.2.840.10008.1. A DICOMDIR is a list."""
    extension = os.path.splitext(name)[1]
    return (not extension or extension[1:].isdigit()) and name.upper() != "DICOMDIR"


def is_image_file(path: str) -> bool:
    """Whether a file is taken for an image when a folder is listed: by its extension; without one, if it is DICOM."""
    name = os.path.basename(path)
    return name.lower().endswith(EXTENSIONS) or (has_no_extension(name) and dicom.has_mark(path))


def check_file(path: Path | str) -> None:
    """See that to read a file ends, and fits into memory.

    Raises:
        ImageError: a folder, a pipe, a device, or too large.
        OSError: it can't be looked at.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{path}: a folder, not an image")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{path}: a pipe or a device, not a file")
    if status.st_size > MAX_BYTES:
        raise ImageError(f"{path}: {status.st_size:,} bytes; no X-ray is that large")


def _to_grey(image: Image.Image, name: str, size: int | None) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{name}: {image.width} x {image.height} pixels; no X-ray is that large")
    if frames := _frames(image):
        raise ImageError(f"{name}: {frames} frames; split it into one image a file")
    if size is not None and getattr(image, "format", None) == "JPEG":
        image.draft("L", (GAP * size, GAP * size))
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _from_array(np.asarray(image))
    elif image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        grey, alpha = image.convert("RGBA").convert("LA").split()
        image = ImageChops.multiply(grey, alpha)  # on black
    elif image.mode == "P":
        image = image.convert("RGB").convert("L")
    elif image.mode != "L":
        image = image.convert("L")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    image.load()
    return image


def _frames(image: Image.Image) -> str | None:
    """How many frames there are; None: one."""
    if getattr(image, "format", None) != "TIFF":
        frames = getattr(image, "n_frames", 1)
        return str(frames) if frames > 1 else None
    at = image.tell()
    try:
        image.seek(at + 1)  # to count them, Pillow takes time as their square: 81 s for a TIFF of 11 MB
    except EOFError:
        return None
    image.seek(at)
    return "several"


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ImageError(f"image: an array of shape {array.shape}; give (height, width) or (height, width, 3)")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        if not np.isfinite([low, high]).all() or low < 0:
            raise ImageError(f"image: values from {low:g} to {high:g}; give integers from 0, or floats from 0 to 1")
        if np.issubdtype(array.dtype, np.floating) and high <= 1:
            full = 1.0
        else:  # detectors give 12 bits in files of 16
            full = next((full for full in (255, 4095, 65535) if high <= full), high)
        scaled = np.multiply(array, 255.0 / full, dtype=np.float32)
        array = np.rint(scaled, out=scaled).astype(np.uint8)
    return Image.fromarray(array)
