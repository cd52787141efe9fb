"""Temperature and intercepts of an export give the same probabilities wherever they are applied."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from scipy.special import softmax

from tests.conftest import QUICK, draw_collection, settings_of
from xray_fastai import load_learner
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.data.images import open_image
from xray_fastai.evaluation.evaluate import evaluate
from xray_fastai.inference.model import open_model
from xray_fastai.inference.onnx_export import export_onnx
from xray_fastai.inference.predict import predict
from xray_fastai.inference.rows import RowBuilder
from xray_fastai.inference.scaling import Scaling, prior_of
from xray_fastai.serving.decoding import Decoder
from xray_fastai.serving.predictions import ModelFacts, Options, predict_file

FITTED = {"temperature": 0.8, "intercepts": [0.7, -0.9], "threshold": 0.3, "calibration_kind": "validation"}
WORDS = "slope 1.25 and intercept -1.6 fitted to validation images"


@pytest.fixture
def fitted(export, tmp_path):
    """A copy of the export whose slope and intercept were fitted."""
    folder = Path(shutil.copytree(export, tmp_path / "fitted", copy_function=os.link))
    (folder / "model.json").unlink()
    (folder / "model.json").write_text(json.dumps(settings_of(export) | FITTED | {"calibrated": True}))
    return folder


@pytest.mark.slow
def test_all_ways_to_predict_give_the_probabilities_of_the_export(fitted, export, tmp_path):
    data = draw_collection(tmp_path / "data", {"test/NORMAL": 3, "test/PNEUMONIA": 3}, seed=2)
    files = sorted((data / "test").glob("*/*"))
    raw = predict(files, export, uncalibrated=True, device="cpu", precision="fp32")
    logits = np.log(raw[["p_NORMAL", "p_PNEUMONIA"]].to_numpy())
    expected = softmax(logits / 0.8 + [0.7, -0.9], axis=1)  # (files, classes)
    assert np.abs(expected - softmax(logits, axis=1)).max() > 0.05

    rows = predict(files, fitted, device="cpu", precision="fp32")
    assert rows[["p_NORMAL", "p_PNEUMONIA"]].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert (rows.prediction == np.where(expected[:, 1] >= 0.3, "PNEUMONIA", "NORMAL")).all()
    evaluated = evaluate(fitted, data, output=tmp_path / "out", device="cpu", precision="fp32")
    table = evaluated.predictions.set_index("path").loc[[str(file) for file in files]]
    assert table[["p_NORMAL", "p_PNEUMONIA"]].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert evaluated.summary["intercepts"] == [0.7, -0.9] and evaluated.about["probabilities"] == WORDS
    learn, model = load_learner(fitted), open_model(fitted, "cpu", "fp32")
    decoder, builder = Decoder(), RowBuilder(model, PredictConfig())
    session = onnxruntime.InferenceSession(export_onnx(fitted, tmp_path / "fitted.onnx").path)
    for file, wanted in zip(files, expected, strict=True):
        assert learn.predict(file)[2].numpy() == pytest.approx(wanted, abs=1e-4)
        served = predict_file(builder, decoder, file.name, file.read_bytes(), Options(heatmap=False)).probabilities
        assert list(served.values()) == pytest.approx(wanted, abs=1e-5)
        pixels = np.asarray(open_image(file, model.size))[None, None]
        assert session.run(None, {"images": pixels})[0][0] == pytest.approx(wanted, abs=1e-5)
    decoder.close()


def test_the_ways_to_predict_say_how_the_probabilities_were_calibrated(fitted, export, run, an_image):
    assert ModelFacts.of(RowBuilder(open_model(fitted, "cpu"), PredictConfig())).probabilities == WORDS
    said = run("predict", an_image, "--model", fitted).stdout
    assert f"probabilities {WORDS}\n" in said
    said = " ".join(run("predict", an_image, "--model", fitted, "--tta").stdout.split())
    assert f"{WORDS}, for single views and not for the mean of views" in said
    assert (
        "probabilities not calibrated, by --uncalibrated\n"
        in run("predict", an_image, "--model", fitted, "--uncalibrated").stdout
    )
    assert "probabilities not calibrated\n" in run("predict", an_image, "--model", export).stdout


@pytest.mark.parametrize("kind", ["none", "cautious", "validation"])
def test_the_prior_is_written_and_follows_from_the_rest(kind, run, tmp_path):
    """A loss weighted 3:1 trains for 3 * 16 to 44 images; slope and intercept bring the share of validation images."""
    counts = {"train/NORMAL": 16, "train/PNEUMONIA": 44, "val/NORMAL": 20, "val/PNEUMONIA": 30}
    data = draw_collection(tmp_path / "data", counts)
    weights = ["--class-weights", "3:1", "--calibration", kind, "--weights", "none", "--epochs", 1, "--lr", "1e-4"]
    fitted = run("fit", "--data", data, *QUICK, *weights, "--valid", "folder", "--exports", tmp_path, "--name", "new")
    assert fitted.exit_code == 0, fitted.output
    settings = settings_of(tmp_path / "new")
    assert settings["calibration_kind"] == kind
    trained = np.log(np.array([3 * 16, 44])) / settings["temperature"]
    expected = [20 / 50, 30 / 50] if kind == "validation" else softmax(trained)
    assert settings["prior"] == pytest.approx(expected)
    assert prior_of(settings).tolist() == settings.pop("prior")
    assert prior_of(settings) == pytest.approx(expected)


def test_an_export_that_counts_no_image_of_a_class_tells_no_prior(export):
    settings = settings_of(export) | {"prior": None}
    assert prior_of(settings) is not None
    settings["data"]["train"]["NORMAL"] = 0
    assert prior_of(settings) is None


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (Scaling(), "not calibrated"),
        (Scaling("cautious", 1.5), "cautious temperature 1.5 from validation images"),
        (Scaling("earlier", 1.5), "temperature 1.5 from validation images"),
        (Scaling("validation", 0.5, [0.0, 0.25]), "slope 2 and intercept 0.25 fitted to validation images"),
    ],
)
def test_words_for_two_classes(scaling, words):
    assert scaling.describe(1) == words


def test_several_classes_have_an_intercept_each():
    scaling = Scaling("validation", 2.0, [1.0, 0.0, -1.0])
    assert scaling.describe() == "temperature 2 and an intercept of each class fitted to validation images"
    assert scaling(np.array([[2.0, 4.0, 6.0]])).tolist() == [[2.0, 2.0, 2.0]]
