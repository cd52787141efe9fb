"""A picture of one tone is not called, trained on or evaluated on, whatever file it comes in."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.conftest import draw_collection
from xray_fastai.data.audit.check import check_data
from xray_fastai.data.dataset import check_files
from xray_fastai.data.folders import read_split
from xray_fastai.inference.model import open_model
from xray_fastai.inference.predict import predict
from xray_fastai.inference.stream import predict_all
from xray_fastai.system.errors import UserError


def saved(array, kind):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


BLANK = {
    "black.jpeg": saved(np.zeros((64, 64), np.uint8), "JPEG"),
    "white.png": saved(np.full((64, 64), 255, np.uint8), "PNG"),
    "deep.png": saved(np.full((64, 64), 3000, np.uint16), "PNG"),
    "float.tif": saved(np.full((64, 64), 0.3, np.float32), "TIFF"),
}


@pytest.mark.parametrize("name", BLANK)
def test_a_blank_file_is_named_and_not_called(tmp_path, name, export):
    root = draw_collection(tmp_path, {"train/NORMAL": 3, "train/PNEUMONIA": 3})
    path = root / "train" / "NORMAL" / name
    path.write_bytes(BLANK[name])

    row = predict(path, export).iloc[0]
    assert row.prediction is None and row.error.startswith(f"{path}: blank")
    (found,) = [finding for finding in check_data(root).findings if finding.kind == "blank"]
    assert found.severity == "error" and [file.name for file in found.files] == [f"train/NORMAL/{name}"]
    with pytest.raises(UserError, match=rf"{name}: blank.*skip_bad=True"):
        check_files(read_split(root, "train"))
    kept, errors = check_files(read_split(root, "train"), skip_bad=True)
    assert len(kept) == 6 and len(errors) == 1


def test_a_blank_array_is_not_called(export):
    rows = predict([np.zeros((64, 64)), np.full((64, 64), 7, np.uint16)], export)
    assert rows.error.str.contains("blank").all() and rows.prediction.isna().all()


def test_a_blank_file_ends_an_evaluation(tmp_path, export):
    path = tmp_path / "black.jpeg"
    path.write_bytes(BLANK["black.jpeg"])
    with pytest.raises(UserError, match="blank"):
        predict_all(open_model(export), [str(path)])
