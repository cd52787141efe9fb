"""DICOM files: correct pixels, patients on one side of the split, and nothing of the headers in any output."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.conftest import QUICK, settings_of
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.dataset import read_collection
from xray_fastai.data.dicom import reader
from xray_fastai.data.image_facts import examine
from xray_fastai.data.images import open_image, size_of
from xray_fastai.data.labelled import Request, labelled_images
from xray_fastai.data.patients import PatientRule, patients_in
from xray_fastai.system.errors import ImageError, UserError

pydicom = pytest.importorskip("pydicom", reason='pip install "xray-fastai[test]" brings pydicom')
pytest.importorskip("libjpeg", reason='pip install "xray-fastai[test]" brings pylibjpeg-libjpeg')

from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402
from pydicom.encaps import encapsulate, get_frame  # noqa: E402

from tests.data.dicom_files import (  # noqa: E402
    DEPTHS,
    RAMP,
    SHIPPED,
    content_of,
    grey,
    header_of,
    lut,
    picture,
    written,
)  # fmt: skip

# what stands in the headers, and nowhere else
SECRETS = {
    "PatientName": "Zwetschgenknoedel^Ottokar",
    "PatientBirthDate": "19370421",
    "PatientAddress": "Unterlindengasse 77",
    "StudyDate": "20190823",
    "InstitutionName": "Krankenhaus Hintertupfing",
    "AccessionNumber": "ACC5550123",
    "ReferringPhysicianName": "Quacksalber^Eusebius",
    "StudyInstanceUID": "1.2.826.0.1.3680043.9.7777.424242",
    "StudyDescription": "THORAXBETT",
}
PATIENT = "MRN-0047118"  # a patient's number follows


# ---- pixels


LIKE_MR_SMALL = ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"]


@pytest.mark.parametrize("kind", LIKE_MR_SMALL)
def test_shipped_files_with_the_same_picture_give_the_same_pixels(kind):
    ds = pydicom.dcmread(SHIPPED / "MR_small.dcm")
    # the window's formula, PS3.3, C.11.2.1.2.1; signed 16 bits
    expected = ((ds.pixel_array - (ds.WindowCenter - 0.5)) / (ds.WindowWidth - 1) + 0.5).clip(0, 1) * 255
    opened = grey(SHIPPED / f"MR_small_{kind}.dcm")
    assert np.abs(opened - expected).max() <= 0.5 and opened.std() > 50


COLOURED = "dcmtk_+eb+cr dcmtk_+eb+cy+n1 dcmtk_+eb+cy+np gdcm_KY jls_lossy_line jpeg_gdcm jpeg_lossy_gdcm rle_16bit"


@pytest.mark.parametrize("kind", COLOURED.split())
def test_shipped_colours_become_the_same_grey_however_coded(kind):
    plain = grey(SHIPPED / "SC_rgb_rle.dcm")
    assert plain.std() > 70
    assert np.abs(grey(SHIPPED / f"SC_rgb_{kind}.dcm") - plain).mean() < 2
    facts = examine(SHIPPED / f"SC_rgb_{kind}.dcm")
    assert facts.coloured and facts.mode == "RGB" and (facts.width, facts.height) == (100, 100)


@pytest.mark.parametrize(
    "name",
    ["JPGExtended", "JPEG2000", "693_J2KI", "JPEGLSNearLossless_16", "image_dfl", "examples_palette", "CT_small"],
)
def test_other_shipped_pictures_open(name):
    image = open_image(SHIPPED / f"{name}.dcm")
    assert image.mode == "L" and np.asarray(image).std() > 15
    assert image.size == size_of(SHIPPED / f"{name}.dcm") == open_image(Path(SHIPPED / f"{name}.dcm").read_bytes()).size


SYNTAXES = [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.RLELossless, uid.JPEG2000Lossless]


@pytest.mark.parametrize("syntax", SYNTAXES, ids=["explicit", "implicit", "RLE", "JPEG2000"])
@pytest.mark.parametrize("bits", DEPTHS)
def test_the_inverse_as_monochrome1_is_the_same_picture(bits, syntax):
    stored, top = picture(bits), 2**bits - 1
    windows = [{}, {"WindowCenter": top // 3, "WindowWidth": top // 2}]
    windows.append({"WindowCenter": [top // 3, 5], "WindowWidth": [top // 2, 9], "VOILUTFunction": "SIGMOID"})
    for window in windows:
        other = dict(window)
        if window:  # 1 - f(x) is the window about what top - x makes of the centre
            shift = 0 if "VOILUTFunction" in window else 1
            centre = np.ravel(window["WindowCenter"])[0]
            other |= {
                "WindowCenter": float(top - centre + shift),
                "WindowWidth": float(np.ravel(window["WindowWidth"])[0]),
            }
        plain = grey(written(stored, bits=bits, syntax=syntax, **window))
        inverse = grey(written(top - stored, bits=bits, syntax=syntax, kind="MONOCHROME1", **other))
        assert (plain == inverse).all()
        assert plain.min() == 0 or window
        assert np.corrcoef(plain.ravel(), stored.ravel())[0, 1] > 0.8


def test_the_inverse_as_monochrome1_in_jpeg_ls_is_the_same_picture():
    """There is no encoder of JPEG-LS among what is installed; pydicom ships a stream of one."""
    shipped = pydicom.dcmread(SHIPPED / "MR_small_jpeg_ls_lossless.dcm")
    plain = header_of(shipped.pixel_array)
    turned = header_of(-1 - shipped.pixel_array, kind="MONOCHROME1")
    coded = header_of(shipped.pixel_array, kind="MONOCHROME1", syntax=uid.JPEGLSLossless)
    coded.PixelData = encapsulate([get_frame(shipped.PixelData, 0, number_of_frames=1)])
    assert (grey(content_of(plain)) == grey(content_of(turned))).all()
    assert (grey(content_of(coded)) == 255 - grey(content_of(plain))).mean() > 0.99  # but for halves


def test_without_a_window_the_picture_fills_the_range_whatever_the_header_allows():
    ten_bits = (RAMP * 16).astype(np.uint16)
    for window in ({}, {"WindowCenter": 0, "WindowWidth": 0}, {"WindowCenter": None, "WindowWidth": None}):
        opened = grey(written(ten_bits, bits=16, **window))
        assert np.abs(opened - RAMP * 255 / 63).max() <= 0.5


def test_a_window_narrower_than_one_is_used_where_the_standard_allows_it():
    """PS3.3, C.11.2.1.3.2: only the function LINEAR needs a width of 1 or more."""
    window = {"WindowCenter": 0.3, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"}
    opened = grey(written(RAMP.astype(np.uint16), RescaleSlope="0.01", RescaleIntercept=0, **window))
    assert np.abs(opened - ((RAMP * 0.01 - 0.3) / 0.5 + 0.5).clip(0, 1) * 255).max() <= 0.51


def test_signed_values_go_through_slope_and_intercept_then_the_window():
    stored = (RAMP * 30 - 1000).astype(np.int16)
    opened = grey(written(stored, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=-100, WindowWidth=1000))
    x = stored * 2.0 - 100
    assert np.abs(opened - (((x + 100.5) / 999 + 0.5).clip(0, 1) * 255)).max() <= 0.5
    falling = grey(written(stored, RescaleSlope=-2, RescaleIntercept=100, WindowCenter=100, WindowWidth=1000))
    assert np.abs(falling - (((-x - 99.5) / 999 + 0.5).clip(0, 1) * 255)).max() <= 0.5


@pytest.mark.parametrize("bits", [8, 9, 12, 16])
def test_a_voi_lut_wins_over_the_window(bits):
    stored = (RAMP * 64).astype(np.uint16)
    curve = ((np.arange(4096) / 4095) ** 2 * (2**bits - 1)).round().astype(np.uint16)
    expected = curve[stored].astype(float) * 255 / (2**bits - 1)
    window = {"WindowCenter": 20, "WindowWidth": 10}
    opened = grey(written(stored, bits=12, VOILUTSequence=lut(4096, 0, bits, curve.tolist()), **window))
    assert np.abs(opened - expected).max() <= 0.5
    opened = grey(written(stored, bits=12, VOILUTSequence=lut(4096, 0, bits, curve.tobytes())))
    assert np.abs(opened - expected).max() <= 0.5
    if bits == 8:  # two entries to a word
        opened = grey(written(stored, bits=12, VOILUTSequence=lut(4096, 0, 8, curve.astype(np.uint8).tobytes())))
        assert np.abs(opened - expected).max() <= 0.5


@pytest.mark.parametrize("bits", [12, 16])
def test_a_modality_lut_comes_first(bits):
    stored = (RAMP * 64).astype(np.uint16)
    turned = (np.arange(4096)[::-1] * (2 ** (bits - 12))).astype(np.uint16)
    window = {"WindowCenter": 2 ** (bits - 1), "WindowWidth": 2**bits}
    opened = grey(written(stored, bits=12, ModalityLUTSequence=lut(4096, 0, bits, turned.tolist()), **window))
    assert np.abs(opened - (255 - RAMP * 64 * 255 / 4095)).max() <= 1


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("values", "header"),
    [
        ((4000, 4000), {"PixelPaddingValue": 4000}),
        ((3990, 4000), {"PixelPaddingValue": 3990, "PixelPaddingRangeLimit": 4000}),
        ((3990, 4000), {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 3990}),
    ],
)
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_padding_is_black_and_not_looked_at(kind, values, header, syntax):
    stored = (RAMP * 10 + 5).astype(np.uint16)
    stored[:10, :32], stored[:10, 32:] = values
    opened = grey(written(stored, bits=12, kind=kind, syntax=syntax, **header))
    assert (opened[:10] == 0).all()
    ramp = RAMP[10:] * 255 / 63
    assert np.abs(opened[10:] - (ramp if kind == "MONOCHROME2" else 255 - ramp)).max() <= 0.5


def test_padding_below_zero():
    stored = (RAMP * 10).astype(np.int16)
    stored[0] = -2000
    for value in (-2000, 63536):  # as some programs write it, unsigned
        ds = header_of(stored)
        ds.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
        opened = grey(content_of(ds))
        assert (opened[0] == 0).all() and opened[1, 0] == 0 and opened[1, 63] == 255 and opened[1, 31] > 120


def test_bits_above_those_stored_do_not_count():
    stored = (RAMP * 64).astype(np.uint16)
    assert (grey(written(stored | 0xF000, bits=12)) == grey(written(stored, bits=12))).all()


def test_it_is_squashed_to_a_square_like_other_images(tmp_path):
    stored = (RAMP * 4).astype(np.uint8)
    stored[0, -1] = 255
    Image.fromarray(stored).save(tmp_path / "x.png")
    (tmp_path / "x.dcm").write_bytes(written(stored))
    assert np.abs(grey(tmp_path / "x.dcm", 32) - grey(tmp_path / "x.png", 32)).max() <= 1


# ---- files that are not one whole X-ray


def refusals():
    small = (RAMP * 60).astype(np.uint16)
    without = {}
    for keyword in ("PixelData", "Rows", "PhotometricInterpretation", "BitsStored"):
        ds = header_of(small)
        delattr(ds, keyword)
        without[keyword] = content_of(ds)
    jpeg = io.BytesIO()
    Image.fromarray(RAMP.astype(np.uint8)).save(jpeg, "JPEG")
    jpeg, header = jpeg.getvalue(), {"syntax": uid.JPEGBaseline8Bit}
    at = jpeg.index(b"\xff\xc0") + 5
    bomb = jpeg[:at] + b"\xff\xff\xff\xff" + jpeg[at + 4 :]
    ls = pydicom.dcmread(SHIPPED / "MR_small_jpeg_ls_lossless.dcm")
    stream = get_frame(ls.PixelData, 0, number_of_frames=1)
    ls.PixelData = encapsulate([stream[: len(stream) // 2]])
    wide = header_of(RAMP.astype(np.uint8), syntax=uid.JPEG2000Lossless)
    wide.Columns = 65
    rle = header_of(RAMP.astype(np.uint8), syntax=uid.RLELossless)
    rle.PixelData = encapsulate(
        [(1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56) + b"\x81\0" * 10_000]
    )
    whole = written(small)
    shipped = {name: (SHIPPED / f"{name}.dcm").read_bytes() for name in ("MR_truncated", "rtdose_1frame", "badVR")}
    dirs = [path for path in (SHIPPED / "dicomdirtests").iterdir() if path.name == "DICOMDIR"]
    return {
        "no pixels": (without["PixelData"], "PixelData"),
        "no rows": (without["Rows"], "Rows"),
        "no kind": (without["PhotometricInterpretation"], "PhotometricInterpretation"),
        "no bits": (without["BitsStored"], "BitsStored"),
        "frames": ((SHIPPED / "SC_rgb_rle_2frame.dcm").read_bytes(), "2 frames"),
        "zero rows": (written(small, Rows=0), "64 x 0 pixels"),
        "too large": (written(small, Rows=60_000, Columns=60_000), "60000 x 60000 pixels"),
        "truncated": (whole[:-1000], "truncated"),
        "truncated in the pixels": (shipped["MR_truncated"], "truncated"),
        "cut in the header": (whole[:380], "DICOM file"),
        "32 bits": (shipped["rtdose_1frame"], "32 bits"),
        "frames that are no number": (shipped["badVR"], "NumberOfFrames is not a number"),
        "high bit": (written(small, bits=12, HighBit=15), "HighBit 15"),
        "video": (written(small, syntax=uid.MPEG2MPML, PixelData=encapsulate([b"film"])), "MPEG2"),
        "unknown syntax": (
            whole.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0"),
            "names no known transfer syntax",
        ),
        "samples": (written(small, kind="RGB"), "neither grey nor colours"),
        "slope of 0": (written(small, RescaleSlope=0, RescaleIntercept=1), "slope"),
        "endless intercept": (written(small, RescaleSlope=1, RescaleIntercept="1e400"), "slope"),
        "truncated JPEG": (written(RAMP.astype(np.uint8), PixelData=encapsulate([jpeg[:-200]]), **header), "truncated"),
        "JPEG bomb": (written(RAMP.astype(np.uint8), PixelData=encapsulate([bomb]), **header), "65535 x 65535"),
        "no JPEG": (written(RAMP.astype(np.uint8), PixelData=encapsulate([b"no JPEG"]), **header), "not JPEG"),
        "truncated JPEG-LS": (content_of(ls), "truncated"),
        "other size": (content_of(wide), "its header says 65 x 48"),
        "RLE bomb": (content_of(rle), "more pixels"),
        "a list of files": (dirs[0].read_bytes(), "PixelData"),
    }


REFUSALS = refusals()


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize("reader", [open_image, examine])
def test_what_is_not_one_xray_is_named_with_what_is_wrong(tmp_path, kind, reader):
    content, words = REFUSALS[kind]
    path = tmp_path / "broken.dcm"
    path.write_bytes(content)
    with pytest.raises(ImageError) as error:
        reader(path)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value) and "\n" not in str(error.value)


def test_dcm_files_that_are_none(tmp_path):
    path = tmp_path / "x.dcm"
    for content, words in ((b"", "0 bytes"), (b"text" * 100, "not a DICOM file")):
        path.write_bytes(content)
        with pytest.raises(ImageError, match=words):
            open_image(path)
    Image.fromarray(RAMP.astype(np.uint8)).save(path, "PNG")  # by the content, as all images
    assert grey(path).max() == 63


def test_a_deflated_file_opens_and_a_bomb_does_not(monkeypatch):
    stored = (RAMP * 60).astype(np.uint16)
    plain = written(stored)
    packed = written(stored, syntax=uid.DeflatedExplicitVRLittleEndian)
    assert len(packed) < len(plain) / 2 and (grey(packed) == grey(plain)).all()
    monkeypatch.setattr(reader, "MAX_BYTES", len(plain) // 2)
    with pytest.raises(ImageError, match="deflated"):
        open_image(packed)
    moved = packed[:140] + bytes(4) + packed[144:]  # the group is said to be empty
    with pytest.raises(ImageError, match="deflated"):
        open_image(moved)


def test_a_header_of_sequences_is_refused_before_it_takes_minutes():
    ds = header_of(RAMP.astype(np.uint8))
    ds.add_new(0x00081115, "SQ", [Dataset() for _ in range(10_001)])
    with pytest.raises(ImageError, match="items"):
        open_image(content_of(ds))


@pytest.mark.slow
def test_broken_files_give_a_picture_or_one_line_and_nothing_else(capfd):
    """Bits flipped and ends torn off, in the header and in each kind of pixel data; nothing is printed or logged."""
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger().addHandler(handler)
    whole = [
        written(RAMP.astype(np.uint16), syntax=syntax, WindowCenter=30, WindowWidth=40, PixelPaddingValue=3, **SECRETS)
        for syntax in SYNTAXES
    ]
    names = ["MR_small_jpeg_ls_lossless", "SC_rgb_small_odd_jpeg", "SC_rgb_jpeg_gdcm", "SC_rgb_rle"]
    whole += [(SHIPPED / f"{name}.dcm").read_bytes() for name in names]
    rng, opened, refused = np.random.default_rng(0), 0, 0
    try:
        for content in whole:
            for number in range(60):
                broken = bytearray(content)
                if number % 4 == 0:
                    broken = broken[: rng.integers(132, len(broken))]
                for _ in range(number % 4):
                    broken[rng.integers(132, len(broken))] = rng.integers(256)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        assert open_image(bytes(broken), 32).size == (32, 32)
                    opened += 1
                except ImageError as error:
                    refused += 1
                    assert str(error).startswith("image: ") and "\n" not in str(error) and len(str(error)) < 250
                    assert not any(secret in str(error) for secret in SECRETS.values())
    finally:
        logging.getLogger().removeHandler(handler)
    assert opened > 100 and refused > 100
    assert capfd.readouterr() == ("", "") and logged.getvalue() == ""


# ---- without the extra, and without noise


def python(code, *args, folder=None):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
def test_without_the_extra_one_line_says_what_to_install(tmp_path):
    folder = tmp_path / "train" / "NORMAL"
    folder.mkdir(parents=True)
    (folder / "IM0001").write_bytes(written(RAMP.astype(np.uint8), PatientID=PATIENT))
    code = (
        "import sys; sys.modules['pydicom'] = None\n"
        "from xray_fastai.data.images import open_image\n"
        "from xray_fastai.system.errors import ImageError\n"
        "try: open_image(sys.argv[1] + '/train/NORMAL/IM0001')\n"
        "except ImageError as error: print(error)\n"
        "from xray_fastai.cli.main import app\n"
        "app(['data', 'check', sys.argv[1]])"
    )
    ended = python(code, tmp_path)
    assert ended.returncode == 1 and not ended.stderr
    first, *rest = ended.stdout.splitlines()
    assert first == f'{folder / "IM0001"}: a DICOM file; to read it, pip install "xray-fastai[dicom]"'
    assert any('train/NORMAL/IM0001: a DICOM file; to read it, pip install "xray-fastai[dicom]"' in r for r in rest)


def test_nothing_is_printed_warned_or_logged_of_what_is_odd_in_a_header(tmp_path):
    """pydicom's own warnings quote what they find; here all of Python's warnings and logs are switched on."""
    ds = pydicom.dcmread(SHIPPED / "MR_small_padded.dcm")
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds["SpecificCharacterSet"]._value = "NONSENSE_CHARSET"
    ds.PatientID = PATIENT * 10
    path = tmp_path / "odd"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path.write_bytes(content_of(ds))
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO)\n"
        "from xray_fastai.data.dicom import reader\nfrom xray_fastai.data.images import open_image\n"
        "open_image(sys.argv[1])\nassert reader.patient_key(sys.argv[1])\n"
        "try: open_image(sys.argv[2])\nexcept Exception: pass\n"
        "else: raise SystemExit(3)\n"
        "import pydicom\n"
        "logging.getLogger('pydicom').warning('as usual outside')"
    )
    environment = os.environ | {"PYTHONWARNINGS": "always"}
    command = [sys.executable, "-c", code, path, SHIPPED / "JPEG-lossy.dcm"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout) == (0, "")
    (line,) = ended.stderr.splitlines()
    assert line == "WARNING:pydicom:as usual outside"


# ---- who it is


def draw_patients(root: Path, split: str, patients: range, images: int = 3, seed: int = 0) -> None:
    """DICOM files without a patient in their names, one of three with an extension; by class a dark or bright disc."""
    rng = np.random.default_rng(seed)
    for patient in patients:
        label = ["NORMAL", "PNEUMONIA"][patient % 2]
        folder = root / split / label
        folder.mkdir(parents=True, exist_ok=True)
        for image in range(images):
            pixels = rng.normal(1800, 400, (48, 40))
            pixels[16:32, 12:28] += 900 if label == "PNEUMONIA" else -900
            stored = pixels.clip(0, 4095).astype(np.uint16)
            kind = ["MONOCHROME2", "MONOCHROME1"][image % 2]
            ds = header_of(
                stored if image % 2 == 0 else 4095 - stored, bits=12, kind=kind,
                syntax=SYNTAXES[(patient + image) % 4], PatientID=f"{PATIENT}{patient:03}", **SECRETS,
            )  # fmt: skip
            # in the order of their names, a patient's images lie apart
            name = [f"a{seed}{patient:02}.dcm", f"IM{seed}{patient:04}", f"1.2.840.{seed}.{patient}"][image % 3]
            (folder / name).write_bytes(content_of(ds))


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Sixteen patients of three images to train on, six to test on."""
    root = tmp_path_factory.mktemp("dicom") / "data"
    draw_patients(root, "train", range(16))
    draw_patients(root, "test", range(20, 26), seed=1)
    return root


