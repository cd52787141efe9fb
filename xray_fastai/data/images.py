"""Read a file, PIL image or array as one 8-bit, one-channel X-ray image.

X-rays have one channel. Images keep one channel until the network's normalisation broadcasts them to three. JPEGs are
decoded at the smallest of libjpeg's scales (1, 1/2, 1/4, 1/8) that still covers twice the wanted size (Pillow's
`draft`). The same picture as a JPEG, a PNG or an array is then nearly the same for the network.
"""

import io
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

import xray_fastai.data.dicom.reader as dicom
from xray_fastai.data import jpeg
from xray_fastai.data.depth import FLAT, eight_bits, grey_of_colours
from xray_fastai.data.metadata import without_metadata
from xray_fastai.system.errors import ImageError
from xray_fastai.system.text import printable

SUFFIXES = {
    "JPEG": (".jpeg", ".jpg", ".jfif", ".jpe"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    dicom.FORMAT: dicom.EXTENSIONS,
}
"""The extensions of each format: those that Pillow registers, and DICOM's."""
EXTENSIONS = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "ehthumbs.db")
GAP = 2
"""JPEGs are decoded at this many times the wanted size or more, then resized (Pillow's `reducing_gap`).

Measured on 50 originals at 224 px, against full decoding: 71 images/s, 99 % of the grey values differ by at most 1, the
largest difference is 29. With a gap of 1: 96 images/s, 99 % differ by at most 5, the largest difference is 85.
"""
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that Pillow may open, whatever the file's name; not PostScript, for which Pillow runs Ghostscript."""
ORIENTATION, PHOTOMETRIC, NEW_SUBFILE_TYPE, SUBFILE_TYPE = 274, 262, 254, 255
"""Tags of TIFF and EXIF."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its orientation (TIFF 6.0, p. 36; EXIF 2.3, 4.6.4 A)."""
MAX_PAGES = 8
"""Pages of a TIFF that are looked at for the primary picture: Pillow takes quadratic time for more."""
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
            values from 0 up. Those of another type than uint8 are scaled by what is in them (`depth`).
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
            try:
                image = open_file(source)
                tell_note(image, name)
                return _to_grey(image, size)
            except ImageError:
                raise
            except Exception:  # Pillow's, also for faults in what the picture does not need
                content = source if isinstance(source, bytes) else Path(source).read_bytes()
                if (bare := without_metadata(content)) is None:
                    raise
                image = open_file(bare)
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
        message = f"not an image: its content, whatever its name, is none of {', '.join(EXTENSIONS)}"
        raise ImageError(message, value=name) from None
    except Image.DecompressionBombError:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels; no X-ray is that large", value=name) from None
    except Exception as error:  # Pillow's decoders raise whatever a broken stream leads them to
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ImageError(f"broken image ({text})", value=name) from None


def open_file(source: Path | str | bytes) -> Image.Image:
    """Open a file or its bytes by the content, not by the name: DICOM, or one of Pillow's `FORMATS`.

    Of a camera's JPEG with a preview (MPO) it is the first picture.

    Raises:
        ImageError: see `dicom.open_dicom`.
        Exception: see `Image.open`.
    """
    if dicom.has_mark(source):
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        return dicom.open_dicom(content, MAX_PIXELS)
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    if image.format == "MPO":
        image.close()
        return JpegImageFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.format == "TIFF":
        _seek_primary(image)
    return image


def tell_note(image: Image.Image, name: str) -> None:
    """Print on standard error what was read in another way than the file says."""
    if image.format == dicom.FORMAT and "note" in image.info:
        print(f"Warning: {printable(name)}: {image.info['note']}", file=sys.stderr)


