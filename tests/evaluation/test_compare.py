"""`compare` measures two models on the same images, each at its own threshold, and refuses what cannot be compared."""

import json
import shutil

import numpy as np
import pytest

from tests.conftest import draw_collection, settings_of
from tests.evaluation.test_evaluate import sign_anew
from xray_fastai import compare, evaluate


@pytest.fixture
def data(tmp_path):
    return draw_collection(tmp_path / "data", {"test/NORMAL": 9, "test/PNEUMONIA": 7}, seed=1)


@pytest.fixture
def other(export, tmp_path):
    """Copy the export with other values in its `model.json`, as if its weights were trained for them."""

    def other(**settings):
        shutil.copytree(export, tmp_path / "other")
        (tmp_path / "other" / "model.json").write_text(json.dumps(settings_of(export) | settings))
        sign_anew(tmp_path / "other")
        return tmp_path / "other"

    return other


def test_each_model_decides_at_its_own_threshold(run, export, other, data, tmp_path):
    """The figures of each are those of `evaluate`."""
    second = other(threshold=0.9)
    result = run("compare", export, second, "--data", data, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "comparison-small-other"
    assert {path.name for path in folder.iterdir()} == {"comparison.json", "comparison.png"}
    summary = json.loads((folder / "comparison.json").read_text())
    for key, model in (("a", export), ("b", second)):
        expected = evaluate(model, data, output=tmp_path / key).metrics.value
        for name, metric in summary["metrics"].items():
            found = np.nan if metric[key] is None else metric[key]
            assert found == pytest.approx(expected[name], nan_ok=True), name
    assert summary["metrics"]["roc_auc"]["difference"] == 0 and summary["images"] == 16
    assert "no medical device" in result.stdout and "B - A" in result.stdout and "McNemar" in result.stdout
    assert all(len(line) <= 80 or "/" in line for line in result.stdout.splitlines())


def test_json_goes_to_standard_output(run, export, data, tmp_path):
    result = run("compare", export, export, "--data", data, "--output", tmp_path, "--json")
    assert json.loads(result.stdout)["a"] == json.loads(result.stdout)["b"]


def test_the_classes_may_stand_in_another_order(export, other, data, tmp_path):
    """With the names of a network's outputs exchanged, what was right is wrong, and the figures are `evaluate`'s."""
    turned = other(classes=["PNEUMONIA", "NORMAL"])
    found = compare(export, turned, data, output=tmp_path / "out").differences
    expected = evaluate(turned, data, output=tmp_path / "b").metrics.value
    assert found.b["roc_auc"] == pytest.approx(1 - found.a["roc_auc"])
    assert found.b.astype(float)[expected.index].to_numpy() == pytest.approx(expected.to_numpy(), nan_ok=True)


def test_what_cannot_be_compared_is_refused(run, refused, export, other, data, tmp_path):
    opposite = other(positive="NORMAL")
    refused(run("compare", export, opposite, "--data", data, "--output", tmp_path), "to detect: NORMAL", "classes")
    refused(run("compare", export, export, "--data", data, "--split", "all"), "--split", "choose one of", code=2)
    refused(run("compare", export, tmp_path / "none", "--data", data), "none")