def test_a_fit_keeps_a_patient_on_one_side_by_patient_id(patients):
    _, data = read_collection(FitConfig(data=str(patients), valid="0.2").with_recipe())
    table = data.table
    assert len(table) == 48 and table.patient.nunique() == 16
    assert (table.groupby("patient").is_valid.nunique() == 1).all() and 6 <= table.is_valid.sum() <= 15
    truth = [pydicom.dcmread(path, stop_before_pixels=True).PatientID for path in table.path]
    assert (pd.factorize(table.patient)[0] == pd.factorize(pd.Series(truth))[0]).all()
    assert not table.patient.str.contains("MRN").any()
    assert sorted(table.patient.unique()) == sorted(f"DICOM #{n}" for n in range(1, 17))
    again = read_collection(FitConfig(data=str(patients), valid="0.2").with_recipe())[1].table
    pd.testing.assert_frame_equal(table, again)


def test_a_pattern_of_ones_own_wins_over_patient_id(patients):
    _, data = read_collection(FitConfig(data=str(patients), patient_pattern=r"^a\d+").with_recipe())
    assert data.table.patient.nunique() == 16 + 16  # each a... by itself, the others by PatientID
    for label in ("NORMAL", "PNEUMONIA"):
        for path in (patients / "train" / label).iterdir():
            assert reader.patient_key(path) and reader.patient_key(path) != reader.patient_key(__file__)


