"""Pictures of DICOM files against dcmtk's, where its programs are installed."""

import shutil

import pytest

pytest.importorskip("pydicom", reason='pip install "xray-fastai[test]" brings pydicom')
pytest.importorskip("libjpeg", reason='pip install "xray-fastai[test]" brings pylibjpeg-libjpeg')

from tests.data.compare_dcmtk import DIFFERENCES, PROGRAMS, cases, compare, compressed_cases
from tests.data.dicom_files import content_of


@pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason="dcmtk is not installed")
@pytest.mark.filterwarnings("ignore:a DICOM file has a VOILUTFunction")
def test_the_picture_is_dcmtks_but_for_the_known_differences(tmp_path):
    found = {}
    for name, header in (cases() | compressed_cases()).items():
        (tmp_path / "x.dcm").write_bytes(content_of(header))
        found[name] = compare(tmp_path / "x.dcm")
    assert len(found) > 40
    assert {name: str(result) for name, result in found.items() if not result.agree and name not in DIFFERENCES} == {}
    assert [name for name in DIFFERENCES if found[name].agree] == []
