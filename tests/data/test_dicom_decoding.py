"""DICOM pixel data that differ from what the header or the standard says: the right picture, or what is wrong."""

import io

import numpy as np
import pytest
from PIL import Image

from xray_fastai.data.images import open_image
from xray_fastai.data.jpeg import MAX_SCANS
from xray_fastai.system.errors import ImageError

pydicom = pytest.importorskip("pydicom", reason='pip install "xray-fastai[test]" brings pydicom')
pytest.importorskip("libjpeg", reason='pip install "xray-fastai[test]" brings pylibjpeg-libjpeg')

from pydicom import uid  # noqa: E402
from pydicom.encaps import encapsulate, get_frame  # noqa: E402

from tests.data.dicom_files import RAMP, SHIPPED, content_of, grey, header_of, written  # noqa: E402

BYTES = (RAMP * 4).astype(np.uint8)
STORED = (RAMP * 60 + np.random.default_rng(0).integers(60, size=RAMP.shape)).astype(np.uint16)
EXPLICIT = uid.ExplicitVRLittleEndian


def coded(kind):
    """A header, and its compressed stream."""
    if kind == "JPEG":
        stream = io.BytesIO()
        Image.fromarray(BYTES).save(stream, "JPEG", quality=95)
        return header_of(BYTES, syntax=uid.JPEGBaseline8Bit), stream.getvalue()
    if kind in ("JPEG-LS", "JPEG lossless"):
        name = {"JPEG-LS": "MR_small_jpeg_ls_lossless", "JPEG lossless": "SC_rgb_jpeg_lossy_gdcm"}[kind]
        ds = pydicom.dcmread(SHIPPED / f"{name}.dcm")
    else:
        ds = header_of(STORED, bits=12, syntax={"JPEG 2000": uid.JPEG2000Lossless, "RLE": uid.RLELossless}[kind])
    return ds, get_frame(ds.PixelData, 0, number_of_frames=1)


KINDS = ["JPEG", "JPEG-LS", "JPEG 2000", "RLE"]
LABELS = [EXPLICIT, uid.JPEGBaseline8Bit, uid.JPEGLossless, uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.RLELossless]


def whole(kind):
    ds, stream = coded(kind)
    ds.PixelData = encapsulate([stream])
    opened = grey(content_of(ds))
    assert len(np.unique(opened)) > 60
    return opened


@pytest.mark.parametrize("label", LABELS, ids=lambda label: label.name)
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_data_are_read_whatever_transfer_syntax_the_header_says(kind, label):
    ds, stream = coded(kind)
    for data in (encapsulate([stream]), encapsulate([stream[:40], stream[40:]])):
        ds.PixelData = data
        assert (grey(relabelled(content_of(ds), label)) == whole(kind)).all()


@pytest.mark.parametrize("label", LABELS[1:], ids=lambda label: label.name)
@pytest.mark.parametrize("stored", [STORED, BYTES], ids=["16 bits", "8 bits"])
def test_plain_data_are_read_whatever_compression_the_header_says(label, stored):
    content = written(stored)
    assert (grey(relabelled(content, label)) == grey(content)).all()


