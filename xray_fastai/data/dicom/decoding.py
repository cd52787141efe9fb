"""Decode the stored values of a DICOM image, whatever its transfer syntax."""

from random import Random
from typing import TYPE_CHECKING

import numpy as np

from xray_fastai.data.dicom.codestreams import TRUNCATED, check_jpeg, check_jpeg2000, check_rle, syntax_of
from xray_fastai.data.jpeg import check_scans
from xray_fastai.system.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.pixels.decoders.base import Decoder
    from pydicom.uid import UID

INSTALL = 'pip install "xray-fastai[dicom]"'
FILLING = bytes(Random(0).choices(range(255), k=64))
ITEM = b"\xfe\xff\0\xe0"  # the tag before each part of an encapsulated stream (PS3.5, A.4)


def decode(header: "Dataset") -> tuple[np.ndarray, str]:
    """Decode the stored values.

    The pixel data decide how they are decoded, where the transfer syntax says something else: files whose pixels were
    compressed or expanded without a change of the header are common.

    Returns:
        An array (rows, columns) or (rows, columns, 3), and its photometric interpretation, one of `GREYS` or `COLOURS`.

    Raises:
        ImageError: the pixel data are truncated, broken, of another size than the header says, or of no known kind.
    """
    from pydicom import uid

    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax not in uid.UID_dictionary:
        raise ImageError("its file meta information names no known transfer syntax")
    if (stream := _stream(header)) is None:
        if syntax.is_encapsulated:
            syntax = uid.ExplicitVRLittleEndian
    elif (found := syntax_of(stream, syntax)) is not None:
        syntax = found
    elif not syntax.is_encapsulated:
        raise ImageError(f"its pixel data are not {syntax.name} as its header says, and of no known kind")
    header.file_meta.TransferSyntaxUID = syntax
    _decoder(syntax)
    shape = int(header.Rows), int(header.Columns), int(header.SamplesPerPixel)
    if stream is None:
        pixels, photometric = _decoded(header)
    elif syntax in uid.JPEG2000TransferSyntaxes:
        pixels, photometric = _decoded(header, check_jpeg2000(stream, shape))
    elif syntax == uid.RLELossless:
        pixels, photometric = _decoded(header, check_rle(stream, shape))
    else:
        pixels, photometric = _jpeg(header, stream, shape)
    if pixels.itemsize > 2 or (pixels.ndim == 3) != (photometric == "RGB"):
        raise ImageError(f"its pixel data are {photometric} of {8 * pixels.itemsize} bits, which is not supported")
    return _stored(pixels.astype(pixels.dtype.newbyteorder("="), copy=False), header), photometric


def _stream(header: "Dataset") -> bytes | None:
    """Return the compressed stream, or None if the pixels are not compressed.

    One frame needs no offsets, so a table of wrong ones does not matter (PS3.5, A.4).
    """
    from pydicom.encaps import generate_fragments

    element, syntax = header["PixelData"], header.file_meta.TransferSyntaxUID
    halves = 2 if header.PhotometricInterpretation == "YBR_FULL_422" else 3
    samples = int(header.Rows) * int(header.Columns) * int(header.SamplesPerPixel)
    expected = samples * int(header.BitsAllocated) // 8 * halves // 3
    if element.value[:4] == ITEM and (syntax.is_encapsulated or element.is_undefined_length):
        table, *fragments = generate_fragments(element.value)
        return b"".join(fragments) if fragments else table
    if len(element.value) >= expected:
        return None
    if syntax_of(element.value, syntax) is not None:  # a bare stream, without the items around it
        return element.value
    raise ImageError(f"{TRUNCATED} ({len(element.value):,} bytes of {expected:,})")


def _jpeg(header: "Dataset", stream: bytes, shape: tuple[int, int, int]) -> tuple[np.ndarray, str]:
    """Decode a JPEG or JPEG-LS, and check that nothing is missing at its end.

    libjpeg fills what is missing without an error. It ignores what follows complete data, and decodes what follows
    incomplete ones.
    """
    check_scans(stream)
    data = stream[: check_jpeg(stream, shape)]
    pixels, photometric = _decoded(header, data + b"\xff\xd9")
    filled, _ = _decoded(header, data + FILLING + b"\xff\xd9")
    if (filled != pixels).any():
        raise ImageError(TRUNCATED)
    return pixels, photometric


def _decoder(syntax: "UID") -> "Decoder":
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ImageError(f"its transfer syntax is {syntax.name}, which is not supported") from None
    if not decoder.is_available:
        raise ImageError(f"its transfer syntax is {syntax.name}; to read it, {INSTALL}")
    return decoder


def _decoded(header: "Dataset", stream: bytes | None = None) -> tuple[np.ndarray, str]:
    from pydicom import uid
    from pydicom.encaps import encapsulate

    syntax = header.file_meta.TransferSyntaxUID
    if stream is not None:
        header.PixelData = encapsulate([stream])
    # Pillow reports a truncated JPEG; pylibjpeg-rle panics on some broken streams, which no `except Exception` catches
    plugin = {uid.JPEGBaseline8Bit: "pillow", uid.RLELossless: "pydicom"}.get(syntax, "")
    try:
        pixels, properties = _decoder(syntax).as_array(
            header, index=0, decoding_plugin=plugin, number_of_frames=1, correct_unused_bits=False
        )
    except Exception as error:  # decoders raise errors of any class for a broken stream
        kind = type(error).__name__
        raise ImageError(f"its pixel data are broken, or not {syntax.name} as its header says ({kind})") from None
    return pixels, str(properties["photometric_interpretation"])


def _stored(pixels: np.ndarray, header: "Dataset") -> np.ndarray:
    """Return the values of the bits that count, those up to BitsStored (PS3.5, 8.1.1).

    A decoder returns all bits of its stream, which may have more: overlays, or no copies of the sign. JPEG's cosine
    transform keeps no bits apart, so there a larger value is a rounding error.
    """
    from pydicom import uid

    stored, signed = int(header.BitsStored), bool(header.PixelRepresentation)
    unused = 8 * pixels.itemsize - stored
    if unused <= 0:
        return pixels
    if header.file_meta.TransferSyntaxUID in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit) and not signed:
        return pixels.clip(0, 2**stored - 1)
    words = np.left_shift(pixels, unused).view(f"{'i' if signed else 'u'}{pixels.itemsize}")
    return np.right_shift(words, unused)
