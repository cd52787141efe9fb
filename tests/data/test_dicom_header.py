"""Elements of DICOM headers that are rare, wrong or contradict each other."""

import numpy as np
import pytest

from xray_fastai.data.images import open_image
from xray_fastai.system.errors import ImageError

pytest.importorskip("pydicom", reason='pip install "xray-fastai[test]" brings pydicom')

from pydicom import uid
from pydicom.dataset import Dataset

from tests.data.dicom_files import RAMP, content_of, grey, header_of, lut, written

STORED = (RAMP * 60).astype(np.uint16)


def group(**more):
    """The two functional groups that say how the values of a frame are shown."""
    rescale, window, frame = Dataset(), Dataset(), Dataset()
    for keyword, value in more.items():
        setattr(rescale if keyword.startswith("Rescale") else window, keyword, value)
    if len(rescale):
        frame.PixelValueTransformationSequence = [rescale]
    if len(window):
        frame.FrameVOILUTSequence = [window]
    return [frame]


FALLING = {"RescaleSlope": -1, "RescaleIntercept": 4000, "RescaleType": "US"}
WINDOW = {"WindowCenter": 2000, "WindowWidth": 3000}


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_functional_groups_apply_shared_ones_then_those_of_the_frame(syntax):
    """PS3.3, C.7.6.16.2.9 and C.7.6.16.2.10."""
    expected = grey(written(STORED, bits=12, **FALLING, **WINDOW))
    assert np.corrcoef(expected.ravel(), STORED.ravel())[0, 1] < -0.95 and len(np.unique(expected)) > 45
    other = {"RescaleSlope": 1, "RescaleIntercept": 0, "RescaleType": "US", "WindowCenter": 10, "WindowWidth": 20}
    options = {"bits": 12, "syntax": syntax, "NumberOfFrames": 1}
    for groups in (
        {"SharedFunctionalGroupsSequence": group(**FALLING, **WINDOW)},
        {"PerFrameFunctionalGroupsSequence": group(**FALLING, **WINDOW)},
        {
            "SharedFunctionalGroupsSequence": group(**other),
            "PerFrameFunctionalGroupsSequence": group(**FALLING, **WINDOW),
        },
        {
            "SharedFunctionalGroupsSequence": group(**FALLING),
            "PerFrameFunctionalGroupsSequence": group(**WINDOW),
            "VOILUTSequence": lut(256, 0, 8, list(range(256))),
        },
        {"SharedFunctionalGroupsSequence": group(**FALLING, **WINDOW), **other},
    ):
        assert (grey(written(STORED, **options, **groups)) == expected).all()
    content = written(STORED, **options, SharedFunctionalGroupsSequence=group(WindowCenter="2000.5", WindowWidth=3000))
    other = grey(written(STORED, bits=12, WindowCenter="2000.5", WindowWidth=3000))
    assert (grey(replaced(content, b"2000.5", b"2000,5")) == other).all()


def test_empty_functional_groups_change_nothing():
    plain = grey(written(STORED, bits=12, **WINDOW))
    for groups in ([], [Dataset()], group(), group(WindowCenter=None, WindowWidth=None)):
        assert (grey(written(STORED, bits=12, SharedFunctionalGroupsSequence=groups, **WINDOW)) == plain).all()


def replaced(content, old, new):
    """The file with another value of an element, of the same length."""
    assert content.count(old) == 1 and len(old) == len(new)
    return content.replace(old, new)


def test_a_decimal_comma_is_a_point_and_a_comma_of_thousands_is_refused_by_name():
    expected = grey(written(STORED, bits=12, WindowCenter="1000.5", WindowWidth="2000.25"))
    content = written(STORED, bits=12, WindowCenter="1000.5", WindowWidth="2000.25")
    content = replaced(replaced(content, b"1000.5", b"1000,5"), b"2000.25", b"2000,25")
    assert (grey(content) == expected).all()
    several = written(STORED, bits=12, WindowCenter=["1000.5", "40.5"], WindowWidth=["2000.25", "10"])
    assert (grey(replaced(several, b"1000.5\\40.5", b"1000,5\\40,5")) == expected).all()
    for keyword in ("WindowCenter", "RescaleIntercept", "RescaleSlope"):
        options = {"WindowCenter": 1, "WindowWidth": 2, "RescaleIntercept": 0, "RescaleSlope": 1, keyword: "11.125"}
        content = replaced(written(STORED, bits=12, **options), b"11.125", b"11,125")
        with pytest.raises(ImageError, match=f"its {keyword} is not a number") as error:
            open_image(content)
        assert "11" not in error.value.message


@pytest.mark.parametrize(
    ("keyword", "old", "new"),
    [
        ("NumberOfFrames", "1 ", b"1A"),
        ("WindowWidth", "777.77", b"777.7x"),
        ("RescaleSlope", "1.0001", b"1.00.1"),
    ],
)
def test_an_element_that_is_no_number_is_named(keyword, old, new):
    options = {"WindowCenter": 1, "WindowWidth": 2, "RescaleIntercept": 0, "RescaleSlope": 1, keyword: old}
    content = written(STORED, bits=12, **options)
    if keyword == "NumberOfFrames":
        old = "IS\2\0" + old
        new = b"IS\2\0" + new
    with pytest.raises(ImageError, match=f"its {keyword} is not a number"):
        open_image(replaced(content, old.encode(), new))


def test_an_element_with_several_values_is_named():
    ds = header_of(STORED)
    ds.add_new("Columns", "US", [64, 64])
    with pytest.raises(ImageError, match="its Columns has 2 values; it must have one"):
        open_image(content_of(ds))


def test_an_unknown_function_of_the_window_is_linear_and_said(tmp_path, capsys):
    expected = grey(written(STORED, bits=12, **WINDOW))
    path = tmp_path / "foo.dcm"
    path.write_bytes(written(STORED, bits=12, VOILUTFunction="FOO", **WINDOW))
    assert (grey(path) == expected).all()
    assert capsys.readouterr().err == f"Warning: {path}: its VOILUTFunction is not of the standard; read as LINEAR\n"
    several = grey(written(STORED, bits=12, VOILUTFunction=["SIGMOID", "LINEAR"], **WINDOW))
    assert (several == grey(written(STORED, bits=12, VOILUTFunction="SIGMOID", **WINDOW))).all()
    assert (several != expected).any() and capsys.readouterr().err == ""


@pytest.mark.parametrize(("kind", "shape"), [("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")])
def test_two_elements_that_contradict_each_other_are_named(kind, shape):
    with pytest.raises(ImageError, match=f"PhotometricInterpretation {kind} and PresentationLUTShape {shape}"):
        open_image(written(STORED, kind=kind, PresentationLUTShape=shape))
    other = {"IDENTITY": "INVERSE", "INVERSE": "IDENTITY"}[shape]
    assert (grey(written(STORED, kind=kind, PresentationLUTShape=other)) == grey(written(STORED, kind=kind))).all()