def relabelled(content, label):
    """The same bytes under another transfer syntax."""
    ds = pydicom.dcmread(io.BytesIO(content))
    meta_end = 144 + int.from_bytes(content[140:144], "little")
    ds.file_meta.TransferSyntaxUID = label
    stream = io.BytesIO()
    stream.write(bytes(128) + b"DICM")
    pydicom.filewriter.write_file_meta_info(stream, ds.file_meta)
    return stream.getvalue() + content[meta_end:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_without_the_items_around_it_is_read(kind):
    ds, stream = coded(kind)
    if kind == "JPEG-LS":
        ds = header_of(np.zeros((ds.Rows, ds.Columns), np.int16))
    ds.PixelData = stream + bytes(len(stream) % 2)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = False
    for label in (EXPLICIT, ds.file_meta.TransferSyntaxUID):
        ds.file_meta.TransferSyntaxUID = EXPLICIT
        plain = whole(kind)
        content = relabelled(content_of(ds), label)
        assert np.corrcoef(grey(content).ravel(), plain.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [1, 8, 2**31])
def test_a_table_of_wrong_offsets_does_not_matter_for_one_frame(kind, offset):
    ds, stream = coded(kind)
    items = encapsulate([stream[:40], stream[40:]])
    ds.PixelData = b"\xfe\xff\0\xe0\4\0\0\0" + offset.to_bytes(4, "little") + items[items.index(b"\xfe\xff\0\xe0", 4) :]
    assert (grey(content_of(ds)) == whole(kind)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [bytes(2), bytes(1000), b"rubbish" * 6, b"\xff\xd8 JPEG \xff\xd9"])
def test_bytes_after_the_end_of_a_stream_mean_nothing(kind, tail):
    ds, stream = coded(kind)
    ds.PixelData = encapsulate([stream + tail])
    if kind == "RLE" and tail.strip(b"\0"):  # without a marker of the end, it may be a longer picture
        with pytest.raises(ImageError, match="hold more pixels"):
            open_image(content_of(ds))
    else:
        assert (grey(content_of(ds)) == whole(kind)).all()


@pytest.mark.parametrize("kind", ["JPEG", "JPEG-LS", "JPEG 2000"])
def test_a_missing_marker_at_the_end_does_not_matter_and_missing_data_do(kind):
    ds, stream = coded(kind)
    bare = stream.rstrip(b"\0")
    assert bare.endswith(b"\xff\xd9")
    bare = bare[:-2]
    ds.PixelData = encapsulate([bare])
    assert (grey(content_of(ds)) == whole(kind)).all()
    for missing in (20, 200, len(bare) // 2):
        for tail in (b"", b"\xff\xd9"):
            ds.PixelData = encapsulate([bare[:-missing] + tail])
            with pytest.raises(ImageError, match="truncated" if kind == "JPEG 2000" else r"truncated|broken"):
                open_image(content_of(ds))


def test_colours_without_a_planar_configuration_are_by_pixel():
    colours = np.dstack([BYTES, BYTES[::-1], BYTES[:, ::-1]])
    ds = header_of(colours, kind="RGB")
    expected = grey(content_of(ds))
    for value in ("missing", None):
        if value is None:
            ds.PlanarConfiguration = None
        else:
            del ds.PlanarConfiguration
        assert (grey(content_of(ds)) == expected).all()
    ds.PlanarConfiguration = 2
    with pytest.raises(ImageError, match="PlanarConfiguration 2; it must be 0 or 1"):
        open_image(content_of(ds))


@pytest.mark.parametrize(("keyword", "kind"), [("FloatPixelData", np.float32), ("DoubleFloatPixelData", np.float64)])
def test_floating_point_pixels_are_refused_by_name(keyword, kind):
    ds = header_of(STORED)
    del ds.PixelData
    setattr(ds, keyword, STORED.astype(kind).tobytes())
    with pytest.raises(ImageError, match=f"floating-point numbers \\({keyword}\\)"):
        open_image(content_of(ds))


def test_jpeg_2000_and_jpeg_ls_with_more_bits_than_stored_lose_those_above():
    """PS3.5, 8.1.1: bits above BitsStored do not count, whichever decoder returned them. They may hold overlays."""
    overlay = (STORED | (RAMP % 2 << 14)).astype(np.uint16)
    plain = grey(written(STORED, bits=12))
    ds = header_of(overlay, syntax=uid.JPEG2000Lossless)
    ds.BitsStored, ds.HighBit = 12, 11
    assert (grey(content_of(ds)) == plain).all()
    signed = STORED.astype(np.int16) - 2048
    expected = grey(written(signed, bits=12))
    ds = header_of(signed.view(np.uint16) & 0xFFF, syntax=uid.JPEG2000Lossless)  # not extended
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 1
    assert (grey(content_of(ds)) == expected).all() and len(np.unique(expected)) > 200
    shipped = pydicom.dcmread(SHIPPED / "MR_small_jpeg_ls_lossless.dcm")
    native = header_of(shipped.pixel_array.view(np.uint16) & 0x3F)
    shipped.BitsStored, shipped.HighBit, shipped.PixelRepresentation = 6, 5, 0
    del shipped.WindowCenter, shipped.WindowWidth
    assert (grey(content_of(shipped)) == grey(content_of(native))).all()
    shipped.PixelRepresentation = 1
    native = header_of((shipped.pixel_array.astype(np.int16) << 10) >> 10)
    assert (grey(content_of(shipped)) == grey(content_of(native))).all()


def test_values_above_the_bits_stored_in_a_lossy_jpeg_are_the_largest_ones():
    ds, stream = coded("JPEG")
    ds.BitsStored, ds.HighBit = 7, 6
    ds.PixelData = encapsulate([stream])
    opened = grey(content_of(ds))
    assert (opened[:, 34:] == 255).all() and np.abs(opened[:, :30] - 2 * BYTES[:, :30]).mean() < 3


def test_a_file_that_only_mentions_the_deflated_syntax_is_read():
    plain = written(STORED, bits=12)
    named = written(STORED, bits=12, StudyDescription=str(uid.DeflatedExplicitVRLittleEndian))
    assert (grey(named) == grey(plain)).all()
    ds = header_of(STORED, bits=12, syntax=uid.DeflatedExplicitVRLittleEndian)
    ds.file_meta.PrivateInformationCreatorUID = uid.DeflatedExplicitVRLittleEndian
    assert (grey(content_of(ds)) == grey(plain)).all()
    ds.file_meta.TransferSyntaxUID = EXPLICIT
    assert (grey(content_of(ds)) == grey(plain)).all()


def test_too_many_scans_are_not_decoded():
    ds, stream = coded("JPEG")
    scan = stream[stream.rindex(b"\xff\xda") : -2]
    ds.PixelData = encapsulate([stream[:-2] + MAX_SCANS * scan + stream[-2:]])
    with pytest.raises(ImageError, match=f"more than {MAX_SCANS} scans"):
        grey(content_of(ds))
