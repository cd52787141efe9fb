"""Headers that other programs write give the picture that went in, or an error that names the element at fault."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from tests.data.test_dicom import content_of, header_of, written
from xray_fastai.data.images import open_image
from xray_fastai.system.errors import ImageError

pytest.importorskip("pydicom", reason='pip install "xray-fastai[test]" brings pydicom')

from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

y, x = np.mgrid[0:96, 0:80]
WAVES = 0.5 + 0.4 * np.sin(x / 13) * np.cos(y / 11)  # 0.1 to 0.9
TWELVE, EIGHT = (WAVES * 4095).round().astype(np.uint16), (WAVES * 255).round().astype(np.uint8)
IDENTITY = np.arange(4096).astype("<u2")
LITTLE, IMPLICIT = uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian


def check(source, least=200):
    """Check that a file shows `WAVES`, in at least so many greys."""
    opened = np.asarray(open_image(source if isinstance(source, bytes) else content_of(source))).astype(float)
    assert np.corrcoef(opened.ravel(), WAVES.ravel())[0, 1] > 0.999
    assert len(np.unique(opened)) >= least
    return opened


def refused(source, words):
    with pytest.raises(ImageError) as error:
        open_image(source if isinstance(source, bytes) else content_of(source))
    assert words in str(error.value)


def lut(data, first=0, entries=4096, bits=12, vr="US"):
    item = Dataset()
    item.add_new("LUTDescriptor", vr, [entries, first, bits])
    item.add_new("LUTData", "OW", data.tobytes())
    return [item]


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize("entries", [0, 1, 2048, 4095, 4097])
def test_a_lut_of_another_length_than_its_descriptor_says(sequence, entries):
    """A short one of 12 bits was taken for bytes: a scrambled picture."""
    refused(header_of(TWELVE, bits=12, **{sequence: lut(np.resize(IDENTITY, entries))}), "LUTData")
    check(header_of(TWELVE, bits=12, **{sequence: lut(IDENTITY)}))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_of_another_length_than_its_descriptor_says(bits):
    def coloured(entries):
        ds = header_of(EIGHT, kind="PALETTE COLOR")
        for colour in ("Red", "Green", "Blue"):
            data = (np.arange(entries) * (257 if bits == 16 else 1)).astype("<u2")
            ds.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [256, 0, bits])
            ds.add_new(f"{colour}PaletteColorLookupTableData", "OW", data.tobytes())
        return ds

    assert np.abs(check(coloured(256)) - EIGHT).max() <= 1
    for entries in (100, 255, 257):
        refused(coloured(entries), "RedPaletteColorLookupTableData")


@pytest.mark.parametrize("syntax", [LITTLE, IMPLICIT, uid.ExplicitVRBigEndian])
@pytest.mark.parametrize(("vr", "first"), [("SS", -1024), ("US", 64512)])
def test_a_lut_begins_below_zero_where_values_may_be_negative(syntax, vr, first):
    """PS3.3, C.11.2.1.1; pydicom reads the number by the sign of the pixels."""
    data, stored = IDENTITY, TWELVE
    if syntax == uid.ExplicitVRBigEndian:
        data, stored = IDENTITY.byteswap(), TWELVE.byteswap()
    voi = lut(data, first, vr=vr)
    ds = header_of(stored, bits=12, syntax=syntax, RescaleSlope=1, RescaleIntercept=-1024, VOILUTSequence=voi)
    assert np.abs(check(ds) - WAVES * 255).max() <= 1


def test_a_lut_that_begins_high_stays_there():
    stored = TWELVE + np.uint16(40_000)
    assert np.abs(check(header_of(stored, VOILUTSequence=lut(IDENTITY, 40_000))) - WAVES * 255).max() <= 1


def test_the_range_of_a_lut_is_that_of_its_bits():
    """PS3.3, C.11.2.1.1: entries are from 0 to 2^bits - 1, also where none has these values."""
    narrow = (500 + IDENTITY // 2).astype("<u2")
    opened = check(header_of(TWELVE, bits=12, VOILUTSequence=lut(narrow)), least=100)
    assert np.abs(opened - (500 + TWELVE // 2) * 255.0 / 4095).max() <= 0.51


@pytest.mark.parametrize("shared", [True, False])
def test_functional_groups_apply(shared):
    """PS3.3, C.7.6.16.2.9 and C.7.6.16.2.10; those of the frame go before the shared ones."""

    def groups(slope, intercept):
        group, values, window = Dataset(), Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept = slope, intercept
        window.WindowCenter, window.WindowWidth = 2048, 4096
        group.PixelValueTransformationSequence, group.FrameVOILUTSequence = [values], [window]
        return [group]

    more = {"SharedFunctionalGroupsSequence": groups(-1, 4095) if shared else groups(1, 0)}
    if not shared:
        more["PerFrameFunctionalGroupsSequence"] = groups(-1, 4095)
    opened = check(header_of(4095 - TWELVE, bits=12, NumberOfFrames=1, **more))
    assert np.abs(opened - WAVES * 255).max() <= 1


def test_elements_that_contradict_are_both_named():
    for kind, shape in (("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")):
        ds = header_of(TWELVE, bits=12, kind=kind, PresentationLUTShape=shape)
        refused(ds, f"PhotometricInterpretation {kind} and PresentationLUTShape {shape}")
    check(header_of(TWELVE, bits=12, PresentationLUTShape="IDENTITY"))
    check(header_of(4095 - TWELVE, bits=12, kind="MONOCHROME1", PresentationLUTShape="INVERSE"))


# ---- codestreams


def more_bits(stored, signed=False):
    """A JPEG 2000 of 16 bits whose header says 12."""
    ds = header_of(stored, syntax=uid.JPEG2000Lossless)
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, int(signed)
    return ds


def test_bits_above_bits_stored_do_not_count_after_any_decoder():
    """PS3.5, 8.1.1."""
    pytest.importorskip("openjpeg")
    plain = check(more_bits(TWELVE))
    assert (check(more_bits(np.where(y < 40, TWELVE | 0x7000, TWELVE).astype(np.uint16))) == plain).all()
    centred = TWELVE.astype(np.int16) - 2048
    assert (check(more_bits((centred & 0xFFF).astype(np.uint16), signed=True)) == plain).all()
    assert (check(more_bits(centred, signed=True)) == plain).all()


def jpeg():
    stream = io.BytesIO()
    Image.fromarray(EIGHT).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def labelled(data, syntax=uid.JPEGBaseline8Bit):
    ds = header_of(EIGHT, syntax=uid.JPEGBaseline8Bit, PixelData=data)
    ds["PixelData"].is_undefined_length = True
    return content_of(ds).replace(b"1.2.840.10008.1.2.4.50", syntax.encode().ljust(22, b"\0"))


@pytest.mark.parametrize("syntax", [LITTLE, IMPLICIT, uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.JPEGLosslessSV1])
def test_a_jpeg_is_read_whatever_its_label_says(syntax):
    content = labelled(encapsulate([jpeg()]), syntax)
    check(content)


def test_plain_pixels_that_are_labelled_compressed():
    content = written(EIGHT)
    assert content.count(b"1.2.840.10008.1.2.1\0") == 1
    check(content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"))


def test_an_offset_table_is_not_needed_for_one_frame():
    data = bytearray(encapsulate([jpeg()]))
    assert struct.unpack("<I", data[4:8])[0] == 4
    data[8:12] = (999).to_bytes(4, "little")
    check(labelled(bytes(data)))
    check(labelled(encapsulate([jpeg()[:1000], jpeg()[1000:]], has_bot=False)))


def test_what_follows_a_codestream_means_nothing_and_a_missing_marker_neither():
    content = jpeg()
    for complete in (content, content + b"abcdefgh" * 5, content[:-2], content + b"\0\xff"):
        check(labelled(encapsulate([complete])))
    for cut in (200, 20, 300):
        refused(labelled(encapsulate([content[:-cut]])), "truncated")


def test_colours_without_planar_configuration():
    ds = header_of(np.stack([EIGHT] * 3, -1), kind="RGB")
    del ds.PlanarConfiguration
    assert np.abs(check(ds) - EIGHT).max() <= 1


def test_a_file_that_only_mentions_the_deflated_syntax():
    check(written(TWELVE, bits=12, SeriesDescription="1.2.840.10008.1.2.1.99"))


def test_elements_are_named_that_have_no_value_of_their_kind():
    window = written(TWELVE, bits=12, WindowCenter="1000.5", WindowWidth=4000)
    exact, comma = open_image(window), open_image(window.replace(b"1000.5", b"1000,5"))
    assert comma.tobytes() == exact.tobytes()  # a decimal comma
    frames = written(TWELVE, bits=12, NumberOfFrames="1").replace(b"IS\x02\x001 ", b"IS\x02\x001A")
    refused(frames, "NumberOfFrames is no")
    ds = header_of(TWELVE)
    del ds.PixelData
    ds.add_new("FloatPixelData", "OF", WAVES.astype("<f4").tobytes())
    refused(ds, "FloatPixelData")
