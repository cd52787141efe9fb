"""Read one DICOM file as an 8-bit image, and its patient's identifier as a salted hash.

The header says what the pixels mean: which bits of a word are used, which values are padding, and how stored values
become what a screen shows (PS3.3, C.7.6.3, C.7.5.1.1.2, C.11.1 and C.11.2). pydicom's own functions do these steps.

Names, dates and identifiers in the header must not reach logs, reports and exports. This module therefore reads only
the elements that it needs. It suppresses pydicom's messages, which quote values. A patient is known by a hash with a
random salt, which no other process can compute again. `identifiers_of` alone returns values, for a user
who asks for them, and to find the files of a table's rows.
"""

import functools
import hashlib
import io
import logging
import os
import secrets
import stat
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from PIL import Image

from xray_fastai.data.dicom.decoding import INSTALL, decode
from xray_fastai.data.dicom.grey import as_colour, as_grey
from xray_fastai.data.dicom.header import EMPTY, GREYS, NEEDED, OPTIONAL, apply_groups, check
from xray_fastai.system.errors import ImageError
from xray_fastai.system.text import shown

if TYPE_CHECKING:
    from pydicom import Dataset

EXTENSIONS = (".dcm", ".dicom")
FORMAT = "DICOM"
"""Pillow's `format` of the images from this module. `info["photometric"]` is the PhotometricInterpretation."""
DEFLATED = "1.2.840.10008.1.2.1.99"  # the transfer syntax's UID
MAX_BYTES, MAX_ITEMS = 500_000_000, 10_000
"""Limits on the size of an inflated file, and on the items of all sequences (pydicom takes 3 s and 60 MB for
100,000)."""
IDENTIFIERS = ("StudyInstanceUID", "SOPInstanceUID", "AccessionNumber")
"""What a hospital's own systems know an image by."""
HEAD = 2**20
"""Bytes at the start of a file that hold the PatientID, and in most files everything but the pixels."""

_SALT = secrets.token_bytes(32)
_thread = threading.local()  # `.reading`: this thread runs pydicom


def has_mark(source: bytes | str | os.PathLike) -> bool:
    """Return whether bytes, or a readable file, have DICOM's mark after a preamble of 128 bytes."""
    if isinstance(source, bytes):
        return source[128:132] == b"DICM"
    try:
        if not stat.S_ISREG(os.stat(source).st_mode):  # opening a pipe may block
            return False
        with open(source, "rb", buffering=0) as stream:
            return has_mark(stream.read(132))
    except OSError:
        return False


def open_dicom(content: bytes, max_pixels: int, window: tuple[float, float] | None = None) -> Image.Image:
    """Read the one image of a DICOM file.

    Grey values go through the modality LUT or rescale, then the first VOI LUT or, without one, the first window.
    MONOCHROME1 is inverted. Padding is black. Without a LUT, and without a window of a usable width, black and white
    are the smallest and the largest value of the image, without padding. The full range of BitsStored would not do:
    an image with ten bits in a file that declares sixteen (many detectors' "for processing" images) would have 4 greys
    of 256. Colours stay as they are.

    Args:
        content: the bytes of the file.
        max_pixels: the number of pixels above which the image is refused.
        window: centre and width to show the values by, in place of the file's own window or LUT.

    Returns:
        A PIL image of mode "L", or "RGB" if the file has colours. Its `info["note"]` says what was read in another way
        than the header says. `info["window"]` of a grey image is its `grey.Window`, or None.

    Raises:
        ImageError: pydicom is not installed, or the file is not one complete X-ray. The message holds no values from
            the header except numbers about the form of the pixels, and names defined by DICOM. It names no file.
    """
    with _reading():
        header = _read(content, [*NEEDED, *OPTIONAL])
        apply_groups(header)
        note = check(header, max_pixels)
        pixels, photometric = decode(header)
        if photometric in GREYS:
            shown, applied = as_grey(pixels, header, window)
        elif window is None:
            shown, applied = as_colour(pixels, header), None
        else:
            raise ImageError("in colour, so it has no window; leave it out")
        image = Image.fromarray(shown)
        image.format = FORMAT
        image.info = {"photometric": photometric, "window": applied} | ({} if note is None else {"note": note})
        return image


def size_of(path: str | os.PathLike) -> tuple[int, int]:
    """Return the width and height in pixels, by the header.

    Raises:
        ImageError: see `open_dicom`; `value` is the path.
        OSError: the file cannot be read.
    """
    with _reading(path):
        header = _first(path, ["Rows", "Columns"])
        return int(header.Columns), int(header.Rows)


def patient_key(path: str | os.PathLike) -> str | None:
    """Return a hash of a file's PatientID, salted so that it is valid in this process only.

    Files with the same PatientID have the same key. The ID cannot be computed from it.

    Returns:
        None for a file that is not DICOM, that cannot be read (the reader of the pixels reports that), or that has no
        PatientID.
    """
    if not has_mark(path):
        return None
    try:
        with _reading():
            element = _first(path, ["PatientID"]).get_item("PatientID")
            identifier = b"" if element is None else bytes(element.value or b"").strip(b" \0").upper()
    except (ImageError, OSError):
        return None
    return hashlib.blake2b(identifier, key=_SALT, digest_size=16).hexdigest() if identifier else None


