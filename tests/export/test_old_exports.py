"""Exports of earlier versions are still read.

`export_0_1_0/` was made with version 0.1.0: a resnet18 at 32 px on the drawn X-rays, with most of its weights set to
zero so that the file is small, and what `predict --precision fp32` printed for five images.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.evaluation.test_report import evaluation
from xray_fastai import load_learner, predict, verify
from xray_fastai.evaluation.statement import statement
from xray_fastai.export.model_json import read_settings
from xray_fastai.inference.scaling import Scaling

OLD = Path(__file__).with_name("export_0_1_0")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(OLD / "export.zip") as archive:
        archive.extractall(folder)
    return folder / "export-0.1.0"


def test_an_export_of_0_1_0_is_whole_and_predicts_what_it_did(export):
    known = pd.read_csv(OLD / "predictions.csv")
    assert verify(export).ok
    found = predict([OLD / name for name in known.path], export, precision="fp32", device="cpu")
    assert found.prediction.tolist() == known.prediction.tolist()
    assert found.error.isna().all()
    columns = ["p_NORMAL", "p_PNEUMONIA", "threshold"]
    assert (
        np.abs(found[columns].to_numpy(float) - known[columns].to_numpy()).max() < 2e-3
    )  # its logits are in the hundreds


def test_an_export_of_0_1_0_loads_in_python(export):
    known = pd.read_csv(OLD / "predictions.csv")
    learn = load_learner(export)
    for row in known.itertuples():
        _, _, probabilities = learn.predict(OLD / row.path)
        assert float(probabilities[1]) == pytest.approx(row.p_PNEUMONIA, abs=2e-3)


def test_an_export_of_0_1_0_says_in_its_note_whether_it_is_calibrated(export, tmp_path):
    old = json.loads((export / "model.json").read_text())
    assert "calibrated" not in old and "augmentation" not in old
    for note, calibrated in [("from 96 validation images, by Youden's J", True), ("not calibrated: too few", False)]:
        (tmp_path / "model.json").write_text(json.dumps(old | {"calibration": note}))
        settings = read_settings(tmp_path)
        assert settings["calibrated"] is calibrated
        assert settings["calibration_kind"] == ("earlier" if calibrated else "none")


def test_a_statement_is_written_of_an_export_of_0_1_0(export):
    text = statement(read_settings(export), evaluation())
    assert "The network is a resnet18" in text and "Augmentation of training images: " in text


def test_the_key_counts_and_not_the_words_of_the_note(export, tmp_path):
    old = json.loads((export / "model.json").read_text())
    new = {"calibration": "not calibrated: the words of a note may change", "calibrated": True}
    (tmp_path / "model.json").write_text(json.dumps(old | new))
    settings = read_settings(tmp_path)
    assert settings["calibrated"] is True and settings["calibration_kind"] == "earlier"
    assert Scaling.of(settings).describe(1) == f"temperature {old['temperature']:.3g} from validation images"
