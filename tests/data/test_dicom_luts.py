"""Look-up tables of DICOM files: the right greys, or the name of the element that is wrong."""

import numpy as np
import pytest

from xray_fastai.data.images import open_image
from xray_fastai.system.errors import ImageError

pytest.importorskip("pydicom", reason='pip install "xray-fastai[test]" brings pydicom')

from pydicom import uid

from tests.data.dicom_files import RAMP, content_of, grey, header_of, lut, written

STORED = (RAMP * 64 + 20).astype(np.uint16)  # 12 bits
CURVE = (((np.arange(4096) / 4095) ** 2) * 4095).round().astype(int)
SYNTAXES = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian]


def words(values, syntax):
    return np.asarray(values).astype(">u2" if syntax == uid.ExplicitVRBigEndian else "<u2").tobytes()


def swapped(stored, syntax):
    """The pixels as the file has them."""
    return stored.astype(">u2" if syntax == uid.ExplicitVRBigEndian else "<u2")


def palette(count, first, bits, data, **more):
    elements = dict(more)
    for colour in ("Red", "Green", "Blue"):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [count, first, bits]
        elements[f"{colour}PaletteColorLookupTableData"] = data
    return elements


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize("as_bytes", [True, False])
@pytest.mark.parametrize(
    ("count", "found", "bits"),
    [(4096, 4095, 12), (4096, 4097, 12), (4096, 2048, 12), (4096, 1, 12), (4096, 2048, 16), (4096, 2047, 8)],
)
def test_a_table_of_another_length_is_refused_by_the_elements_name(sequence, as_bytes, count, found, bits):
    data = np.resize(CURVE, found)
    item = lut(count, 0, bits, data.astype(np.uint16).tobytes() if as_bytes else data.tolist())
    with pytest.raises(
        ImageError, match=r"LUT cannot be applied: LUTData holds [\d,]+ entries, LUTDescriptor says 4,096"
    ):
        open_image(written(STORED, bits=12, **{sequence: item}))


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize("keyword", ["LUTData", "LUTDescriptor"])
@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_table_without_data_or_descriptor_is_refused_by_name(sequence, keyword, kind):
    item = lut(4096, 0, 12, CURVE.tolist())
    if kind == "missing":
        del item[0][keyword]
    else:
        item[0][keyword].value = None
    with pytest.raises(ImageError, match=f"LUT cannot be applied: {keyword} is missing or empty"):
        open_image(written(STORED, bits=12, **{sequence: item}))


def test_a_palette_of_another_length_is_refused_by_name():
    stored = (RAMP * 4).astype(np.uint8)
    for bits, length in ((8, 254), (8, 128), (16, 510), (16, 256)):
        with pytest.raises(ImageError, match="palette cannot be applied: RedPaletteColorLookupTableData holds"):
            open_image(written(stored, kind="PALETTE COLOR", **palette(256, 0, bits, bytes(length))))
    elements = palette(256, 0, 8, bytes(256))
    del elements["GreenPaletteColorLookupTableData"]
    with pytest.raises(ImageError, match="GreenPaletteColorLookupTableData is missing"):
        open_image(written(stored, kind="PALETTE COLOR", **elements))


@pytest.mark.parametrize("count", [255, 256])
def test_a_palette_of_bytes_or_words_whatever_number_they_are(count):
    stored = (RAMP * 4).astype(np.uint8)
    turned = np.arange(count, dtype=np.uint16)[::-1]
    expected = turned[stored.clip(0, count - 1)]
    for bits, data in (
        (8, turned.astype(np.uint8).tobytes() + bytes(count % 2)),
        (8, turned.tobytes()),
        (16, (turned * 257).tobytes()),
        (16, turned.tobytes()),  # bytes in words that are said to have 16 bits
    ):
        opened = grey(written(stored, kind="PALETTE COLOR", **palette(count, 0, bits, data)))
        assert np.abs(opened - expected).max() <= 1


