"""The public functions take an export, one of its files, a learner that was opened from it, or an open model."""

import pickle

import pytest
import torch
from fastai.vision.all import Learner

from tests.conftest import draw_collection
from xray_fastai import evaluate, interpret, load_learner, open_learner, predict, verify
from xray_fastai.inference.model import open_model
from xray_fastai.model.loaders import empty_loaders
from xray_fastai.system.errors import UserError


@pytest.fixture
def learn(export):
    return load_learner(export)


def test_a_learner_predicts_as_its_export_does(learn, export, an_image):
    expected = predict(an_image, export).p_PNEUMONIA.tolist()
    assert predict(an_image, learn).p_PNEUMONIA.tolist() == expected
    assert predict(an_image, open_model(export)).p_PNEUMONIA.tolist() == expected


def test_evaluate_interpret_and_verify_take_a_learner_or_an_open_model(learn, export, tmp_path):
    data = draw_collection(tmp_path / "data", {"test/NORMAL": 3, "test/PNEUMONIA": 3})
    for model in (learn, open_model(export)):
        assert evaluate(model, data, output=tmp_path).summary["model"] == export.name
        assert len(interpret(model, data, "test", top=1, output=tmp_path).table) == 6
        result = verify(model)
        assert result.ok and result.path == export


@pytest.mark.parametrize("name", ["model.safetensors", "learner.pkl", "model.json"])
def test_a_file_of_an_export_stands_for_its_folder(name, export, an_image, run):
    assert open_learner(export / name).xray.path == str(export)
    assert predict(an_image, export / name).error.isna().all()
    assert run("predict", an_image, "--model", export / name).exit_code == 0


def test_a_file_that_lies_in_no_export(tmp_path):
    for name in ("model.safetensors", "learner.pkl"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match="not an export"):
            load_learner(tmp_path / name)


def test_a_learner_that_was_trained_further_is_not_its_export(learn, an_image):
    with torch.no_grad():
        learn.model[1][-1].bias[0] += 1e-3
    with pytest.raises(UserError, match=r"^model: the learner was trained after it was opened from .*; save it"):
        predict(an_image, learn)


def test_what_is_no_model(an_image):
    with pytest.raises(UserError, match=r"^model: this learner is no export; save it by"):
        predict(an_image, Learner(empty_loaders(["A", "B"], 32), torch.nn.Linear(1, 1), loss_func=torch.nn.MSELoss()))
    for function in (lambda: predict(an_image, 3), lambda: verify(3), lambda: load_learner(3)):
        with pytest.raises(UserError, match=r"^model of type int: give an export"):
            function()


def test_the_place_of_a_learner_is_pickled_without_a_path(learn):
    assert b"pathlib" not in pickle.dumps(learn.xray)
