"""Pictures that were read wrongly without a word, or refused: deep ones, several pages, metadata, blank, names."""

import io
import os
import struct
import unicodedata
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.conftest import draw_collection
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.audit.check import check_data
from xray_fastai.data.dataset import read_collection
from xray_fastai.data.folders import find_images, read_split
from xray_fastai.data.image_facts import examine
from xray_fastai.data.images import check_not_blank, contrast_of, open_image
from xray_fastai.data.splits import hold_out
from xray_fastai.system.errors import ImageError, UserError

y, x = np.mgrid[0:224, 0:224]
WAVES = 0.5 + 0.4 * np.sin(x / 40) * np.cos(y / 31)
EIGHT, TWELVE = (WAVES * 255).round().astype(np.uint8), (WAVES * 4095).round().astype(np.uint16)


def encoded(array, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def check(source, least=128):
    """Check that a source shows `WAVES`, in at least so many greys."""
    opened = np.asarray(open_image(source)).astype(float)
    assert np.corrcoef(opened.ravel(), WAVES.ravel())[0, 1] > 0.99
    assert len(np.unique(opened)) >= least
    return opened


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14, 16])
@pytest.mark.parametrize("outlier", [None, 256, 4096, 65535])
def test_the_range_of_deep_pictures_has_no_steps(bits, outlier):
    deep = (WAVES * (2**bits - 1)).round().astype(np.uint16)
    if outlier is not None:
        deep[0, 0] = outlier
    for source in (encoded(deep), encoded(deep, "TIFF"), deep, deep.astype(np.int64), deep.astype(np.float32)):
        check(source)


def test_a_picture_of_8_bits_stays_as_it_is():
    assert (check(EIGHT) == EIGHT).all() and (check(encoded(EIGHT)) == EIGHT).all()


def test_floats_that_end_a_little_beyond():
    check(WAVES / WAVES.max() * 1.000001)
    check((WAVES - WAVES.min()) / np.ptp(WAVES) - 1e-6)
    check(encoded((WAVES / WAVES.max() * 1.000001).astype(np.float32), "TIFF"))
    with pytest.raises(ImageError, match="from 0 up"):
        open_image(WAVES - 0.5)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_white_is_zero(kind):
    """TIFF 6.0, p. 37. Pillow itself turns 8 bits when it writes them."""
    turned = {np.uint8: EIGHT, np.uint16: 65535 - 16 * TWELVE, np.float32: (1 - WAVES).astype(np.float32)}[kind]
    check(encoded(turned, "TIFF", tiffinfo={262: 0}))


def pages(*pictures, kinds):
    """A TIFF whose pages have these NewSubfileTypes."""
    stream = io.BytesIO()
    first, *others = [Image.fromarray(picture) for picture in pictures]
    for picture, subfile in zip((first, *others), kinds, strict=True):
        picture.encoderinfo = {"tiffinfo": {254: subfile}}
    first.save(stream, "TIFF", save_all=True, append_images=others, tiffinfo={254: kinds[0]})
    return stream.getvalue()


def test_the_primary_picture_of_several():
    small = np.full((30, 30), 7, np.uint8)
    mpo = encoded(EIGHT, "MPO", save_all=True, append_images=[Image.fromarray(small)])
    assert check(mpo).shape == (224, 224)
    for order, kinds in (((EIGHT, small), (0, 1)), ((small, EIGHT), (1, 0))):
        content = pages(*order, kinds=kinds)
        assert check(content).shape == (224, 224)
    with pytest.raises(ImageError, match="several frames"):
        open_image(pages(EIGHT, small, kinds=(0, 0)))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


BOMB = zlib.compress(bytes(100_000_000))


@pytest.mark.parametrize(
    "chunk",
    [
        chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB),
        chunk(b"zTXt", b"k\0\7xx"),
        chunk(b"iCCP", b"k\0\0" + BOMB),
        chunk(b"iCCP", b"k\0\7xx"),
        chunk(b"pHYs", b"x"),
        chunk(b"gAMA", b""),
        chunk(b"eXIf", b"MM\0*garbage"),
    ],
    ids=lambda content: content[4:8].decode(),
)
def test_metadata_of_a_png_do_not_refuse_it(chunk, tmp_path):
    content = encoded(EIGHT)
    for broken in (content[:33] + chunk + content[33:], content[:-12] + chunk + content[-12:]):
        assert (check(broken) == EIGHT).all()
        (tmp_path / "x.png").write_bytes(broken)
        assert examine(tmp_path / "x.png").width == 224


