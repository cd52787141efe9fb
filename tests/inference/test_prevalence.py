"""Probabilities for another prevalence: their odds are moved, the decisions stay, and are made on what is written."""

import html
import json
import os
import shutil
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax

from tests.conftest import draw_collection, settings_of
from xray_fastai import predict
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.inference.model import open_model
from xray_fastai.inference.rows import DecisionRule, RowBuilder
from xray_fastai.inference.stream import predict_stream
from xray_fastai.serving.app import _render
from xray_fastai.serving.decoding import Decoder
from xray_fastai.serving.predictions import ModelFacts, Options, predict_file

SHARES = {"temperature": 0.8, "intercepts": [0.7, -0.9], "prior": [0.26, 0.74], "calibration_kind": "validation"}
SCORES = ["p_NORMAL", "p_PNEUMONIA"]


@pytest.fixture
def fitted(export, tmp_path, files):
    """A copy of the export that is set for a share of 74 %, and has images on both sides of its threshold."""
    folder = Path(shutil.copytree(export, tmp_path / "fitted", copy_function=os.link))
    (folder / "model.json").unlink()

    def write(threshold):
        settings = settings_of(export) | SHARES | {"calibrated": True, "threshold": threshold}
        (folder / "model.json").write_text(json.dumps(settings))

    write(0.5)
    write(float(predict(files, folder, device="cpu", precision="fp32").p_PNEUMONIA.sort_values().iloc[5:7].mean()))
    return folder


@pytest.fixture
def files(tmp_path):
    data = draw_collection(tmp_path / "data", {"test/NORMAL": 6, "test/PNEUMONIA": 6}, seed=2)
    return sorted((data / "test").glob("*/*"))


@pytest.mark.parametrize("prevalence", [0.03, 0.74, 1e-7, 1 - 1e-7])
def test_the_odds_are_moved_and_the_decisions_stay(prevalence, fitted, files, run, tmp_path):
    before = predict(files, fitted, device="cpu", precision="fp32")
    options = ["--model", fitted, "--precision", "fp32", "--device", "cpu", "--prevalence", prevalence]
    said = run("predict", *files, *options, "--output", "rows.csv")
    assert said.exit_code == 0, said.output
    after = pd.read_csv("rows.csv")
    outputs = np.stack([logits for _, logits, _ in predict_stream(open_model(fitted, "cpu", "fp32"), files)])
    ratios = np.array([1 - prevalence, prevalence]) / [0.26, 0.74]
    expected = softmax(outputs / 0.8 + [0.7, -0.9] + np.log(ratios), axis=1)
    least = min(expected[:, 0].max(), expected[:, 1].max())  # the precision follows the rarer class
    assert after[SCORES].to_numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5 * least)
    assert (after.prediction == before.prediction).all() and after.prediction.nunique() == 2
    assert ((after.p_PNEUMONIA >= after.threshold) == (after.prediction == "PNEUMONIA")).all()
    assert (after.prevalence == prevalence).all() and "prevalence" not in before
    text = " ".join(said.stdout.split())
    assert f"probabilities for a prevalence of {100 * prevalence:.3g} %, moved from 74 %; slope 1.25 and" in text
    own = settings_of(fitted)["threshold"]
    assert f"from a probability of {after.threshold[0]:.4g}, moved from {own:.4g}" in text
    assert after[SCORES].equals(predict(files, fitted, prevalence=prevalence, device="cpu", precision="fp32")[SCORES])


def test_the_decision_is_made_on_the_number_that_is_written(fitted):
    """Of a threshold of 3e-7, seven decimal places would leave one digit; the rest of it decides."""
    model = open_model(fitted, "cpu").at_prevalence(1e-6)
    threshold = 3.2e-7
    at = np.log(threshold / (1 - threshold))
    steps = np.geomspace(1e-12, 1, 121)  # some of them below half a unit of the last place, whatever it is
    for margin in (*-steps, *steps):
        logits = np.array([0.0, 0.8 * (at + margin - model.scaling.intercept_of(1))])
        result = DecisionRule(model, threshold).result("a.jpeg", logits)
        assert (result.probabilities["PNEUMONIA"] >= threshold) == (result.prediction == "PNEUMONIA")
        if abs(margin) > 2e-6:
            assert (result.prediction == "PNEUMONIA") == (margin > 0), margin


def test_a_given_threshold_is_on_the_probabilities_that_are_written(fitted, files):
    scores = predict(files, fitted, prevalence=0.03, device="cpu").p_PNEUMONIA
    at = float(scores.median())
    table = predict(files, fitted, prevalence=0.03, threshold=at, device="cpu")
    assert (table.threshold == at).all() and ((table.prediction == "PNEUMONIA") == (scores >= at)).all()


