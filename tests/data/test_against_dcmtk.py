"""Compares grey values with those of dcmtk's `dcmj2pnm`, an independent reader; skipped where it is not installed.

Where the two differ by design:

- PresentationLUTShape that contradicts the PhotometricInterpretation: dcmtk believes the former, this package refuses.
- Without a window, dcmtk's default maps the range that the header allows; here it is called with `+Wm` (min-max).
"""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.data.test_dicom import content_of, header_of
from tests.data.test_dicom_rendering import IDENTITY, TWELVE, lut
from xray_fastai.data.images import open_image

pytestmark = pytest.mark.skipif(shutil.which("dcmj2pnm") is None, reason="dcmtk is not installed")

CASES = {
    "min-max": {},
    "linear": {"WindowCenter": 2048, "WindowWidth": 3000},
    "exact": {"WindowCenter": 2048, "WindowWidth": 3000, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 2048, "WindowWidth": 3000, "VOILUTFunction": "SIGMOID"},
    "rescaled": {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": 3000, "WindowWidth": 5000},
    "LUT": {"VOILUTSequence": lut(IDENTITY)},
    "narrow LUT": {"VOILUTSequence": lut((500 + IDENTITY // 2).astype("<u2"))},
    "LUT of 16 bits with 12": {"VOILUTSequence": lut(IDENTITY, bits=16)},
}


@pytest.mark.parametrize("kind", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_greys_as_dcmtk(case, kind, tmp_path):
    header = CASES[case]
    path = tmp_path / "x.dcm"
    path.write_bytes(content_of(header_of(TWELVE, bits=12, kind=kind, **header)))
    voi = "+Wl" if "VOILUTSequence" in header else "+Wi" if "WindowCenter" in header else "+Wm"
    number = [] if voi == "+Wm" else ["1"]
    subprocess.run(["dcmj2pnm", "+on", voi, *number, path, tmp_path / "x.png"], check=True, capture_output=True)
    theirs = np.asarray(Image.open(tmp_path / "x.png").convert("L")).astype(int)
    assert np.abs(np.asarray(open_image(path)).astype(int) - theirs).max() <= 1
