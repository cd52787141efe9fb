"""`evaluate` measures what is called beside all images; `interpret` marks what would be withheld."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from tests.conftest import draw_collection
from xray_fastai import evaluate, interpret, predict
from xray_fastai.evaluation import coverage
from xray_fastai.inference.model import open_model
from xray_fastai.inference.rows import DecisionRule, Withheld
from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import values


class LikeBrightness:
    """A gate that finds bright images unlike the training images."""

    def __init__(self, limit):
        self.limit = limit

    def unlike(self, images, features):
        return images.float().mean((1, 2, 3)).numpy() / 2.55


@pytest.fixture
def data(tmp_path):
    return draw_collection(tmp_path / "data", {"test/NORMAL": 9, "test/PNEUMONIA": 9}, seed=1)


@pytest.fixture
def gated(export, data):
    """The small model with a gate that withholds about a quarter of the images."""
    model = dataclasses.replace(open_model(export, "cpu", "fp32"), gate=LikeBrightness(100.0))
    limit = float(predict([data / "test" / "NORMAL", data / "test" / "PNEUMONIA"], model).unlike.quantile(0.75))
    return dataclasses.replace(model, gate=LikeBrightness(limit))


def test_what_is_called_is_measured_beside_all_images(gated, data, tmp_path):
    result = evaluate(gated, data, output=tmp_path / "out")
    table = pd.read_csv(result.path / "predictions.csv")
    rows = predict(list(table.path), gated)
    assert (table.uncertain == (rows.prediction == "uncertain")).all() and 0 < table.uncertain.sum() < len(table)
    assert table.unlike.to_numpy() == pytest.approx(rows.unlike.to_numpy())
    assert set(table.prediction) <= set(gated.classes)  # all are measured
    kept = table[~table.uncertain]
    called = json.loads((result.path / "metrics.json").read_text())["called"]
    assert called["images"] == len(kept) and called["withheld"] == {"unlike": len(table) - len(kept), "close": 0}
    assert called["coverage"]["value"] == pytest.approx(len(kept) / len(table))
    assert called["coverage"]["low"] < len(kept) / len(table) < called["coverage"]["high"]
    y_true, y_pred = ((kept[name] == gated.positive).to_numpy().astype(int) for name in ("truth", "prediction"))
    scored = Scored(y_true, kept[["p_NORMAL", "p_PNEUMONIA"]].to_numpy(), np.arange(len(kept)), positive=1)
    expected = values(scored, y_pred) | values(scored)
    assert {name: found["value"] for name, found in called["metrics"].items()} == pytest.approx(expected, nan_ok=True)
    assert sum(map(sum, called["confusion"])) == len(kept)
    assert result.called.loc["accuracy", "value"] == expected["accuracy"]
    text = f"called {len(kept)} of {len(table)} images"
    words = " ".join(str(result).split())
    assert text in words and "unlike the training images" in words and "on the images called" in words
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Metrics on the images called" in page and called["text"] in page
    assert called["text"] in result._repr_html_()
    everything = evaluate(gated, data, output=tmp_path / "all", gate=False)
    assert (
        everything.summary["called"] is None
        and everything.called is None
        and not everything.predictions.uncertain.any()
    )
    assert everything.metrics.equals(result.metrics)
    assert "images called" not in (tmp_path / "all" / "report.html").read_text()


def test_a_band_without_a_gate(run, export, data, tmp_path):
    said = run("evaluate", "--model", export, "--data", data, "--abstain", "0.49", "--output", tmp_path / "out")
    assert said.exit_code == 0, said.output
    called = json.loads((tmp_path / "out" / "evaluation-test" / "metrics.json").read_text())["called"]
    assert called["withheld"]["close"] > 0 and called["limit"] is None
    assert "within 0.49 of the threshold" in " ".join(said.stdout.split())
    assert pd.read_csv(tmp_path / "out" / "evaluation-test" / "predictions.csv").unlike.isna().all()


def test_coverage_is_measured_by_patient(export):
    """Ten patients, four images each: two patients are withheld, as a whole or an image of each of eight."""
    rule = DecisionRule(open_model(export, "cpu"), 0.5, limit=50.0)
    patients = np.repeat(np.arange(10), 4)
    scored = Scored(np.arange(40) % 2, np.full((40, 2), 0.5), patients, positive=1)
    whole = np.where(patients < 2, 90.0, 10.0)
    spread = np.where((np.arange(40) % 4 == 0) & (patients < 8), 90.0, 10.0)
    widths = []
    for unlike in (whole, spread):
        found = coverage.called_of(rule, scored, np.ones(40, int), unlike)
        assert found.coverage.value == 0.8 and found.withheld.count(Withheld.UNLIKE) == 8
        widths.append(found.coverage.high - found.coverage.low)
    assert widths[0] > 1.5 * widths[1]


def test_nothing_may_be_called(export):
    rule = DecisionRule(open_model(export, "cpu"), 0.5, limit=50.0)
    scored = Scored(np.arange(4) % 2, np.full((4, 2), 0.5), np.arange(4), positive=1)
    found = coverage.called_of(rule, scored, np.ones(4, int), np.full(4, 99.0)).to_json(lambda intervals: intervals)
    assert found["images"] == 0 and found["metrics"] is None and found["withheld"]["unlike"] == 4


def test_interpret_marks_what_would_be_withheld(gated, data, tmp_path):
    result = interpret(gated, data, "test", top=18, output=tmp_path / "out")
    table = pd.read_csv(result.path / "top_losses.csv")
    rows = predict(list(table.path), gated)
    assert (table.uncertain == (rows.prediction == "uncertain")).all() and table.uncertain.any()
    marked = int(table.uncertain.sum())
    assert f"{marked} of these images are unlike the training images" in " ".join(str(result).split())
