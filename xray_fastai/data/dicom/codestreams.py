"""Check a compressed image's own size and end, before a decoder allocates memory for it.

A decoder believes its stream: a JPEG of a hundred bytes may claim 65,535 x 65,535 pixels. libjpeg fills the missing
part of a truncated JPEG or JPEG-LS with grey, without an error. Formats: JPEG, ITU-T T.81, B.2; JPEG-LS, ITU-T T.87,
C.2; JPEG 2000, ITU-T T.800, A.5; DICOM's RLE, PS3.5, annex G.
"""

from random import Random

from xray_fastai.system.errors import ImageError

ALONE = {0x01, *range(0xD0, 0xD9)}  # JPEG's markers without a segment
FRAMES = {0xF7, 0xDE, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers that hold the size of a frame or of several
TRUNCATED = "its pixel data are truncated"
FILLERS = tuple(bytes(Random(seed).choices(range(255), k=64)) for seed in (0, 1))
"""A decoder skips them after complete data, and decodes them where data are missing."""


ITEM = b"\xfe\xff\0\xe0"
JPEG, END, JPEG2000, JP2 = b"\xff\xd8", b"\xff\xd9", b"\xff\x4f\xff\x51", b"jP  "
SYNTAXES = {
    0xC0: "1.2.840.10008.1.2.4.50",  # baseline
    0xC1: "1.2.840.10008.1.2.4.51",  # extended sequential
    0xC3: "1.2.840.10008.1.2.4.57",  # lossless
    0xF7: "1.2.840.10008.1.2.4.80",  # JPEG-LS
}
"""The transfer syntax of a JPEG by the marker of its frame (T.81, table B.1; T.87, C.1.1)."""
SUCCESSORS = {
    0xC0: ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"),
    0xC1: ("1.2.840.10008.1.2.4.51",),
    0xC3: ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"),
    0xF7: ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"),
}
"""The transfer syntaxes that may be written for it."""
FAMILY_2000 = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 92, 93, 201, 202, 203))


def codestream(data: bytes) -> bytes | None:
    """Return the one frame of encapsulated pixel data (PS3.5, A.4), or None if they are not encapsulated.

    All fragments make one frame, so the basic offset table, which is wrong in some files, is not needed.
    """
    if data[:2] == JPEG or data[:4] == JPEG2000:  # some programs leave the items out
        return data
    at, fragments = 0, []
    while data[at : at + 4] == ITEM and at + 8 <= len(data):
        start = at + 8
        at = start + int.from_bytes(data[at + 4 : start], "little")
        fragments.append(data[start:at])
    return b"".join(fragments[1:]) if len(fragments) > 1 else None


def syntax_of(stream: bytes, syntax: str) -> str:
    """Return the transfer syntax that a codestream has: that of the header, unless the stream is of another kind."""
    if stream[:4] == JPEG2000 or stream[4:8] == JP2:
        return syntax if syntax in FAMILY_2000 else "1.2.840.10008.1.2.4.91"
    if stream[:2] != JPEG:
        return syntax
    kind = _frame(stream)[0]
    return syntax if kind is None or syntax in SUCCESSORS.get(kind, (syntax,)) else SYNTAXES[kind]


def without_trailer(stream: bytes) -> bytes:
    """Return a JPEG or JPEG-LS without the bytes after its last end marker; they mean nothing."""
    end = stream.rfind(END)
    return stream if end < 0 else stream[: end + 2]


def endings(stream: bytes) -> list[bytes]:
    """Return a JPEG or JPEG-LS as often as it must be decoded to know that it is complete.

    One with its end marker is decoded once. Without it, the data may be complete or not. They are if the picture is the
    same with the marker, and with bytes of any value (`FILLERS`) before the marker.
    """
    return [stream] if stream.endswith(END) else [stream + filler + END for filler in (b"", *FILLERS)]


def _frame(stream: bytes) -> tuple[int | None, int]:
    """Return the marker of a JPEG's frame, or None, and where its segment begins."""
    at = 2  # the position of the next marker
    while at + 10 <= len(stream) and stream[at] == 0xFF:
        kind = stream[at + 1]
        if kind in FRAMES:
            return kind, at
        if kind == 0xFF:  # fill bytes before a marker
            at += 1
        else:
            at += 2 if kind in ALONE else 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return None, at


def check_jpeg(stream: bytes, shape: tuple[int, int, int]) -> None:
    """Check that a JPEG or JPEG-LS has the size in the header.

    Args:
        stream: the whole stream.
        shape: height, width and samples a pixel, by the DICOM header.

    Raises:
        ImageError: the size differs. The message names no file.
    """
    kind, at = _frame(stream) if stream[:2] == JPEG else (None, 0)
    if kind is None:
        raise ImageError("its pixel data are not JPEG, although the header says so")
    height, width = (int.from_bytes(stream[i : i + 2], "big") for i in (at + 5, at + 7))
    _check_shape((height, width, stream[at + 9]), shape)


def check_jpeg2000(stream: bytes, shape: tuple[int, int, int]) -> None:
    """Check that a JPEG 2000 has the size in the header. Its decoder reports a missing end.

    Args and errors are those of `check_jpeg`.
    """
    start = 0
    if stream[4:8] == JP2:  # boxes of a JP2 file: some programs write them, although DICOM does not allow it
        while stream[start + 4 : start + 8] not in (b"jp2c", b""):
            start += max(8, int.from_bytes(stream[start : start + 4], "big"))
        start += 8
    if stream[start : start + 4] != b"\xff\x4f\xff\x51" or len(stream) < start + 42:
        raise ImageError("its pixel data are not JPEG 2000, although the header says so")
    x, y, x0, y0 = (int.from_bytes(stream[i : i + 4], "big") for i in range(start + 8, start + 24, 4))
    _check_shape((y - y0, x - x0, int.from_bytes(stream[start + 40 : start + 42], "big")), shape)


def check_rle(stream: bytes, shape: tuple[int, int, int]) -> None:
    """Check that no segment expands to more bytes than there are pixels, except for one byte of padding.

    Args and errors are those of `check_jpeg`.
    """
    pixels, header = shape[0] * shape[1], [int.from_bytes(stream[i : i + 4], "little") for i in range(0, 64, 4)]
    starts = header[1 : 1 + min(header[0], 15)]
    for start, end in zip(starts, [*starts[1:], len(stream)], strict=True):
        at, length = start, 0
        while at < end - 1 and length <= pixels + 1:
            count = stream[at]
            at += 2 if count > 128 else 1 if count == 128 else count + 2
            length += 257 - count if count > 128 else 0 if count == 128 else count + 1
        if length > pixels + 1:
            raise ImageError("its pixel data hold more pixels than its header says")


def _check_shape(decoded: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    if decoded != shape:
        by_pixels, by_header = (f"{width} x {height} x {samples}" for height, width, samples in (decoded, shape))
        raise ImageError(f"its pixel data are {by_pixels}, its header says {by_header} (width, height, samples)")
