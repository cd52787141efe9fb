"""Read one DICOM file as an 8-bit image, and its patient's identifier as a salted hash.

The header says what the pixels mean: which bits of a word are used, which values are padding, and how stored values
become what a screen shows (PS3.3, C.7.6.3, C.7.5.1.1.2, C.11.1 and C.11.2). pydicom's own functions do these steps.

Names, dates and identifiers in the header must not reach logs, reports and exports. This module therefore reads only
the elements that it needs. It suppresses pydicom's messages, which quote values. A patient is known by a hash with a
random salt, which no other process can compute again.
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

from xray_fastai.data.dicom.codestreams import (
    TRUNCATED,
    check_jpeg,
    check_jpeg2000,
    check_rle,
    codestream,
    endings,
    syntax_of,
    without_trailer,
)
from xray_fastai.data.dicom.grey import as_colour, as_grey
from xray_fastai.system.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

EXTENSIONS = (".dcm", ".dicom")
FORMAT = "DICOM"
"""Pillow's `format` of the images from this module. `info["photometric"]` is the PhotometricInterpretation."""
INSTALL = 'pip install "xray-fastai[dicom]"'
DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax's UID
MAX_BYTES, MAX_ITEMS = 500_000_000, 10_000
"""Limits on the size of an inflated file, and on the items of all sequences (pydicom takes 3 s and 60 MB for
100,000)."""
HEAD = 2**20
"""Bytes at the start of a file that hold the PatientID, and in most files everything but the pixels."""

NEEDED = (
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "PixelRepresentation",
)  # fmt: skip
OPTIONAL = (
    "NumberOfFrames", "HighBit", "PlanarConfiguration", "PixelPaddingValue", "PixelPaddingRangeLimit", "PixelData",
    "FloatPixelData", "DoubleFloatPixelData",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    *(f"{kind}PaletteColorLookupTableDescriptor" for kind in ("Red", "Green", "Blue")),
    *(f"{kind}PaletteColorLookupTableData" for kind in ("Red", "Green", "Blue")),
    *(f"Segmented{kind}PaletteColorLookupTableData" for kind in ("Red", "Green", "Blue")),
)  # fmt: skip
LOSSY = (
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.4.203",
)  # fmt: skip
"""The transfer syntaxes that may change values: JPEG baseline and extended, JPEG-LS near-lossless, JPEG 2000, HTJ2K."""
COLOURS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
GREYS = ("MONOCHROME1", "MONOCHROME2")
GROUPS = {
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
}
"""What the functional groups of an enhanced object say of its grey values (PS3.3, C.7.6.16.2.9 and C.7.6.16.2.10)."""

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