def size_of(path: Path | str) -> tuple[int, int]:
    """Return the width and height in pixels of a readable file, upright."""
    if dicom.has_mark(path):
        return dicom.size_of(path)
    with open_file(path) as image:
        return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height in pixels of an image that is not decoded yet, as they are when it is upright."""
    swapped = orientation_of(image) >= 5 and image.format != "TIFF"  # Pillow itself turns TIFFs
    return image.size[::-1] if swapped else image.size


def orientation_of(image: Image.Image) -> int:
    """Return the orientation by EXIF, or TIFF's tag: 1 is upright; 5 and more swap width and height.

    An EXIF header that Pillow cannot read says nothing about the picture, so it does not count.
    """
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow's readers of metadata raise errors of any class
        return 1
    return orientation if orientation in TURNS else 1


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or of the operating system."""
    return name.startswith(".") or name == "__MACOSX" or name.lower() in SYSTEM_FILES


def contrast_of(image: Image.Image) -> float:
    """Return the standard deviation of an 8-bit grey image, 0 to 255, at 64 x 64 pixels."""
    small = image.resize((64, 64), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return round(float(np.asarray(small).std()), 2)


def check_not_blank(contrast: float) -> None:
    """Check that an image shows something, by its contrast.

    Raises:
        ImageError: it has one tone. The message names no file.
    """
    if contrast < FLAT:
        raise ImageError("blank: of one tone, which shows nothing")


def walk(
    folder: Path | str, onerror: Callable[[OSError], None] | None = None, hidden: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder in a folder, itself first, with its files' names in order; links to folders are followed.

    A folder is entered once, whatever links lead to it, and none that holds `folder`: a link to it would never end, and
    from one class lead into the others.

    Args:
        folder: where to begin.
        onerror: takes the error of a folder that cannot be read; None passes over such a folder.
        hidden: enter hidden folders, too.
    """
    entered = set(map(str, Path(os.path.realpath(folder)).parents))
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=onerror):
        if (real := os.path.realpath(parent)) in entered:
            folders.clear()
            continue
        entered.add(real)
        # a folder comes before the links to it, so that its files keep their own names
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        folders[:] = [name for name in folders if hidden or not is_hidden(name)]
        yield parent, sorted(files)


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
    if getattr(image, "format", None) == "TIFF":
        _seek_primary(image)
    elif (frames := getattr(image, "n_frames", 1)) > 1:
        raise ImageError(f"{frames} frames; split it into one image a file")
    colours = grey_of_colours(image)
    jpeg.load(image, draft=None if size is None else ("L", GAP * size))
    turn = TURNS.get(orientation_of(image))
    inverted = getattr(image, "format", None) == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0
    if image.mode == "F" or image.mode.startswith("I"):
        array = np.asarray(image)
        # WhiteIsZero (TIFF 6.0, p. 37): Pillow inverts pictures of at most 8 bits only
        image = _from_array(array.max() - array if inverted else array)
    elif colours is not None:
        image = _from_array(colours)
    elif image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        grey, alpha = image.convert("RGBA").convert("LA").split()
        image = ImageChops.multiply(grey, alpha)  # on a black background
    elif image.mode == "P":
        image = image.convert("RGB").convert("L")
    elif image.mode != "L":
        image = image.convert("L")
    if turn is not None:
        image = image.transpose(turn)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return image


def _seek_primary(image: Image.Image) -> None:
    """Seek the one page of a TIFF that is no reduced picture and no mask of another (TIFF 6.0, p. 36 and 40).

    Raises:
        ImageError: there are several such pages, or more than `MAX_PAGES` pages.
    """
    start, primary = image.tell(), []
    try:
        for page in range(MAX_PAGES + 1):
            image.seek(page)
            if not image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & 0b101 and image.tag_v2.get(SUBFILE_TYPE) != 2:
                primary.append(page)
        primary = list(range(MAX_PAGES + 1))
    except EOFError:
        pass
    if len(primary) > 1:
        raise ImageError("several frames; split it into one image a file")
    image.seek(primary[0] if primary else start)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ImageError(f"an array of shape {array.shape}; give (height, width) or (height, width, 3)")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    return Image.fromarray(eight_bits(array))