def identifiers_of(path: str | os.PathLike, names: Sequence[str] = IDENTIFIERS) -> dict[str, str | None]:
    """Return the values of elements of the header, which are patient data; None for one that a file lacks.

    All are None for a file that is not DICOM, or that cannot be read (the reader of the pixels reports that).
    """
    values: dict[str, str | None] = dict.fromkeys(names)
    if not has_mark(path):
        return values
    try:
        with _reading():
            header = _first(path, sorted(names, key=_pydicom().tag.Tag))
            for name in names:
                values[name] = shown(header.get(name, "") or "", 64).strip() or None  # (PS3.5, 6.2: UI and SH)
    except (ImageError, OSError):
        return dict.fromkeys(names)
    return values


@contextmanager
def _reading(path: str | os.PathLike | None = None) -> Iterator[None]:
    """Turn every error about a DICOM file into an `ImageError` without values of the header, and log nothing."""
    _thread.reading = True
    try:
        yield
    except ImageError as error:
        raise ImageError(error.message, value=path) from None
    except Exception as error:  # pydicom and the decoders raise errors of any class for a broken file
        if isinstance(error, OSError) and error.errno is not None:  # pydicom's own OSErrors have no number
            raise
        raise ImageError(f"broken DICOM file ({type(error).__name__})", value=path) from None
    finally:
        _thread.reading = False


@functools.cache
def _pydicom() -> Any:
    """Import pydicom, and suppress its warnings and log records while this module reads."""
    try:
        import pydicom
        import pydicom.filereader
        import pydicom.pixels.processing
    except ImportError:
        raise ImageError(f"a DICOM file; to read it, {INSTALL}") from None
    warnings.filterwarnings("ignore", module="pydicom|libjpeg|openjpeg")
    # a filter of a logger does not apply to the records of its children
    for name in [*logging.root.manager.loggerDict]:
        if name.partition(".")[0] in ("pydicom", "pylibjpeg", "libjpeg", "openjpeg"):
            logging.getLogger(name).addFilter(_unless_reading)
    return pydicom


def _unless_reading(record: logging.LogRecord) -> bool:
    return not getattr(_thread, "reading", False)


def _read(content: bytes, keywords: list[str], stop: Callable | None = None) -> "Dataset":
    """Read these elements of a file, and its file meta information."""
    pydicom = _pydicom()
    tags = [pydicom.tag.Tag(keyword) for keyword in keywords]
    content = _inflated(content)
    if any(content.count(item) > MAX_ITEMS for item in (b"\xfe\xff\0\xe0", b"\xff\xfe\xe0\0")):
        raise ImageError(f"more than {MAX_ITEMS:,} items in its sequences; no X-ray has that many")
    header = pydicom.filereader.read_partial(io.BytesIO(content), stop, specific_tags=tags)
    for tag in tags:  # an empty element means the same as none, and pydicom's functions fail on it
        if tag in header and header.get_item(tag).value in EMPTY:
            del header[tag]
    return header


def _first(path: str | os.PathLike, keywords: list[str]) -> "Dataset":
    """Read these elements, in most files without reading the whole file. The last keyword has the highest tag."""
    passed = []  # tags above the last one

    def stop(tag: int, vr: str | None, length: int) -> bool:
        if tag > last:
            passed.append(tag)
        return bool(passed)

    last = _pydicom().tag.Tag(keywords[-1])
    with open(path, "rb") as stream:
        content = stream.read(HEAD)
        with suppress(Exception):  # pydicom's, if a sequence before these elements is cut short
            header = _read(content, keywords, stop)
            if passed or len(content) < HEAD:
                return header
        passed.clear()
        return _read(content + stream.read(), keywords, stop)


def _inflated(content: bytes) -> bytes:
    """Return the file without deflate compression, or unchanged if it has none.

    pydicom can inflate as well, but without a limit on memory, so it must never receive a deflated file.
    """
    if DEFLATED.encode() not in content:
        return content
    pydicom = _pydicom()
    implicit = content[136:138].decode("latin-1") not in pydicom.valuerep.STANDARD_VR  # so pydicom decides
    stream = io.BytesIO(content)
    stream.seek(132)
    meta = pydicom.filereader.read_dataset(stream, implicit, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") != DEFLATED:
        return content
    start, inflate = stream.tell(), zlib.decompressobj(-zlib.MAX_WBITS)
    rest = inflate.decompress(content[start:], MAX_BYTES)
    if inflate.unconsumed_tail:
        raise ImageError(f"deflated, from more than {MAX_BYTES:,} bytes; no X-ray is like that")
    return content[:start].replace(DEFLATED.encode(), b"1.2.840.10008.1.2.1\0\0\0") + rest