def test_the_terminal_shows_digits_of_small_probabilities(fitted, files, run):
    said = run("predict", *files, "--model", fitted, "--precision", "fp32", "--prevalence", "1e-7").stdout
    rows = [line.split() for line in said.splitlines() if line.split()[1:2] and line.split()[1] in "NORMAL PNEUMONIA"]
    assert len(rows) == 12 and {len(number) for row in rows for number in row[2:]} == {len("0.000000000123")}
    shown = {label: [float(p) for _, name, _, p in rows if name == label] for label in ("NORMAL", "PNEUMONIA")}
    assert max(shown["NORMAL"]) < min(shown["PNEUMONIA"])  # four decimal places would show 0 for all


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prevalence", "0"], ["--prevalence 0: give a number that is above 0 and below 1"]),
        (["--prevalence", "1"], ["--prevalence 1: give a number that is above 0 and below 1"]),
        (["--prevalence", "nan"], ["give a number that is above 0 and below 1"]),
        (["--prevalence", "0.03", "--uncalibrated"], ["--prevalence 0.03: moves", "--uncalibrated", "leave out one"]),
    ],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_what_is_refused(command, options, words, fitted, files, run, refused):
    where = files[:1] if command == "predict" else ["--data", files[0].parents[2]]
    refused(run(command, *where, "--model", fitted, *options), *words, code=None)


def test_what_has_no_prevalence_is_refused(fitted, export, files, run, refused):
    settings = settings_of(fitted)
    settings["data"]["valid"]["NORMAL"] = 0
    (fitted / "model.json").write_text(json.dumps(settings | {"prior": None}))
    words = "--prevalence 0.03:", "does not say which share its probabilities are set for"
    refused(run("predict", files[0], "--model", fitted, "--prevalence", "0.03"), *words)
    refused(run("serve", fitted, "--port", "0", "--prevalence", "0.03"), *words)


def test_rows_of_another_prevalence_are_not_continued(fitted, files, run, refused):
    options = ["--model", fitted, "--precision", "fp32", "--output", "rows.csv", "--threshold", "0.5"]
    assert run("predict", *files, *options, "--prevalence", "1e-6").exit_code == 0
    whole = Path("rows.csv").read_text()
    Path("rows.csv").write_text("".join(whole.splitlines(keepends=True)[:6]))
    more = [*options, "--resume"]
    refused(
        run("predict", *files, *more), "rows.csv has prevalence besides", "give the options of the run that wrote it"
    )
    refused(run("predict", *files, *more, "--prevalence", "2e-6"), "the prevalence in rows.csv is 1e-06, here 2e-06")
    assert run("predict", *files, *more, "--prevalence", "1e-6").exit_code == 0
    pd.testing.assert_frame_equal(pd.read_csv("rows.csv"), pd.read_csv(StringIO(whole)), rtol=1e-4)


def test_another_model_is_not_continued_though_all_probabilities_are_small(fitted, files, run, refused):
    options = ["--model", fitted, "--precision", "fp32", "--output", "rows.csv", "--prevalence", "1e-6"]
    assert run("predict", *files, *options, "--threshold", "0.5").exit_code == 0
    settings = settings_of(fitted) | {"temperature": 0.4}
    (fitted / "model.json").write_text(json.dumps(settings))
    refused(run("predict", *files, *options, "--threshold", "0.5", "--resume"), "came from another model")


def test_the_server_moves_them_too(fitted, files):
    model = open_model(fitted, "cpu", "fp32").at_prevalence(0.03)
    builder, decoder = RowBuilder(model, PredictConfig()), Decoder()
    facts = ModelFacts.of(builder)
    expected = predict(files[:2], fitted, prevalence=0.03, device="cpu", precision="fp32")
    for file, (_, row) in zip(files, expected.iterrows(), strict=False):
        found = predict_file(builder, decoder, str(file), file.read_bytes(), Options(heatmap=False))
        assert list(found.row) == list(expected.columns) and found.row["prevalence"] == 0.03
        assert found.row["p_PNEUMONIA"] == pytest.approx(row.p_PNEUMONIA, rel=1e-4)
        assert found.prediction == row.prediction and found.threshold == row.threshold
    decoder.close()
    assert facts.prevalence == 0.03 and facts.probabilities.startswith("for a prevalence of 3 %, moved from 74 %; ")
    page = html.unescape(_render(SimpleNamespace(builder=builder, facts=facts)))
    assert '"prevalence":0.03' in page and facts.probabilities in page and '"name": "prevalence"' in page


def test_the_band_is_of_the_probabilities_that_are_written(fitted, files):
    """At a small prevalence all of them are small, and a band among them is narrow."""
    options = {"prevalence": 1e-7, "device": "cpu", "precision": "fp32"}
    before = predict(files, fitted, **options)
    distances = (before.p_PNEUMONIA - before.threshold).abs()
    width = float(distances.sort_values().iloc[3:5].mean())
    assert width < 1e-7
    table = predict(files, fitted, abstain=width, **options)
    assert ((table.prediction == "uncertain") == (distances <= width)).all()
    assert (table.prediction == "uncertain").sum() == 4
