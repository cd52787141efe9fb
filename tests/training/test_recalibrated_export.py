"""What comes out of `recalibrate`: an export that every command takes, and figures of what it gained."""

import shutil

import numpy as np
import pandas as pd
import pytest
from fastai.learner import load_learner as load_pickle
from scipy.special import expit, softmax
from sklearn.metrics import roc_auc_score

from tests.conftest import settings_of
from tests.training.test_recalibrate import draw_local, simulated
from xray_fastai import evaluate, interpret, load_learner, predict, recalibrate, verify
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.data.images import open_image
from xray_fastai.inference.model import open_model
from xray_fastai.inference.rows import RowBuilder
from xray_fastai.inference.stream import predict_all
from xray_fastai.metrics.scored import Scored
from xray_fastai.serving.decoding import Decoder
from xray_fastai.serving.predictions import Options, predict_file
from xray_fastai.training.gain import FEW, Called, compared, difference
from xray_fastai.training.local_fit import Rule, fit_locally

FILES = ["batch.png", "curves.png", "history.csv", "learner.pkl", "model.json", "model.safetensors", "report.html"]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder of the classes, itself in a folder as a split."""
    return draw_local(tmp_path_factory.mktemp("place") / "test", 24, 36)


@pytest.fixture(scope="module")
def folder(export, local, tmp_path_factory):
    """A recalibrated export."""
    return recalibrate(export, local, output=tmp_path_factory.mktemp("exports") / "ward", device="cpu").path


@pytest.fixture(scope="module")
def files(local):
    return sorted(local.glob("*/*"))[::6]


@pytest.fixture(scope="module")
def expected(export, folder, files):
    """The new probabilities of the images, computed from the outputs of the export that was fitted."""
    settings, model = settings_of(folder), open_model(export, "cpu", "fp32")
    outputs = predict_all(model, files)
    p = softmax(outputs / settings["temperature"] + settings["intercepts"], axis=1)[:, 1]
    assert np.abs(p - model.probabilities(outputs)[:, 1]).max() > 0.02  # else any test would pass
    return pytest.approx(p, abs=1e-4)


def test_predict_and_learners_give_the_new_probabilities(folder, files, expected):
    assert verify(folder).ok
    table = predict(files, folder, device="cpu", precision="fp32")
    assert table.p_PNEUMONIA.to_numpy() == expected
    assert (table.threshold == settings_of(folder)["threshold"]).all()
    opened = load_learner(folder)
    for learn in (opened, load_pickle(folder / "learner.pkl")):
        assert [learn.predict(file)[2][1].item() for file in files] == expected


def test_the_server_gives_them(folder, files, expected):
    decoder, builder = Decoder(), RowBuilder(open_model(folder, "cpu", "fp32"), PredictConfig())
    plain = Options(heatmap=False)
    rows = [predict_file(builder, decoder, str(file), file.read_bytes(), plain).row for file in files]
    decoder.close()
    assert [row["p_PNEUMONIA"] for row in rows] == expected


def test_an_onnx_file_has_the_new_slope_and_intercept(folder, files, expected, run):
    onnxruntime = pytest.importorskip("onnxruntime")
    result = run("export", folder, "--output", "ward.onnx")
    assert result.exit_code == 0 and "fitted to local images" in " ".join(result.stdout.split()), result.output
    pixels = np.stack([np.asarray(open_image(file, 32)) for file in files])[:, None]
    session = onnxruntime.InferenceSession("ward.onnx")
    shape = session.get_inputs()[0].shape
    assert session.run(None, {"images": pixels.reshape(-1, *shape[1:])})[0][:, 1] == expected


def test_evaluate_and_interpret_take_it(folder, local):
    result = evaluate(folder, local.parent, output="evaluated", device="cpu", precision="fp32")
    written = pd.read_csv(result.path / "predictions.csv")
    every = predict(sorted(local.glob("*/*")), folder, device="cpu", precision="fp32")
    assert np.sort(written.p_PNEUMONIA) == pytest.approx(np.sort(every.p_PNEUMONIA), abs=1e-4)
    shown = interpret(folder, local.parent, "test", 3, output="interpreted", device="cpu", precision="fp32").table
    truth = ["PNEUMONIA" in path for path in every.path]
    losses = -np.log(np.where(truth, every.p_PNEUMONIA, every.p_NORMAL))
    assert shown.loss.to_numpy() == pytest.approx(np.sort(losses)[::-1], rel=1e-3)


def test_the_weights_stay_and_old_evaluations_are_not_copied(export, local, tmp_path):
    parent = shutil.copytree(export, tmp_path / "parent")
    (parent / "evaluation").mkdir()
    (parent / "evaluation" / "metrics.json").write_text("{}")
    made = recalibrate(parent, local, device="cpu").path
    assert sorted(path.name for path in made.iterdir()) == FILES
    assert (made / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()
    assert settings_of(made)["data"] == settings_of(export)["data"]


def test_files_are_left_out_and_patients_are_listed(export, local, run, tmp_path):
    images = sorted(local.glob("*/*"))
    names = [f"{local.name}/{file.relative_to(local)}" for file in images]
    (tmp_path / "out.csv").write_text("file,action\n" + "".join(f"{name},leave out\n" for name in names[:4]))
    rows = "".join(f"{name},{i // 4}\n" for i, name in enumerate(names))
    (tmp_path / "patients.csv").write_text("file,patient\n" + rows)
    options = ["--exclude", tmp_path / "out.csv", "--patients", tmp_path / "patients.csv", "--output", tmp_path / "new"]
    result = run("recalibrate", export, "--data", local, *options)
    assert result.exit_code == 0, result.output
    record = settings_of(tmp_path / "new")["recalibrated"]
    assert (record["images"], record["patients"]) == (56, 14)


def test_the_fit_starts_from_the_exports_own_probabilities():
    images = simulated(400, 0.5, -1)
    still = fit_locally(images, 1, Rule(), spread=1e-4).scaling
    assert still.temperature == pytest.approx(1, abs=1e-3) and still.intercept_of(1) == pytest.approx(0, abs=1e-3)


def called(images, slope: float, intercept: float) -> Called:
    z = slope * (images.logits[:, 1] - images.logits[:, 0]) + intercept
    p = np.stack([expit(-z), expit(z)], axis=1)
    return Called(Scored(images.targets, p, images.patients, 1), (p[:, 1] >= 0.5).astype(int))


def test_a_difference_is_paired():
    """Its interval is far narrower than those of the two, and holds the truth in most of 200 simulated places."""
    before, after = (called(simulated(40_000, 0.6, -1.5, 1000), *scaling) for scaling in ((1, 0), (0.6, -1.5)))
    truth = difference("nll", before, after).value
    held = []
    for seed in range(200):
        images = simulated(150, 0.6, -1.5, seed)
        found = difference("nll", called(images, 1, 0), called(images, 0.6, -1.5))
        held.append(found.low <= truth <= found.high)
    assert 0.9 <= np.mean(held) <= 0.99
    same = difference("accuracy", before, before)
    assert same.value == 0 and np.isnan(same.low)


def test_figures_after_are_of_other_patients():
    """Scores that say nothing cannot gain by cross-validation, though a fit to the same images would look better."""
    images = simulated(60, 0, 0, 4)
    fitted = fit_locally(images, 1, Rule())
    found = compared(called(images, 1, 0), images, fitted, Rule())
    assert len(images.targets) < FEW
    p = fitted.probabilities(images.logits)
    own = -np.log(p[np.arange(60), images.targets]).mean()
    assert found["nll"]["after"][0] > own
    assert found["roc_auc"]["after"][0] == pytest.approx(roc_auc_score(images.targets, p[:, 1]))
    gained = found["nll"]["after"][0] - found["nll"]["before"][0]
    assert found["nll"]["difference"][0] == pytest.approx(gained)


def test_one_patient_of_a_class_gives_no_figures():
    images = simulated(60, 1, 0)
    images.patients[images.targets == 1] = 1000
    assert compared(called(images, 1, 0), images, fit_locally(images, 1, Rule()), Rule()) == {}