def open_dicom(content: bytes, max_pixels: int) -> Image.Image:
    """Read the one image of a DICOM file.

    Grey values go through the modality LUT or rescale, then the first VOI LUT or, without one, the first window.
    MONOCHROME1 is inverted. Padding is black. Without a LUT, and without a window of a usable width, black and white
    are the smallest and the largest value of the image, without padding. The full range of BitsStored would not do:
    an image with ten bits in a file that declares sixteen (many detectors' "for processing" images) would have 4 greys
    of 256. Colours stay as they are.

    Args:
        content: the bytes of the file.
        max_pixels: the number of pixels above which the image is refused.

    Returns:
        A PIL image of mode "L", or "RGB" if the file has colours.

    Raises:
        ImageError: pydicom is not installed, or the file is not one complete X-ray. The message holds no values from
            the header except numbers about the form of the pixels, and names defined by DICOM. It names no file.
    """
    with _reading():
        header = _read(content, [*NEEDED, *OPTIONAL])
        _check_values(header)
        _check(header, max_pixels)
        _take_functional_groups(header)
        pixels, photometric = _decode(header)
        image = Image.fromarray(as_grey(pixels, header) if photometric in GREYS else as_colour(pixels, header))
        image.format = FORMAT
        image.info = {"photometric": photometric}
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
        if tag in header and header.get_item(tag).value in (None, b"", ""):
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
    if DEFLATED not in content:
        return content
    if content[132:140] != b"\2\0\0\0UL\4\0":
        raise ImageError("deflated, with wrong file meta information")
    group = io.BytesIO(content[132:])
    read_dataset = _pydicom().filereader.read_dataset
    meta = read_dataset(group, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") != DEFLATED.decode():
        return content  # it mentions the UID, for example as that of another file
    start, inflate = 132 + group.tell(), zlib.decompressobj(-zlib.MAX_WBITS)
    if start != 144 + int.from_bytes(content[140:144], "little"):
        raise ImageError("deflated, with wrong file meta information")
    rest = inflate.decompress(content[start:], MAX_BYTES)
    if inflate.unconsumed_tail:
        raise ImageError(f"deflated from more than {MAX_BYTES:,} bytes; no X-ray is like that")
    return content[:start].replace(DEFLATED, b"1.2.840.10008.1.2.1\0\0\0") + rest


def _check_values(header: "Dataset") -> None:
    """Check that pydicom can convert every element's value: a NumberOfFrames of `1A` is none.

    Raises:
        ImageError: it names the element, not its value.
    """
    for tag in list(header.keys()):
        try:
            header[tag]
        except Exception:  # pydicom's, of any class
            keyword = _pydicom().datadict.keyword_for_tag(tag)
            raise ImageError(f"its {keyword} is no value of the kind that the standard defines") from None
    for keyword in ("NumberOfFrames", "WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"):
        try:
            np.ravel(header.get(keyword, 1)).astype(float)
        except (TypeError, ValueError):
            raise ImageError(f"its {keyword} is no number") from None


def _take_functional_groups(header: "Dataset") -> None:
    """Copy what the functional groups say of the one frame to the header: the shared ones, then the frame's own."""
    for sequence in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for groups in header.get(sequence, [])[:1]:
            for group, keywords in GROUPS.items():
                for item in groups.get(group, [])[:1]:
                    for keyword in keywords:
                        if keyword in item and item[keyword].value not in (None, ""):
                            header[keyword] = item[keyword]
    _check_values(header)


def _check(header: "Dataset", max_pixels: int) -> None:
    """Check that the header describes one X-ray, before memory is allocated.

    Raises:
        ImageError: it does not.
    """
    for keyword in ("FloatPixelData", "DoubleFloatPixelData"):
        if keyword in header:
            raise ImageError(f"its pixels are {keyword}; an X-ray has integers, in PixelData")
    if "PixelData" not in header:
        raise ImageError("a DICOM file without an image, or truncated: it has no PixelData")
    if missing := [keyword for keyword in NEEDED if keyword not in header]:
        raise ImageError(f"its header lacks {', '.join(missing)}")
    rows, columns, samples = int(header.Rows), int(header.Columns), int(header.SamplesPerPixel)
    if rows < 1 or columns < 1 or rows * columns > max_pixels:
        raise ImageError(f"{columns} x {rows} pixels; no X-ray is like that")
    if (frames := int(header.get("NumberOfFrames", 1))) > 1:
        raise ImageError(f"{frames} frames; split it into one image a file")
    allocated, stored = int(header.BitsAllocated), int(header.BitsStored)
    if allocated not in (8, 16) or not 1 <= stored <= allocated:
        raise ImageError(f"{stored} bits of {allocated} a pixel; an X-ray has 8 or 16")
    if int(header.get("HighBit", stored - 1)) != stored - 1:
        raise ImageError(f"HighBit {int(header.HighBit)} for {stored} bits a pixel; it must be {stored - 1}")
    palette = header.PhotometricInterpretation == "PALETTE COLOR"
    allowed = GREYS if samples == 1 and not palette else COLOURS
    if header.PhotometricInterpretation not in allowed or samples not in (1, 3):
        raise ImageError(f"{samples} samples a pixel, neither grey nor colours (PhotometricInterpretation)")
    if samples == 3 and "PlanarConfiguration" not in header:
        header.PlanarConfiguration = 0
    # PS3.3, C.8.11.3.1: IDENTITY with MONOCHROME2, INVERSE with MONOCHROME1. Of a pair that contradicts itself, viewers
    # believe either element, so half of them would show the negative.
    pair = header.PhotometricInterpretation, header.get("PresentationLUTShape")
    if pair in (("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")):
        raise ImageError(f"its PhotometricInterpretation {pair[0]} and its PresentationLUTShape {pair[1]} contradict")


def _decode(header: "Dataset") -> tuple[np.ndarray, str]:
    """Decode the stored values.

    Returns:
        An array (rows, columns) or (rows, columns, 3), and its photometric interpretation, one of `GREYS` or `COLOURS`.
    """
    from pydicom import uid
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder

    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax not in uid.UID_dictionary:
        raise ImageError("its file meta information names no known transfer syntax")
    shape = int(header.Rows), int(header.Columns), int(header.SamplesPerPixel)
    halves = 2 if header.PhotometricInterpretation == "YBR_FULL_422" else 3
    native = shape[0] * shape[1] * shape[2] * int(header.BitsAllocated) // 8 * halves // 3
    data = header.PixelData
    stream = codestream(data) if header["PixelData"].is_undefined_length or len(data) < native else None
    if stream is not None:
        syntax = uid.UID(syntax_of(stream, syntax))
    elif syntax.is_encapsulated and len(data) - native in (0, 1):
        syntax = uid.ExplicitVRLittleEndian  # as PS3.5, A.4 asks of all encapsulated syntaxes but for the pixels
    header.file_meta.TransferSyntaxUID = syntax
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ImageError(f"its transfer syntax is {syntax.name}, which is not supported") from None
    if not decoder.is_available:
        raise ImageError(f"its transfer syntax is {syntax.name}; to read it, {INSTALL}")
    streams: list[bytes | None] = [None]
    if decoder.is_native:
        if len(data) < native:
            raise ImageError(f"{TRUNCATED} ({len(data):,} bytes of {native:,})")
    elif stream is None:
        raise ImageError(f"its pixel data are not encapsulated, as {syntax.name} needs")
    else:
        streams = [stream]
        if syntax in uid.JPEG2000TransferSyntaxes:
            check_jpeg2000(stream, shape)
        elif syntax == uid.RLELossless:
            check_rle(stream, shape)
        else:
            check_jpeg(stream, shape)
            streams = endings(without_trailer(stream))
    # Pillow reports a truncated JPEG; pylibjpeg-rle panics on some broken streams, which no `except Exception` catches
    plugin = {uid.JPEGBaseline8Bit: "pillow", uid.RLELossless: "pydicom"}.get(syntax, "")
    decoded: list[tuple[np.ndarray, dict]] = []
    try:
        for stream in streams:
            if stream is not None:  # in one fragment, whatever the offset table said
                header.PixelData = encapsulate([stream])
            decoded.append(decoder.as_array(header, index=0, decoding_plugin=plugin, number_of_frames=1))
    except Exception as error:  # decoders raise errors of any class for a broken stream
        kind = type(error).__name__
        if len(streams) > 1:  # without its end marker
            raise ImageError(TRUNCATED) from None
        raise ImageError(f"its pixel data are broken, or not {syntax.name} as its header says ({kind})") from None
    (pixels, properties), *filled = decoded
    if any((pixels != other).any() for other, _ in filled):
        raise ImageError(TRUNCATED)
    photometric = str(properties["photometric_interpretation"])
    if pixels.itemsize > 2 or (pixels.ndim == 3) != (photometric == "RGB"):
        raise ImageError(f"its pixel data are {photometric} of {8 * pixels.itemsize} bits, which is not supported")
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    return (_stored_bits(pixels, header) if photometric in GREYS else pixels), photometric


def _stored_bits(pixels: np.ndarray, header: "Dataset") -> np.ndarray:
    """Keep BitsStored bits of each value, with their sign (PS3.5, 8.1.1).

    A codestream may have more bits: an overlay in the upper ones, or negative values whose sign ends at BitsStored.
    A lossy codestream overshoots by a few values instead, which are clipped.
    """
    bits, signed = int(header.BitsStored), int(header.PixelRepresentation)
    least, most = -(signed << (bits - 1)), 2 ** (bits - signed) - 1
    low, high = int(pixels.min()), int(pixels.max())
    if least <= low and high <= most:
        return pixels
    slack = 2**bits // 16
    lossy = header.file_meta.TransferSyntaxUID in LOSSY
    if lossy and least - slack <= low and high <= most + slack:
        return pixels.clip(least, most)
    values = pixels.astype(np.int32) & (2**bits - 1)
    values -= (values & signed << (bits - 1)) << 1
    return values.astype(np.int16 if signed else np.uint16)
