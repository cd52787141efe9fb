"""A JPEG that is cut short or takes too long is refused, and every complete one is read."""

import io
import re
import time

import numpy as np
import pytest
from PIL import Image

from xray_fastai.data.image_facts import examine
from xray_fastai.data.images import open_image
from xray_fastai.data.jpeg import MAX_SCANS
from xray_fastai.system.errors import ImageError

y, x = np.mgrid[0:300, 0:260]
WAVES = (128 + 60 * np.sin(x / 40) + 50 * np.cos(y / 31)).round().astype(np.uint8)
KINDS = [{}, {"progressive": True}, {"restart_marker_blocks": 20}, {"optimize": True}]


def jpeg(pixels=WAVES, mode="L", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_data_that_end_early_at_a_marker(options, mode, tmp_path):
    """libjpeg fills the rest with grey, and Pillow says nothing."""
    content = jpeg(mode=mode, **options)
    start = content.rindex(b"\xff\xda")
    for share in (0.1, 0.5, 0.9):
        cut = content[: start + int(share * (len(content) - start))] + b"\xff\xd9"
        Image.open(io.BytesIO(cut)).load()
        (tmp_path / "cut.jpeg").write_bytes(cut)
        with pytest.raises(ImageError, match="cut short"):
            open_image(cut)
        if "progressive" in options:
            continue
        with pytest.raises(ImageError, match="cut short"):
            open_image(cut, 32)
        with pytest.raises(ImageError, match="cut short"):
            examine(tmp_path / "cut.jpeg")


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("pixels", [WAVES, np.full_like(WAVES, 128), np.where(x > 130, 128, WAVES).astype(np.uint8)])
def test_complete_data(options, pixels):
    for mode in ("L", "RGB", "CMYK"):
        content = jpeg(pixels, mode, **options)
        for complete in (content, content + b"\0" * 100, content + jpeg()):  # cameras append a preview
            assert open_image(complete).size == (260, 300)
            assert open_image(complete, 32).size == (32, 32)


def test_a_few_bytes_that_claim_a_large_picture():
    content = bytearray(jpeg(WAVES[:16, :16]))
    size = re.search(rb"\xff\xc0..\x08", content, re.DOTALL).end()
    content[size : size + 4] = (6300).to_bytes(2, "big") * 2
    with pytest.raises(ImageError, match="cut short"):
        open_image(bytes(content))


def test_too_many_scans_are_not_decoded():
    content = jpeg(np.full((3000, 3000), 90, np.uint8), progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    before = content.count(b"\xff\xda")
    assert open_image(content[:-2] + (MAX_SCANS - before) * last + content[-2:]).size == (3000, 3000)
    start = time.process_time()
    with pytest.raises(ImageError, match=f"more than {MAX_SCANS} scans"):
        open_image(content[:-2] + 2000 * last + content[-2:])
    assert time.process_time() - start < 1


def test_too_many_scans_in_a_tiff_are_not_decoded():
    picture = np.full((1000, 1000), 90, np.uint8)
    content = jpeg(picture, progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    for scans, outcome in ((0, (1000, 1000)), (2 * MAX_SCANS, None)):
        data = content[:-2] + scans * last + content[-2:]
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "TIFF", compression="jpeg", strip_size=10**6)
        opened = Image.open(stream)
        held, tags = stream.getvalue(), opened.tag_v2
        assert len(tags[273]) == 1
        tiff = bytearray(held + data)
        for tag, value in ((273, len(held)), (279, len(data))):
            at = tiff.index(tag.to_bytes(2, "little") + b"\4\0\1\0\0\0")
            tiff[at + 8 : at + 12] = value.to_bytes(4, "little")
        if outcome is None:
            with pytest.raises(ImageError, match=f"more than {MAX_SCANS} scans"):
                open_image(bytes(tiff))
        else:
            assert open_image(bytes(tiff)).size == outcome


def test_a_long_and_narrow_picture_is_not_decoded():
    stream = io.BytesIO()
    Image.new("L", (1, 5_000_000)).save(stream, "PNG")
    start = time.process_time()
    with pytest.raises(ImageError, match="1 x 5000000 pixels; no X-ray"):
        open_image(stream.getvalue())
    assert time.process_time() - start < 0.5
    assert open_image(np.zeros((80, 10), np.uint8)).size == (10, 80)
