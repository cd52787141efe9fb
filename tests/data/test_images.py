"""Every kind of picture opens as the same eight-bit grey image, or is refused by name."""

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image

from xray_fastai.data.image_facts import examine
from xray_fastai.data.images import open_image
from xray_fastai.system.errors import ImageError

RAMP = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (48, 1))  # (48, 64): dark on the left


def saved(path, image, **options):
    image.save(path, **options)
    return path


def grey(source):
    return np.asarray(open_image(source)).astype(int)


GREY, COLOUR, DEEP = ["L", "LA", "1"], ["RGB", "RGBA", "P", "CMYK"], ["I;16", "I"]
STORABLE = [(kind, mode) for kind in ("png", "tif") for mode in GREY + COLOUR + DEEP if (kind, mode) != ("png", "CMYK")]


@pytest.mark.parametrize(
    ("kind", "mode"), [*STORABLE, ("jpeg", "L"), ("jpeg", "RGB"), ("jpeg", "CMYK"), ("bmp", "RGB")]
)
def test_a_ramp_is_the_same_ramp_in_every_mode(tmp_path, kind, mode):
    ramp = RAMP if mode != "1" else np.where(RAMP > 127, 255, 0).astype(np.uint8)
    if mode in DEEP:
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
        image = image.convert("I") if (kind, mode) == ("tif", "I") else image
    else:
        image = Image.fromarray(ramp).convert(mode)
    path = saved(tmp_path / f"x.{kind}", image)
    assert np.abs(grey(path) - ramp).max() <= 4


def test_twelve_bits_in_a_file_of_sixteen_fill_the_range(tmp_path):
    image = Image.fromarray((RAMP.astype(np.uint32) * 4095 // 255).astype(np.uint16))
    assert np.abs(grey(saved(tmp_path / "x.png", image)) - RAMP).max() <= 1


def test_transparency_is_black(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert grey(saved(tmp_path / "x.png", image)).max() == 0


def test_exif_rotation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[274] = 3  # upside down
    path = saved(tmp_path / "x.jpeg", Image.fromarray(RAMP[:, ::-1]), exif=exif, quality=95)
    assert np.abs(grey(path) - RAMP).max() <= 4


@pytest.mark.parametrize(
    "array",
    [
        RAMP,
        RAMP / 255.0,
        RAMP[..., None],
        RAMP[None],
        np.stack([RAMP] * 3, -1),
        np.stack([RAMP] * 3),
        RAMP * np.uint16(257),
    ],
    ids=["uint8", "float", "HW1", "1HW", "HW3", "3HW", "uint16"],
)
def test_arrays(array):
    assert np.abs(grey(array) - RAMP).max() <= 1


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3, 4, 5)), np.zeros((0, 4)), np.full((4, 4), np.nan), np.full((4, 4), -1.0)]
)
def test_arrays_that_are_no_image(array):
    with pytest.raises(ImageError):
        open_image(array)


def test_a_jpeg_is_decoded_at_the_smallest_scale_that_covers_the_size(tmp_path):
    path = saved(tmp_path / "x.jpeg", Image.fromarray(RAMP).resize((1600, 1200)), quality=95)
    small = np.asarray(open_image(path, 64)).astype(int)
    whole = np.asarray(open_image(path).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert small.shape == (64, 64)
    assert np.abs(small - whole).max() <= 3


def broken(kind):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(stream, "JPEG")
    content = stream.getvalue()
    animation = io.BytesIO()
    frames = [Image.new("L", (8, 8), value) for value in (0, 255)]
    frames[0].save(animation, "WEBP", save_all=True, append_images=frames[1:])
    return {
        "truncated": (content[: len(content) // 2], "truncated"),
        "zero": (b"", "0 bytes"),
        "text": (b"no image at all", "not an image"),
        "animated": (animation.getvalue(), "2 frames"),
    }[kind]


@pytest.mark.parametrize("kind", ["truncated", "zero", "text", "animated"])
@pytest.mark.parametrize("reader", [open_image, examine])
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, kind, reader):
    content, word = broken(kind)
    path = tmp_path / "broken.jpeg"
    path.write_bytes(content)
    with pytest.raises(ImageError) as error:
        reader(path)
    assert str(error.value).startswith(f"{path}: ") and word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    path = saved(tmp_path / "bomb.png", Image.new("1", (20_000, 20_000)))
    with pytest.raises(ImageError, match=r"bomb\.png"):
        open_image(path)


def test_a_tiff_of_many_directories_takes_no_time():
    """Counting them takes Pillow time as their square: over a minute for these."""
    stream = io.BytesIO()
    Image.new("L", (4, 4)).save(stream, "TIFF")
    content = bytearray(stream.getvalue())
    (at,) = struct.unpack("<I", content[4:8])
    (entries,) = struct.unpack("<H", content[at : at + 2])
    end = at + 2 + 12 * entries
    directory = bytes(content[at:end])
    struct.pack_into("<I", content, end, len(content))
    content += b"".join(
        directory + struct.pack("<I", len(content) + (i + 1) * (len(directory) + 4)) for i in range(99_999)
    )
    content += directory + bytes(4)
    started = time.perf_counter()
    with pytest.raises(ImageError, match="several frames"):
        open_image(bytes(content))
    assert time.perf_counter() - started < 5


def test_missing_and_folder(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "x.jpeg")
    with pytest.raises(ImageError, match="folder"):
        open_image(tmp_path)


def test_identical_files_have_one_digest(tmp_path):
    a, b = (saved(tmp_path / f"{n}.png", Image.fromarray(RAMP)) for n in "ab")
    c = saved(tmp_path / "c.png", Image.fromarray(RAMP.T))
    assert examine(a).digest == examine(b).digest != examine(c).digest
