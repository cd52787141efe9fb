"""The package in Python: every public name is there, and gives what the commands give."""

import pytest
import torch

import xray_fastai
from tests.conftest import draw_collection
from xray_fastai.system.device import choose_precision


@pytest.mark.parametrize("name", xray_fastai.__all__)
def test_every_public_name_is_there(name):
    assert getattr(xray_fastai, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        xray_fastai.train  # noqa: B018


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_evaluate_interpret_and_predict_agree(precision, export, tmp_path):
    """The same images and precision, the same probabilities, whichever way they are asked for."""
    data = draw_collection(tmp_path / "data", {"test/NORMAL": 6, "test/PNEUMONIA": 6})
    evaluated = xray_fastai.evaluate(export, data, output=tmp_path, precision=precision).predictions.set_index("path")
    found = xray_fastai.interpret(export, data, "test", top=2, output=tmp_path, precision=precision)
    assert f"precision {choose_precision(precision, torch.device('cpu'))}\n" in str(found)
    looked = found.table.set_index("path")
    predicted = xray_fastai.predict(list(evaluated.index), export, precision=precision).set_index("path")
    for table in (looked.loc[evaluated.index], predicted):
        assert (table.prediction == evaluated.prediction).all()
        assert table.p_PNEUMONIA.tolist() == pytest.approx(evaluated.p_PNEUMONIA.tolist(), abs=1e-5)
    assert looked.loss.loc[evaluated.index].tolist() == pytest.approx(evaluated.loss.tolist(), rel=1e-3)
    assert (tmp_path / "report.html").is_file()
