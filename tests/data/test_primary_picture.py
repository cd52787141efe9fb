"""Of a file with a preview the primary picture is read; metadata turn a picture upright, and refuse none."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from xray_fastai.data.image_facts import examine
from xray_fastai.data.images import open_image
from xray_fastai.data.sources.phantom import draw
from xray_fastai.system.errors import ImageError

PICTURE = draw(np.random.default_rng(3), None, 224).crop((0, 0, 224, 160))
PREVIEW = PICTURE.resize((56, 40))


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff_of(*pages):
    """Save pages with their NewSubfileType (tag 254): 1 is a reduced picture of another, 4 a mask."""
    stream = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(stream, True) as writer:
        for image, kind in pages:
            image.save(writer, "TIFF", tiffinfo={254: kind})
            writer.newFrame()
        return stream.getvalue()


def check_picture(tmp_path, content, expected=PICTURE):
    found = open_image(content)
    assert found.size == expected.size
    assert np.corrcoef(np.ravel(found), np.ravel(expected))[0, 1] > 0.995
    path = tmp_path / "picture"
    path.write_bytes(content)
    facts = examine(path)
    assert (facts.width, facts.height) == expected.size


@pytest.mark.parametrize("progressive", [False, True])
def test_of_a_jpeg_with_a_preview_the_first_picture_is_read(tmp_path, progressive):
    content = saved(PICTURE, "MPO", save_all=True, append_images=[PREVIEW], quality=95, progressive=progressive)
    check_picture(tmp_path, content)


@pytest.mark.parametrize(
    "pages",
    [[(PICTURE, 0), (PREVIEW, 1)], [(PREVIEW, 1), (PICTURE, 0)], [(PICTURE, 0), (PREVIEW, 4)]],
    ids=["reduced", "reduced first", "mask"],
)
def test_of_a_tiff_with_a_reduced_picture_or_a_mask_the_primary_one_is_read(tmp_path, pages):
    check_picture(tmp_path, tiff_of(*pages))


@pytest.mark.parametrize("kind", [0, 2])
def test_a_tiff_of_two_pages_is_refused(kind):
    with pytest.raises(ImageError, match="several frames"):
        open_image(tiff_of((PICTURE, kind), (PICTURE, kind)))


TURNED = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: np.rot90,
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_every_orientation(tmp_path, kind, orientation):
    stored = Image.fromarray(np.ascontiguousarray(TURNED[orientation](np.asarray(PICTURE))))
    exif = Image.Exif()
    exif[274] = orientation
    check_picture(tmp_path, saved(stored, kind, exif=exif, quality=95))


def with_segment(marker, data, image=PICTURE):
    content = saved(image, "JPEG", quality=95)
    return content[:2] + bytes([255, marker]) + struct.pack(">H", len(data) + 2) + data + content[2:]


def with_chunk(kind, data, checksum_off_by=0):
    content, chunk = saved(PICTURE, "PNG"), kind + data
    checksum = zlib.crc32(chunk) ^ checksum_off_by
    return content[:33] + struct.pack(">I", len(data)) + chunk + struct.pack(">I", checksum) + content[33:]


def exif_of(*entries):
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


ODD = {
    "EXIF cut short": with_segment(0xE1, b"Exif\0\0II*\0"),
    "EXIF of noise": with_segment(0xE1, b"Exif\0\0" + b"\xff" * 40),
    "orientation of 99": with_segment(0xE1, exif_of(struct.pack("<HHII", 274, 3, 1, 99))),
    "profile of noise": with_segment(0xE2, b"ICC_PROFILE\0\x01\x07noise"),
    "empty profile": with_segment(0xE2, b"ICC_PROFILE\0"),
    "JFIF cut short": with_segment(0xE0, b"JFIF"),
    "Photoshop cut short": with_segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed" + bytes(5)),
    "no preview where it should be": with_segment(0xE2, b"MPF\0" + b"\xff" * 30),
    "PNG: EXIF of noise": with_chunk(b"eXIf", b"noise"),
    "PNG: empty profile": with_chunk(b"iCCP", b""),
    "PNG: text with a wrong checksum": with_chunk(b"tEXt", b"a\0b", 1),
    "PNG: a text of 70 MB": with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70_000_000))),
    **{f"PNG: {kind} cut short": with_chunk(kind.encode(), b"1") for kind in ("pHYs", "gAMA", "cHRM", "tIME")},
    "PNG: sRGB cut short": with_chunk(b"sRGB", b""),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("fault", ODD)
def test_no_metadata_refuse_a_picture(tmp_path, fault):
    check_picture(tmp_path, ODD[fault])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_metadata_that_cannot_be_rewritten_do_not_keep_a_picture_from_being_turned(tmp_path):
    entries = [struct.pack("<HHII", *entry) for entry in ((274, 3, 1, 3), (0x8769, 4, 1, 999_999))]
    check_picture(tmp_path, with_segment(0xE1, exif_of(*entries), PICTURE.rotate(180)))