def test_metadata_of_a_jpeg_do_not_refuse_it_and_it_is_turned_by_the_orientation_alone():
    """The second tag's offset is behind the end: Pillow cannot write such EXIF again."""
    entries = struct.pack("<HHII", 274, 3, 1, 6) + struct.pack("<HHII", 0x9286, 2, 4, 0xFFFFFF)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    content = encoded(np.rot90(EIGHT), "JPEG", quality=95)
    for marker, data in ((b"\xff\xe1", exif), (b"\xff\xe2", b"ICC_PROFILE\0\5")):
        content = content[:2] + marker + struct.pack(">H", len(data) + 2) + data + content[2:]
    assert np.abs(check(content) - EIGHT).max() <= 5


def test_one_tone_is_blank():
    for value in (0, 90, 255):
        with pytest.raises(ImageError, match="blank"):
            check_not_blank(contrast_of(open_image(np.full((50, 40), value, np.uint8))))
    check_not_blank(contrast_of(open_image(EIGHT)))


@pytest.fixture
def data(tmp_path):
    return draw_collection(tmp_path / "data", {f"train/{name}": 20 for name in ("NORMAL", "PNEUMONIA")})


def test_a_blank_picture_is_refused_by_a_fit_and_named_by_data_check(data):
    Image.new("L", (96, 96)).save(data / "train" / "NORMAL" / "black.png")
    with pytest.raises(UserError, match=r"black\.png: blank"):
        read_collection(FitConfig(data=str(data)).with_recipe())
    (finding,) = [finding for finding in check_data(data).findings if finding.kind == "blank"]
    assert finding.severity == "error" and finding.files[0].name == "train/NORMAL/black.png"


def test_links_to_folders_are_entered_once(data):
    folder = data / "train" / "NORMAL"
    before = find_images(folder)
    for name in ("self", "again", "zzz"):
        os.symlink(".", folder / name)
    os.symlink("..", folder / "up")
    assert find_images(folder) == before
    assert len(check_data(data).images) == 40


def test_names_of_jpegs_and_files_that_are_not_taken(data):
    folder = data / "train" / "NORMAL"
    for number, path in enumerate(sorted(folder.iterdir())[:15]):
        path.rename(path.with_suffix(".jfif" if number < 12 else ".xyz"))
    _, collection = read_collection(FitConfig(data=str(data)).with_recipe())
    assert len(collection.table) == 37
    assert any("3 files" in note and "not read" in note for note in collection.notes)


def test_classes_are_compared_in_composed_form(tmp_path):
    name = "Pneumonie infectée"
    forms = {split: unicodedata.normalize(form, name) for split, form in (("train", "NFC"), ("test", "NFD"))}
    root = draw_collection(
        tmp_path / "data", {f"{split}/{label}": 5 for split, form in forms.items() for label in ("Normal", form)}
    )
    train = read_split(root, "train")
    test = read_split(root, "test", sorted(train.label.unique()))
    assert set(test.label) == set(train.label) and all(map(os.path.exists, test.path))
    assert not {"surplus-class", "missing-class"} & {finding.kind for finding in check_data(root).findings}


@pytest.mark.parametrize("patients", [2, 3, 5, 9, 30])
@pytest.mark.parametrize("fraction", [0.05, 0.1])
def test_a_class_of_few_patients_does_not_hold_out_more(patients, fraction):
    few = [f"b{i % patients}" for i in range(40)]
    table = pd.DataFrame({"label": ["A"] * 400 + ["B"] * 40, "patient": [f"a{i}" for i in range(400)] + few})
    table = table.assign(path=table.index.astype(str), image=range(len(table)))
    for seed in range(5):
        held_out = hold_out(table, fraction, seed)
        assert 0.4 * fraction <= held_out.mean() <= 2 * fraction
        assert not set(table.patient[held_out]) & set(table.patient[~held_out])
        assert table.label[held_out].nunique() == table.label[~held_out].nunique() == 2