def test_patient_id_wins_over_kaggles_names_and_a_pattern_over_both(tmp_path):
    names = ["person1_bacteria_1.dcm", "person2_bacteria_2.dcm"]
    for name in names:
        (tmp_path / name).write_bytes(written(RAMP.astype(np.uint8), PatientID=PATIENT))
    files = {"path": [str(tmp_path / name) for name in names], "file": names}
    table = pd.DataFrame({**files, "split": "", "label": ""})
    first, second = patients_in(table, PatientRule())
    assert first == second and "person" not in first
    assert patients_in(table, PatientRule(r"person\d+")) == ["person1", "person2"]


def test_one_patient_id_for_all_says_what_to_do(tmp_path):
    for number in range(8):
        folder = tmp_path / "train" / ["NORMAL", "PNEUMONIA"][number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.dcm").write_bytes(written(picture(12, number), bits=12, PatientID="Anonymous"))
    with pytest.raises(UserError, match="patient_pattern=") as error:
        read_collection(FitConfig(data=str(tmp_path)).with_recipe())
    assert "Anonymous" not in str(error.value)


def test_spaces_and_case_of_a_patient_id_do_not_count_and_an_empty_one_is_none(tmp_path):
    keys = {}
    for name, patient in {"a": "ab 1", "b": "AB 1 ", "c": "ab 2", "d": "", "e": None}.items():
        (tmp_path / name).write_bytes(
            written(RAMP.astype(np.uint8), **({} if patient is None else {"PatientID": patient}))
        )
        keys[name] = reader.patient_key(tmp_path / name)
    assert keys["a"] == keys["b"] != keys["c"] and keys["d"] is keys["e"] is None
    code = "import sys; from xray_fastai.data.dicom.reader import patient_key; print(patient_key(sys.argv[1]))"
    elsewhere = python(code, tmp_path / "a").stdout.strip()
    assert len(elsewhere) == len(keys["a"]) == 32 and elsewhere != keys["a"]


def test_data_check_finds_a_patient_in_two_splits_by_patient_id(tmp_path, run):
    draw_patients(tmp_path, "train", range(4))
    draw_patients(tmp_path, "test", range(3, 6), seed=1)
    (tmp_path / "train" / "NORMAL" / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(100))
    (tmp_path / "train" / "NORMAL" / "README").write_text("no image")
    os.mkfifo(tmp_path / "train" / "NORMAL" / "pipe")
    result = run("data", "check", tmp_path, "--json")
    assert result.exit_code == 1
    found = {finding["kind"]: finding for finding in json.loads(result.stdout)["findings"]}
    shared = found["patient-in-two-splits"]
    assert shared["count"] == 6 and "1 patient with images" in shared["text"]
    assert len({file["detail"].partition(":")[0] for file in shared["files"]}) == 1
    assert "of DICOM" in found["modes"]["text"] and "MONOCHROME1" in found["modes"]["text"]
    assert {file["file"] for file in found["no-image"]["files"]} == {
        f"train/NORMAL/{name}" for name in ("DICOMDIR", "README", "pipe")
    }
    assert "wrong-extension" not in found and "no-patient" not in found and "MRN" not in result.output


# ---- the commands, and what they leave behind


@pytest.fixture(scope="module")
def worked(patients, tmp_path_factory, run):
    """A folder in which every command has been run on DICOM files, one fit of them interrupted and resumed."""
    root = tmp_path_factory.mktemp("worked")
    from xray_fastai.training.stopping import StopOnNonFiniteLoss

    outputs, plain, calls = [], StopOnNonFiniteLoss.after_batch, []

    def stopping(self):
        calls.append(1)
        if len(calls) == 8:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self)

    def command(*args, code=0):
        result = run(*args)
        assert result.exit_code == code, result.output
        outputs.append(result.output)
        return result

    here = os.getcwd()
    os.chdir(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnNonFiniteLoss, "after_batch", stopping)
        options = ["--data", patients, *QUICK, "--weights", "none", "--epochs", 2, "--name", "small"]
        command("fit", *options, code=143)
    checkpoint = {path.name: path.read_bytes() for path in (root / "exports" / "small" / "checkpoint").iterdir()}
    command("fit", "--resume", "small")
    export = root / "exports" / "small-2"
    command("data", "check", patients, "--fix", root / "list.csv", code=0)
    command("data", "check", patients, "--json")
    command("evaluate", "--model", export)
    command("interpret", "--model", export, "--split", "test", "--top", 4)
    command("verify", export)
    broken = root / "broken.dcm"
    broken.write_bytes((patients / "test" / "NORMAL" / "a120.dcm").read_bytes()[:-3000])
    new = [patients / "test" / "NORMAL", patients / "test" / "PNEUMONIA", broken]
    command("predict", *new, "--model", export, "--heatmaps", root / "maps", "--output", root / "p.csv", code=3)
    command("predict", *new, "--model", export, code=3)
    broken.unlink()
    os.chdir(here)
    return root, export, outputs, checkpoint


