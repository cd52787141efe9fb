"""Removes metadata from PNG and JPEG files, for a second attempt where Pillow stumbles over them.

Pillow reads colour profiles, texts and resolutions before the pixels, and refuses a file for a fault in them. None
of them is needed here.
"""

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
KEPT_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf")
"""What makes the picture (PNG, third edition, 11.2 and 11.3.1.1), and what turns it upright (11.3.3.5)."""
JFIF_BYTES = 16  # the least length of its segment (T.871, 10.1)
KEPT_SEGMENTS = (0xE0, 0xE1, 0xEE)
"""APP0, JFIF; APP1, where EXIF has the orientation; and APP14, where Adobe has the colours (T.872, 6.5.3)."""


def without_metadata(content: bytes) -> bytes | None:
    """Return a PNG or JPEG file without what its picture does not need; None if there is nothing to remove."""
    if content.startswith(PNG):
        bare = _bare_png(content)
    elif content.startswith(JPEG):
        bare = _bare_jpeg(content)
    else:
        return None
    return bare if bare != content else None


def _bare_png(content: bytes) -> bytes:
    kept, at = [PNG], len(PNG)
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] in KEPT_CHUNKS:
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def _bare_jpeg(content: bytes) -> bytes:
    kept, at = [JPEG], len(JPEG)
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] not in (0xD9, 0xDA):
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        end = at + 2 + length
        cut = marker == 0xE0 and length < JFIF_BYTES
        if not 0xE0 <= marker <= 0xEF or (marker in KEPT_SEGMENTS and not cut):
            kept.append(content[at:end])
        at = end
    return b"".join([*kept, content[at:]])