def test_a_palette_for_signed_pixels_begins_below_zero():
    stored = (RAMP * 4 - 128).astype(np.int16)
    data = np.arange(256, dtype=np.uint8).tobytes()
    for first in (-128, 65408):
        ds = header_of(stored, kind="PALETTE COLOR")
        for colour in ("Red", "Green", "Blue"):
            ds.add_new(f"{colour}PaletteColorLookupTableDescriptor", "SS" if first < 0 else "US", [256, first, 8])
            setattr(ds, f"{colour}PaletteColorLookupTableData", data)

        assert np.abs(grey(content_of(ds)) - RAMP * 4).max() <= 1


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("written_as", ["SS", "US"])
@pytest.mark.parametrize("data", ["words", "list"])
def test_a_voi_lut_begins_below_zero_where_the_rescaled_values_do(syntax, written_as, data):
    """PS3.3, C.11.2.1.1: the second value is signed where the input may be negative."""
    item = lut(4096, 0, 12, words(CURVE, syntax) if data == "words" else CURVE.tolist())
    item[0].add_new("LUTDescriptor", written_as, [4096, -1024 if written_as == "SS" else 64512, 12])
    ds = header_of(
        swapped(STORED, syntax), bits=12, syntax=syntax,
        RescaleSlope=1, RescaleIntercept=-1024, VOILUTSequence=item,
    )  # fmt: skip

    opened = grey(content_of(ds))
    assert np.abs(opened - CURVE[STORED] * 255 / 4095).max() <= 0.5 and len(np.unique(opened)) > 50


@pytest.mark.parametrize("written_as", ["SS", "US"])
def test_a_modality_lut_begins_below_zero_where_the_pixels_are_signed(written_as):
    item = lut(4096, 0, 12, CURVE.tolist())
    item[0].add_new("LUTDescriptor", written_as, [4096, -2048 if written_as == "SS" else 63488, 12])
    stored = (STORED.astype(int) - 2048).astype(np.int16)
    opened = grey(written(stored, bits=12, ModalityLUTSequence=item, WindowCenter=2048, WindowWidth=4096))
    assert np.abs(opened - CURVE[STORED] * 255 / 4095).max() <= 1


def test_a_table_from_above_32767_is_not_taken_for_negative_where_no_value_is():
    stored = (40_000 + RAMP * 64).astype(np.uint16)
    item = lut(4096, 40_000, 12, CURVE.tolist())
    opened = grey(written(stored, VOILUTSequence=item))
    assert np.abs(opened - CURVE[stored - 40_000] * 255 / 4095).max() <= 0.5


def test_a_table_that_begins_below_all_values_keeps_its_sign():
    item = lut(4096 + 100, 0, 12, np.r_[np.zeros(100, int), CURVE].tolist())
    item[0].add_new("LUTDescriptor", "SS", [4096 + 100, -100, 12])
    opened = grey(written(STORED, bits=12, VOILUTSequence=item))
    assert np.abs(opened - CURVE[STORED] * 255 / 4095).max() <= 0.5


@pytest.mark.parametrize(
    ("bits", "low", "high", "white"),
    [
        (8, 31, 159, 255),  # as the standard says
        (8, 0, 100, 255),
        (16, 0, 30_000, 65_535),
        (16, 0, 4095, 4095),  # 12 bits that are said to be 16: 16 greys of 256 otherwise
        (16, 0, 255, 255),
        (12, 0, 65_535, 65_535),  # 16 bits that are said to be 12
    ],
)
def test_the_range_of_a_voi_lut_is_the_descriptors_unless_its_entries_show_otherwise(bits, low, high, white):
    """PS3.3, C.11.2.1.1: 0 to 2^n - 1, whether or not the entries fill it."""
    data = np.linspace(low, high, 4096).round().astype(int)
    opened = grey(written(STORED, bits=12, VOILUTSequence=lut(4096, 0, bits, data.tolist())))
    assert np.abs(opened - data[STORED] * 255 / white).max() <= 0.5


@pytest.mark.parametrize("slope", ["0", "0.01", "-1", "1e400"])
def test_a_modality_lut_wins_over_slope_and_intercept(slope):
    """PS3.3, C.11.1: one of the two is there. Some files have both, with values that mean nothing."""
    options = {"ModalityLUTSequence": lut(4096, 0, 12, CURVE.tolist()), "WindowCenter": 2048, "WindowWidth": 4096}
    expected = grey(written(STORED, bits=12, **options))
    assert len(np.unique(expected)) > 50
    assert (grey(written(STORED, bits=12, RescaleSlope=slope, RescaleIntercept=0, **options)) == expected).all()
