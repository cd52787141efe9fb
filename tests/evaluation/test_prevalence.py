"""`evaluate --prevalence`: probabilities, threshold, PPV and NPV for another share of the class to detect."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from tests.conftest import draw_collection, settings_of
from xray_fastai.evaluation import plots
from xray_fastai.metrics.intervals import measure
from xray_fastai.metrics.predictive_values import predictive_values
from xray_fastai.metrics.scored import Scored


@pytest.fixture
def data(tmp_path):
    return draw_collection(tmp_path / "data", {"test/NORMAL": 9, "test/PNEUMONIA": 7}, seed=1)


def table_of(folder):
    return pd.read_csv(folder / "predictions.csv"), json.loads((folder / "metrics.json").read_text())


def test_the_decisions_stay_and_the_predictive_values_follow(run, export, data, tmp_path):
    options = ["evaluate", "--model", export, "--data", data, "--precision", "fp32"]
    assert run(*options, "--output", tmp_path / "own").exit_code == 0
    said = run(*options, "--output", tmp_path / "out", "--prevalence", "0.03")
    assert said.exit_code == 0, said.output
    before, plain = table_of(tmp_path / "own" / "evaluation-test")
    after, summary = table_of(tmp_path / "out" / "evaluation-test")
    assert (before.prediction == after.prediction).all() and after.prediction.nunique() == 2
    odds, moved = (table.p_PNEUMONIA / table.p_NORMAL for table in (before, after))
    assert (moved / odds).to_numpy() == pytest.approx(np.full(16, 0.03 / 0.97))  # balanced weights: from 50 %
    point, own = (s["operating_points"]["chosen"] for s in (summary, plain))
    assert summary["prevalence"] == 0.03 and plain["prevalence"] is None and own["at_prevalence"] is None
    assert point["threshold"] == pytest.approx(settings_of(export)["threshold"] * 0.03 / 0.5, abs=0.002)
    assert ((after.p_PNEUMONIA >= point["threshold"]) == (after.prediction == "PNEUMONIA")).all()
    assert point["metrics"] == own["metrics"]
    y_true, y_pred = ((after[c] == "PNEUMONIA").to_numpy().astype(int) for c in ("truth", "prediction"))
    scored = Scored(y_true, np.eye(2)[y_pred], np.arange(16), positive=1)
    for name, interval in predictive_values(scored, y_pred, 0.03)._asdict().items():
        assert list(point["at_prevalence"][name].values()) == pytest.approx(list(interval))
    text = " ".join(said.stdout.split())
    assert "probabilities for a prevalence of 3 %, moved from 50 %; not calibrated" in text
    assert re.search(r"NPV at a prevalence of 3 % +\d\.\d{3} \(\d\.\d{3} to \d\.\d{3}\)", said.stdout)
    assert "the images have 43.8 %: Brier score, likelihood and calibration on them say nothing about it" in text
    assert f"{settings_of(export)['threshold']:.4g} on the export's own probabilities" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("PPV at a prevalence of 3 %") == 1 and "PPV and NPV against the prevalence" in page
    assert "at a prevalence" not in (tmp_path / "own" / "report.html").read_text()


@pytest.mark.parametrize(("prevalence", "marked"), [(None, 1), (0.03, 2), (1e-5, 2)])
def test_the_picture_shows_both_values_and_marks_the_shares(prevalence, marked):
    rng = np.random.default_rng(0)
    y_true = (np.arange(200) < 148).astype(int)
    positive = np.clip(rng.normal(0.35 + 0.25 * y_true, 0.2), 0, 1)
    scored = Scored(y_true, np.stack([1 - positive, positive], axis=1), np.arange(200), positive=1)
    y_pred = (positive >= 0.4).astype(int)
    measured = measure(scored, {"chosen": y_pred}, resamples=20)
    summary = {
        "model": "small", "split": "test", "images": 200, "patients": 200, "calibrated": True, "positive": "PNEUMONIA",
        "operating_points": {"chosen": {"threshold": 0.4}}, "prevalence": prevalence,
    }  # fmt: skip
    (axes,) = plots._predictive_values(summary, scored, measured).axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert len(lines) == 2 + marked
    assert lines["these images: 74 %"][0, 0] == 0.74
    assert prevalence is None or lines[f"prevalence: {100 * prevalence:g} %"][0, 0] == prevalence
    for name, values in predictive_values(scored, y_pred, 0.1)._asdict().items():
        curve = lines[f"{name.upper()}, with its 95 % interval"]
        assert curve[0, 0] == pytest.approx(min(0.001, prevalence or 1)) and curve[-1, 0] == pytest.approx(0.9)
        assert np.interp(0.1, *curve.T) == pytest.approx(values.value, abs=0.002)


def test_of_one_class_there_is_no_curve(run, export, tmp_path):
    data = draw_collection(tmp_path / "data", {"test/NORMAL": 6}, seed=1)
    said = run("evaluate", "--model", export, "--data", data, "--output", tmp_path / "out", "--prevalence", "0.03")
    assert said.exit_code == 0, said.output
    assert re.search(r"PPV at a prevalence of 3 % +one class only", said.stdout)
    assert (tmp_path / "out" / "evaluation-test" / "predictive_values.png").is_file()
