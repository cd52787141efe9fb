"""A DICOM file becomes one eight-bit X-ray, and who it shows becomes a key that tells nothing.

What its pixels mean stands in its header: which bits of a word count, what is no picture (padding), and the way from
stored values to what a screen shows (PS3.3, C.7.6.3, C.7.5.1.1.2, C.11.1 and C.11.2), which pydicom's own functions go.

Names, dates and identifiers of the header are not for logs, reports and exports. So no more of it is read than is
needed, what pydicom says of it reaches nobody (its texts quote values), and a patient is known by a hash that no other
process can make again.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from xray_fastai.data.dicom.codestreams import CUT, check_jpeg, check_jpeg2000, check_rle
from xray_fastai.data.dicom.grey import as_colour, as_grey
from xray_fastai.system.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

EXTENSIONS = (".dcm", ".dicom")
FORMAT = "DICOM"
"""What the images made here have for Pillow's `format`; `info["photometric"]` is how the file holds grey or colour."""
INSTALL = 'pip install "xray-fastai[dicom]"'
DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax's UID
MOST_BYTES, MOST_ITEMS = 500_000_000, 10_000
"""What a deflated file may become; and items in all sequences, of which pydicom takes 3 s and 60 MB for 100,000."""
HEAD = 2**20
"""Bytes from the start in which a patient, and mostly all but the pixels, stand."""

NEEDED = (
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "PixelRepresentation",
)  # fmt: skip
OPTIONAL = (
    "NumberOfFrames", "HighBit", "PlanarConfiguration", "PixelPaddingValue", "PixelPaddingRangeLimit", "PixelData",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    *(f"{kind}PaletteColorLookupTableDescriptor" for kind in ("Red", "Green", "Blue")),
    *(f"{kind}PaletteColorLookupTableData" for kind in ("Red", "Green", "Blue")),
    *(f"Segmented{kind}PaletteColorLookupTableData" for kind in ("Red", "Green", "Blue")),
)  # fmt: skip
COLOURS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
GREYS = ("MONOCHROME1", "MONOCHROME2")

_SALT = secrets.token_bytes(32)
_here = threading.local()  # `.reading`: this thread is in pydicom


def has_mark(source: bytes | str | os.PathLike) -> bool:
    """Whether bytes, or a file, have DICOM's mark behind a preamble of 128 bytes; what can't be read has none."""
    if isinstance(source, bytes):
        return source[128:132] == b"DICM"
    try:
        if not stat.S_ISREG(os.stat(source).st_mode):  # to open a pipe may take for ever
            return False
        with open(source, "rb", buffering=0) as stream:
            return has_mark(stream.read(132))
    except OSError:
        return False


def open_dicom(content: bytes, name: str, most: int) -> Image.Image:
    """Read the one image of a DICOM file.

    Grey goes through the modality LUT or rescale, then the first VOI LUT or, without one, the first window; MONOCHROME1
    is inverted; padding is black. Without a LUT or window, or with one of no width, black and white are the least and
    the largest value of the picture, padding aside: over all that BitsStored could hold, ten bits in a file that
    declares sixteen (many detectors' "for processing" images) would be 4 greys of 256. Colour comes as it is.

    Args:
        content: of the file.
        name: of the file, for errors.
        most: pixels that it may have.

    Returns:
        A PIL image of mode "L", or "RGB" where the file has colours.

    Raises:
        ImageError: pydicom is not installed, or it is not one whole X-ray; no value of the header but numbers on the
            form of its pixels, and names of DICOM's own, are in the text.
    """
    with _reading(name):
        header = _read(content, [*NEEDED, *OPTIONAL])
        _check(header, most)
        pixels, photometric = _decode(header)
        image = Image.fromarray(as_grey(pixels, header) if photometric in GREYS else as_colour(pixels, header))
        image.format = FORMAT
        image.info = {"photometric": photometric}
        return image


def size_of(path: str | os.PathLike) -> tuple[int, int]:
    """Width and height in pixels, by the header.

    Raises:
        ImageError: as `open_dicom`.
        OSError: it can't be read.
    """
    with _reading(os.fspath(path)):
        header = _first(path, ["Rows", "Columns"])
        return int(header.Columns), int(header.Rows)


