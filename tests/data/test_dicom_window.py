"""Another window than the file's own: the values it shows, its limits, and what cannot have one."""

import numpy as np
import pytest

pytest.importorskip("pydicom", reason='pip install "xray-fastai[test]" brings pydicom')

from tests.data.dicom_files import content_of, header_of, lut
from xray_fastai.data.dicom.grey import Window
from xray_fastai.data.dicom.reader import open_dicom
from xray_fastai.system.errors import ImageError

STORED = np.linspace(0, 4000, 60 * 50).round().astype(np.uint16).reshape(60, 50)
HOUNSFIELD = {"RescaleSlope": 1, "RescaleIntercept": -1000}  # -1000 to 3000


def shown(window=None, stored=STORED, **more):
    image = open_dicom(content_of(header_of(stored, bits=12, **more)), 10**7, window)
    return np.asarray(image), image.info["window"]


def test_the_files_own_window_and_the_values_that_it_may_be_moved_over():
    own = {"WindowCenter": 40, "WindowWidth": 400}
    assert shown(**HOUNSFIELD, **own)[1] == Window(40, 400, -1000, 3000)
    assert shown(**HOUNSFIELD, WindowCenter=3000, WindowWidth=1000)[1] == Window(3000, 1000, -1000, 3500)
    assert shown(**HOUNSFIELD)[1] == Window(1000, 4000, -1000, 3000)
    assert shown(**own, stored=np.full((60, 50), 7, np.uint16))[1] == Window(40, 400, -160, 240)
    assert shown(stored=np.full((60, 50), 7, np.uint16))[1] is None


@pytest.mark.parametrize("own", [{}, {"WindowCenter": 1000, "WindowWidth": 4000}, {"WindowCenter": [5, 6]}])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_a_chosen_window_takes_the_place_of_the_files_own(own, kind):
    """Black below it, white above it, and values between evenly; inverted where the file says so."""
    picture, window = shown((0, 1000), kind=kind, **HOUNSFIELD, **own)
    values = STORED.astype(float) - 1000
    expected = 255 * ((values + 500) / 1000).clip(0, 1)
    assert (window.centre, window.width) == (0, 1000)
    assert np.abs((255 - picture if kind == "MONOCHROME1" else picture) - expected).max() <= 1
    assert not np.array_equal(picture, shown(kind=kind, **HOUNSFIELD, **own)[0])


def test_the_window_that_the_file_has_changes_nothing_when_it_is_chosen():
    for own in ({}, {"WindowCenter": 40, "WindowWidth": 400}, {"WindowCenter": 40.5, "WindowWidth": 333.3}):
        picture, window = shown(**HOUNSFIELD, **own)
        assert np.array_equal(shown((window.centre, window.width), **HOUNSFIELD, **own)[0], picture)


def test_a_chosen_window_takes_the_place_of_a_voi_lut():
    inverts = lut(4096, 0, 12, np.arange(4096)[::-1].astype("<u2").tobytes())
    picture, window = shown(VOILUTSequence=inverts)
    assert window == Window(None, None, 0, 4000) and picture[0, 0] > picture[-1, -1]
    picture, window = shown((2000, 4000), VOILUTSequence=inverts)
    assert window == Window(2000, 4000, 0, 4000) and (picture[0, 0], picture[-1, -1]) == (0, 255)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ((-1001, 100), "centre from -1000 to 3000"),
        ((3001, 100), "centre from -1000 to 3000"),
        ((0, 0), "width above 0 and up to 4000"),
        ((0, 4001), "width above 0 and up to 4000"),
        ((float("nan"), 10), "centre from"),
        ((0, float("inf")), "width above 0"),
    ],
)
def test_a_window_outside_of_the_values_is_refused(chosen, words):
    with pytest.raises(ImageError, match=words):
        shown(chosen, **HOUNSFIELD)


def test_what_has_no_window_to_choose():
    with pytest.raises(ImageError, match="width is 1 or more"):
        shown((40, 0.5), **HOUNSFIELD, WindowCenter=40, WindowWidth=400)
    with pytest.raises(ImageError, match="values are all equal"):
        shown((40, 400), stored=np.full((60, 50), 7, np.uint16))
    with pytest.raises(ImageError, match="in colour"):
        colours = np.zeros((60, 50, 3), np.uint8)
        open_dicom(content_of(header_of(colours, kind="RGB")), 10**7, (40, 400))