def contents(root, checkpoint):
    """The bytes of every file, and of what is compressed in it."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for name, content in (files | checkpoint).items():
        yield name, content
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as packed:
                for member in packed.infolist():
                    if member.compress_type != zipfile.ZIP_STORED:
                        yield f"{name}/{member.filename}", packed.read(member)


@pytest.mark.slow
def test_nothing_of_the_headers_is_in_what_the_commands_say_and_write(worked):
    root, _, outputs, checkpoint = worked
    secrets = [*{part for text in SECRETS.values() for part in text.split("^")}, PATIENT]
    assert "Zwetschgenknoedel" in secrets
    looked = list(contents(root, checkpoint))
    assert len(looked) > 40 and {"learner.pkl", "model.safetensors"} <= {Path(name).name for name, _ in looked}
    for name, content in [*looked, *((f"output {i}", text.encode()) for i, text in enumerate(outputs))]:
        for secret in secrets:
            assert secret.encode() not in content, (name, secret)


@pytest.mark.slow
def test_the_interrupted_fit_went_on_and_its_patients_are_known(worked):
    _, export, outputs, _ = worked
    model = settings_of(export)
    assert model["status"] == "complete" and [p["epochs"] for p in model["training"]["phases"]] == [2]
    assert model["data"]["patients"]["train"] + model["data"]["patients"]["valid"] == 16
    assert "training      " in outputs[0] and "resuming" in outputs[1]


@pytest.mark.slow
def test_evaluate_and_interpret_count_patients(worked, patients):
    _, export, *_ = worked
    metrics = json.loads((export / "evaluation-test" / "metrics.json").read_text())
    assert metrics["images"] == 18 and metrics["patients"] == 6
    for table in ("evaluation-test/predictions.csv", "interpretation-test/top_losses.csv"):
        rows = pd.read_csv(export / table)
        assert len(rows) == 18 and set(rows.patient) == {f"DICOM #{n}" for n in range(1, 7)}
    assert len(labelled_images(settings_of(export), Request(patients, "valid")).table) == len(
        settings_of(export)["data"]["valid_files"]
    )


@pytest.mark.slow
def test_predict_takes_folders_of_all_kinds_of_names(worked, patients):
    root, *_ = worked
    rows = pd.read_csv(root / "p.csv")
    named = [path for label in ("NORMAL", "PNEUMONIA") for path in sorted((patients / "test" / label).iterdir())]
    assert list(rows.path) == [*map(str, named), str(root / "broken.dcm")]
    assert rows.error.notna().tolist() == [False] * 18 + [True]
    assert "truncated" in rows.error.iloc[-1]
    maps = {path.name for path in (root / "maps").iterdir()}
    assert len(maps) == 18 and "1.2.840.1.20.png" in maps and "a120.png" in maps


def test_a_picture_predicts_alike_as_dicom_its_inverse_and_png(worked, run, tmp_path):
    _, export, *_ = worked
    stored = picture(8)
    stored[0, :2] = 0, 255
    Image.fromarray(stored).save(tmp_path / "a.png")
    (tmp_path / "b.dcm").write_bytes(written(stored))
    (tmp_path / "c").write_bytes(written(255 - stored, kind="MONOCHROME1"))
    (tmp_path / "LICENSE").write_text("no image, so not listed")
    jpeg = tmp_path / "d.jpeg"
    Image.fromarray(stored).save(jpeg, quality=95)
    assert run("predict", tmp_path, "--model", export, "--output", "p.csv", "--precision", "fp32").exit_code == 0
    rows = pd.read_csv("p.csv").set_index("path")
    assert [Path(path).name for path in rows.index] == ["a.png", "b.dcm", "c", "d.jpeg"]
    assert rows.p_PNEUMONIA.iloc[:3].nunique() == 1

    from xray_fastai import load_learner, predict

    table = predict([(tmp_path / "c").read_bytes(), tmp_path / "b.dcm"], export, precision="fp32")
    assert table.p_PNEUMONIA.nunique() == 1 and table.p_PNEUMONIA[0] == rows.p_PNEUMONIA.iloc[0]
    assert abs(load_learner(export).predict(tmp_path / "c")[2][1] - rows.p_PNEUMONIA.iloc[0]) < 1e-4


def test_what_stands_behind_long_sequences_is_read(tmp_path):
    """The first megabyte, which mostly is enough, ends within them."""
    files = []
    for name, length in (("short", 0), ("long", 500_000)):
        item, ds = Dataset(), header_of(picture(), bits=12, PatientID=PATIENT)
        for group in (0x0009, 0x0019):
            ds.private_block(group, "someone", create=True).add_new(1, "SQ", [])
            item.private_block(group, "someone", create=True).add_new(2, "OB", bytes(length))
            ds[group, 0x1001].value = [item] * 3
            ds[group, 0x1001].is_undefined_length = True
        (tmp_path / name).write_bytes(content_of(ds))
        files.append(tmp_path / name)
    short, long = files
    assert long.stat().st_size > 2 * reader.HEAD > 2 * short.stat().st_size
    assert reader.patient_key(short) == reader.patient_key(long) is not None
    assert size_of(short) == size_of(long) == (56, 40)
