"""Pictures of more than 8 bits keep their greys, whatever file or array they come in."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from xray_fastai.data.depth import eight_bits
from xray_fastai.data.image_facts import examine
from xray_fastai.data.images import open_image
from xray_fastai.data.sources.phantom import draw
from xray_fastai.system.errors import ImageError

DRAWN = np.asarray(draw(np.random.default_rng(3), None, 224))
"""A drawn X-ray (224, 224), 50,176 pixels of 8 bits."""
PICTURE = DRAWN / 255.0
GREYS = len(np.unique(DRAWN))


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def tiff(array, photometric=1, **options):
    """Save as TIFF with this PhotometricInterpretation (tag 262): 0 is WhiteIsZero, 1 is BlackIsZero."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "TIFF", **options)
    content = bytearray(stream.getvalue())
    at = content.index((262).to_bytes(2, "little") + b"\3\0\1\0\0\0")
    content[at + 8] = photometric
    return bytes(content)


def as_integers(largest, kind=np.uint16):
    return np.rint(PICTURE * largest).astype(kind)


def with_pixel(array, value):
    array = array.copy()
    array[5, 5] = value
    return array


def check_same_picture(source, expected=PICTURE, greys=GREYS, least=0.999):
    found = np.asarray(open_image(source))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > least
    assert len(np.unique(found)) >= greys


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize(
    "array",
    [as_integers(255, np.uint8), as_integers(65535), as_integers(4095), PICTURE.astype(np.float32)],
    ids=["8 bits", "16 bits", "12 of 16 bits", "float"],
)
def test_white_is_zero_in_a_tiff(array, compression):
    check_same_picture(tiff(array, 0, compression=compression), 1 - PICTURE)
    check_same_picture(tiff(array, 1, compression=compression))


def test_a_palette_in_a_tiff_may_be_inverted():
    image = Image.fromarray(DRAWN).convert("P")
    image.putdata(list(DRAWN.ravel()))
    image.putpalette([255 - i // 3 for i in range(768)])
    stream = io.BytesIO()
    image.save(stream, "TIFF")
    check_same_picture(stream.getvalue(), 1 - PICTURE)


@pytest.mark.parametrize("largest", [1e-3, 0.5, 1.0, 1.000001, 1.5, 255.0, 65535.0])
def test_floats_of_any_largest_value(largest):
    array = PICTURE / PICTURE.max() * largest
    check_same_picture(array)
    check_same_picture(tiff(array.astype(np.float32)))


@pytest.mark.parametrize("largest", [255, 256, 1023, 4095, 4096, 16383, 65535])
def test_integers_of_any_depth_in_16_bits(largest):
    for source in (as_integers(largest), png(as_integers(largest)), tiff(as_integers(largest))):
        check_same_picture(source)


@pytest.mark.parametrize("value", [4095, 4096, 16384, 65535])
def test_one_pixel_costs_at_most_a_third_of_the_greys(value):
    array = with_pixel(as_integers(4095), value)
    for source in (array, png(array), tiff(array), np.stack([array] * 3, -1), array / 4095.0):
        check_same_picture(source, greys=GREYS * 2 // 3)


def png_of_colours(array):
    """Save (H, W, 3) of 16 bits as PNG, which Pillow does not write (PNG, 11.2.2: depth 16, colour type 2)."""
    height, width = array.shape[:2]

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_of_colours(array, order, deflated):
    """Save (H, W, 3) of 16 bits as TIFF, in this order of bytes: < or >."""
    height, width = array.shape[:2]
    data = array.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if deflated else data
    data += bytes(len(data) % 2)
    bits = 8 + len(data)
    values = {256: width, 257: height, 259: 8 if deflated else 1, 262: 2, 273: 8, 277: 3, 278: height, 279: len(data)}
    entries = {tag: struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in values.items()}
    entries[258] = struct.pack(f"{order}HHII", 258, 3, 3, bits)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", bits + 6) + data + struct.pack(f"{order}3H", 16, 16, 16) + directory


@pytest.mark.parametrize("largest", [255, 4095, 65535])
def test_colours_of_16_bits_keep_all_of_them(largest, tmp_path):
    array = np.stack([as_integers(largest)] * 3, -1)
    tiffs = [tiff_of_colours(array, order, deflated) for order in "<>" for deflated in (False, True)]
    for content in (png_of_colours(array), *tiffs):
        (tmp_path / "picture").write_bytes(content)
        for source in (content, tmp_path / "picture"):
            check_same_picture(source)
            found, expected = (np.asarray(open_image(given)).astype(int) for given in (source, as_integers(largest)))
            assert np.abs(found - expected).max() <= 1
        assert examine(tmp_path / "picture").contrast > 30


def test_brightness_has_no_steps():
    """One pixel above 255, 4095 or 65535 changes nothing but itself."""
    for edge in (255, 4095, 65534):
        below, above = (np.asarray(open_image(with_pixel(as_integers(edge), edge + more))) for more in (0, 1))
        assert np.abs(below.astype(int) - above).max() <= 1


@pytest.mark.parametrize("array", [DRAWN, np.stack([DRAWN] * 3, -1), np.zeros((9, 9), np.uint8)])
def test_eight_bits_stay_bit_for_bit(array):
    assert (eight_bits(array) == array).all()


@pytest.mark.parametrize("value", [-0.5, np.nan, np.inf])
def test_values_that_no_detector_gives_are_refused(value):
    with pytest.raises(ImageError, match="values from"):
        open_image(with_pixel(PICTURE, value))


def test_an_overshoot_below_zero_is_rounding():
    check_same_picture(with_pixel(PICTURE, -1e-3))