def patient_key(path: str | os.PathLike) -> str | None:
    """What files with one PatientID share in this process, and in no other; it can't be turned back into the ID.

    Returns:
        None: no DICOM file, one that can't be read (which its pixels' reader says), or one that names no patient.
    """
    if not has_mark(path):
        return None
    try:
        with _reading(""):
            element = _first(path, ["PatientID"]).get_item("PatientID")
            identifier = b"" if element is None else bytes(element.value or b"").strip(b" \0").upper()
    except (ImageError, OSError):
        return None
    return hashlib.blake2b(identifier, key=_SALT, digest_size=16).hexdigest() if identifier else None


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Whatever goes wrong with a DICOM file becomes one error without values of the header, and nothing is logged."""
    _here.reading = True
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # pydicom and the decoders raise whatever a broken file leads them to
        if isinstance(error, OSError) and error.errno is not None:  # pydicom's own have no number
            raise
        raise ImageError(f"{name}: broken DICOM file ({type(error).__name__})") from None
    finally:
        _here.reading = False


@functools.cache
def _pydicom() -> Any:
    """pydicom, told to keep quiet while this module reads."""
    try:
        import pydicom
        import pydicom.filereader
        import pydicom.pixels.processing
    except ImportError:
        raise ImageError(f"a DICOM file; to read such, {INSTALL}") from None
    warnings.filterwarnings("ignore", module="pydicom|libjpeg|openjpeg")
    for name in [*logging.root.manager.loggerDict]:  # a logger's filter is not asked for its children's records
        if name.partition(".")[0] in ("pydicom", "pylibjpeg", "libjpeg", "openjpeg"):
            logging.getLogger(name).addFilter(_unless_reading)
    return pydicom


def _unless_reading(record: logging.LogRecord) -> bool:
    return not getattr(_here, "reading", False)


def _read(content: bytes, keywords: list[str], stop: Callable | None = None) -> "Dataset":
    """These elements of a file, and its file meta information."""
    pydicom = _pydicom()
    tags = [pydicom.tag.Tag(keyword) for keyword in keywords]
    content = _inflated(content)
    if any(content.count(item) > MOST_ITEMS for item in (b"\xfe\xff\0\xe0", b"\xff\xfe\xe0\0")):
        raise ImageError(f"more than {MOST_ITEMS:,} items in its sequences; no X-ray has so many")
    header = pydicom.filereader.read_partial(io.BytesIO(content), stop, specific_tags=tags)
    for tag in tags:  # empty is as good as absent, and pydicom's functions fall over it
        if tag in header and header.get_item(tag).value in (None, b"", ""):
            del header[tag]
    return header


def _first(path: str | os.PathLike, keywords: list[str]) -> "Dataset":
    """These elements, the last of which is the highest tag; mostly without reading all of the file."""
    passed = []

    def stop(tag: int, vr: str | None, length: int) -> bool:
        if tag > last:
            passed.append(tag)
        return bool(passed)

    last = _pydicom().tag.Tag(keywords[-1])
    with open(path, "rb") as stream:
        content = stream.read(HEAD)
        with suppress(Exception):  # pydicom's, where a sequence before them is cut short
            header = _read(content, keywords, stop)
            if passed or len(content) < HEAD:
                return header
        passed.clear()
        return _read(content + stream.read(), keywords, stop)


def _inflated(content: bytes) -> bytes:
    """A deflated file as it would be without. pydicom does so too, but takes all the memory that a bomb asks for, so it
    must not get to see one."""
    if DEFLATED not in content:
        return content
    start = 144 + int.from_bytes(content[140:144], "little")
    meta, opened = content[:start], zlib.decompressobj(-zlib.MAX_WBITS)
    if content[132:140] != b"\2\0\0\0UL\4\0" or DEFLATED not in meta or DEFLATED in content[start:]:
        raise ImageError("deflated, with file meta information that is not as it should be")
    rest = opened.decompress(content[start:], MOST_BYTES)
    if opened.unconsumed_tail or DEFLATED in rest:
        raise ImageError(f"deflated, from more than {MOST_BYTES:,} bytes or twice; no X-ray is like that")
    return meta.replace(DEFLATED, b"1.2.840.10008.1.2.1\0\0\0") + rest


def _check(header: "Dataset", most: int) -> None:
    """See that the header tells of one X-ray, before memory is taken.

    Raises:
        ImageError: it doesn't.
    """
    if "PixelData" not in header:
        raise ImageError("a DICOM file without an image, or cut short: it has no PixelData")
    if missing := [keyword for keyword in NEEDED if keyword not in header]:
        raise ImageError(f"its header lacks {', '.join(missing)}")
    rows, columns, samples = int(header.Rows), int(header.Columns), int(header.SamplesPerPixel)
    if rows < 1 or columns < 1 or rows * columns > most:
        raise ImageError(f"{columns} x {rows} pixels; no X-ray is like that")
    if (frames := int(header.get("NumberOfFrames", 1))) > 1:
        raise ImageError(f"{frames} frames; split it into one image a file")
    allocated, stored = int(header.BitsAllocated), int(header.BitsStored)
    if allocated not in (8, 16) or not 1 <= stored <= allocated:
        raise ImageError(f"{stored} bits of {allocated} a pixel; an X-ray has 8 or 16")
    if int(header.get("HighBit", stored - 1)) != stored - 1:
        raise ImageError(f"HighBit {int(header.HighBit)} for {stored} bits a pixel; it has to be {stored - 1}")
    palette = header.PhotometricInterpretation == "PALETTE COLOR"
    of = GREYS if samples == 1 and not palette else COLOURS
    if header.PhotometricInterpretation not in of or samples not in (1, 3):
        raise ImageError(f"{samples} samples a pixel that are neither grey nor colours (PhotometricInterpretation)")


def _decode(header: "Dataset") -> tuple[np.ndarray, str]:
    """The stored values (rows, columns) or (rows, columns, 3), and what they are: one of `GREYS` or of `COLOURS`."""
    from pydicom import uid
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder

    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax not in uid.UID_dictionary:
        raise ImageError("its file meta information names no transfer syntax that is known")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ImageError(f"its transfer syntax is {syntax.name}, which is not read") from None
    if not decoder.is_available:
        raise ImageError(f"its transfer syntax is {syntax.name}; to read it, {INSTALL}")
    shape = int(header.Rows), int(header.Columns), int(header.SamplesPerPixel)
    if decoder.is_native:
        halves = 2 if header.PhotometricInterpretation == "YBR_FULL_422" else 3
        expected = shape[0] * shape[1] * shape[2] * int(header.BitsAllocated) // 8 * halves // 3
        if len(header.PixelData) < expected:
            raise ImageError(f"{CUT} ({len(header.PixelData):,} bytes of {expected:,})")
    else:
        stream = get_frame(header.PixelData, 0, number_of_frames=1)
        check = check_rle if syntax == uid.RLELossless else check_jpeg
        (check_jpeg2000 if syntax in uid.JPEG2000TransferSyntaxes else check)(stream, shape)
    # Pillow's JPEG tells of a torn end; pylibjpeg-rle panics on some broken streams, past any `except Exception`
    plugin = {uid.JPEGBaseline8Bit: "pillow", uid.RLELossless: "pydicom"}.get(syntax, "")
    try:
        pixels, told = decoder.as_array(header, index=0, decoding_plugin=plugin, number_of_frames=1)
    except Exception as error:  # decoders raise whatever a broken stream leads them to
        kind = type(error).__name__
        raise ImageError(f"its pixel data are broken, or not {syntax.name} as its header says ({kind})") from None
    photometric = str(told["photometric_interpretation"])
    if pixels.itemsize > 2 or (pixels.ndim == 3) != (photometric == "RGB"):
        raise ImageError(f"its pixel data are {photometric} of {8 * pixels.itemsize} bits, which is not read")
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False), photometric
