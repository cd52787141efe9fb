"""Check a compressed image's own size and end, before a decoder allocates memory for it.

A decoder believes its stream: a JPEG of a hundred bytes may claim 65,535 x 65,535 pixels. libjpeg fills the missing
part of a truncated JPEG or JPEG-LS with grey, without an error. Formats: JPEG, ITU-T T.81, B.2; JPEG-LS, ITU-T T.87,
C.2; JPEG 2000, ITU-T T.800, A.5; DICOM's RLE, PS3.5, annex G.
"""

import re
from typing import TYPE_CHECKING

from xray_fastai.system.errors import ImageError

if TYPE_CHECKING:
    from pydicom.uid import UID

ALONE = {0x01, *range(0xD0, 0xD9)}  # JPEG's markers without a segment
FRAMES = {0xF7, 0xDE, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers that hold the size of a frame or of several
JPEG_LS, LOSSLESS = 0xF7, (0xC3, 0xC7, 0xCB, 0xCF)
MARKER, SOS, EOI = re.compile(rb"\xff+([\xc0-\xcf\xd8-\xfe])"), b"\xda", b"\xd9"
"""A marker among the data of a scan, where FF 00, and in JPEG-LS FF 00 to FF 7F, are data."""
SOT = b"\xff\x90"
TRUNCATED = "its pixel data are truncated"


def syntax_of(stream: bytes, labelled: "UID") -> "UID | None":
    """Return the transfer syntax of a compressed stream by its first bytes.

    Args:
        stream: the whole stream.
        labelled: the transfer syntax in the header. It is returned if the stream may have it.

    Returns:
        None if the stream is of no known kind.
    """
    from pydicom import uid

    if _start_of_jpeg2000(stream) is not None:
        return labelled if labelled in uid.JPEG2000TransferSyntaxes else uid.JPEG2000
    if (at := _frame_of(stream)) is not None:
        kind, precision = stream[at + 1], stream[at + 4]
        if kind == JPEG_LS:
            kinds = uid.JPEGLSTransferSyntaxes
        elif kind in LOSSLESS:
            kinds = [uid.JPEGLossless, uid.JPEGLosslessSV1]
        elif precision == 8:
            kinds = [uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit]
        else:
            kinds = [uid.JPEGExtended12Bit]
        return labelled if labelled in kinds else kinds[0]
    segments = int.from_bytes(stream[:4], "little")  # RLE's header: their number, and where the first one begins
    return uid.RLELossless if 1 <= segments <= 15 and stream[4:8] == b"\x40\0\0\0" else None


def check_jpeg(stream: bytes, shape: tuple[int, int, int]) -> int:
    """Check that a JPEG or JPEG-LS has the size in the header.

    Args:
        stream: the whole stream; anything may follow its end.
        shape: height, width and samples a pixel, by the DICOM header.

    Returns:
        Where the data of the last scan end.

    Raises:
        ImageError: the size differs, or there is no scan. The message names no file.
    """
    if (at := _frame_of(stream)) is None:
        raise ImageError("its pixel data are not JPEG, although the header says so")
    height, width = (int.from_bytes(stream[i : i + 2], "big") for i in (at + 5, at + 7))
    _check_shape((height, width, stream[at + 9]), shape)
    end = None
    while (marker := MARKER.search(stream, at)) is not None and marker[1] != EOI:
        at = marker.end()
        at += int.from_bytes(stream[at : at + 2], "big")
        if marker[1] == SOS:
            following = MARKER.search(stream, at)
            end = following.start() if following else len(stream)
    if end is None:
        raise ImageError(TRUNCATED)
    return end


def check_jpeg2000(stream: bytes, shape: tuple[int, int, int]) -> bytes:
    """Check that a JPEG 2000 has the size in the header, and that no part of a tile is missing.

    Args and errors are those of `check_jpeg`.

    Returns:
        The codestream up to its end, with the marker EOC, which its decoder requires.
    """
    start = _start_of_jpeg2000(stream)
    if start is None or len(stream) < start + 42:
        raise ImageError("its pixel data are not JPEG 2000, although the header says so")
    x, y, x0, y0 = (int.from_bytes(stream[i : i + 4], "big") for i in range(start + 8, start + 24, 4))
    _check_shape((y - y0, x - x0, int.from_bytes(stream[start + 40 : start + 42], "big")), shape)
    at = start + 2
    while stream[at : at + 1] == b"\xff" and stream[at : at + 2] != SOT and at + 4 <= len(stream):
        at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    while stream[at : at + 2] == SOT:
        length = int.from_bytes(stream[at + 6 : at + 10], "big")
        if length < 14:  # 0: the last part, up to EOC
            return stream[start:]
        at += length
    if at > len(stream):
        raise ImageError(TRUNCATED)
    return stream[start:at] + b"\xff\xd9"


def check_rle(stream: bytes, shape: tuple[int, int, int]) -> bytes:
    """Check that no segment expands to more bytes than there are pixels, except for one byte of padding.

    Args and errors are those of `check_jpeg`.

    Returns:
        The stream without zeros after its last segment.
    """
    pixels, header = shape[0] * shape[1], [int.from_bytes(stream[i : i + 4], "little") for i in range(0, 64, 4)]
    starts, at = header[1 : 1 + min(header[0], 15)], len(stream)
    for start, end in zip(starts, [*starts[1:], len(stream)], strict=True):
        at, length = start, 0
        while at < end - 1 and length < pixels:
            count = stream[at]
            at += 2 if count > 128 else 1 if count == 128 else count + 2
            length += 257 - count if count > 128 else 0 if count == 128 else count + 1
        if length > pixels + 1 or stream[at:end].strip(b"\0"):
            raise ImageError("its pixel data hold more pixels than its header says")
    return stream[: at + at % 2]


def _frame_of(stream: bytes) -> int | None:
    """Return where the marker of the frame of a JPEG or JPEG-LS stands, or None if there is none."""
    at = 2  # the position of the next marker
    while stream[:2] == b"\xff\xd8" and at + 10 <= len(stream) and stream[at] == 0xFF:
        kind = stream[at + 1]
        if kind in FRAMES:
            return at
        if kind == 0xFF:  # fill bytes before a marker
            at += 1
        else:
            at += 2 if kind in ALONE else 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return None


def _start_of_jpeg2000(stream: bytes) -> int | None:
    """Return where the codestream begins, or None if there is none."""
    start = 0
    if stream[4:8] == b"jP  ":  # boxes of a JP2 file: some programs write them, although DICOM does not allow it
        while stream[start + 4 : start + 8] not in (b"jp2c", b""):
            start += max(8, int.from_bytes(stream[start : start + 4], "big"))
        start += 8
    return start if stream[start : start + 4] == b"\xff\x4f\xff\x51" else None


def _check_shape(decoded: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    if decoded != shape:
        by_pixels, by_header = (f"{width} x {height} x {samples}" for height, width, samples in (decoded, shape))
        raise ImageError(f"its pixel data are {by_pixels}, its header says {by_header} (width, height, samples)")
