"""`evaluate` gives scikit-learn's numbers with honest intervals, and says in one line what it can't evaluate."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn import metrics as sk

from tests.conftest import QUICK, draw_collection, settings_of
from xray_fastai import metrics
from xray_fastai.evaluation.evaluate import evaluate

TEST = {"test/NORMAL": 9, "test/PNEUMONIA": 7}
FILES = {"confusion.png", "metrics.json", "precision_recall.png", "predictions.csv", "reliability.png", "roc.png"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A split to evaluate on, with images that are hard to tell: noise, and a dark one among the bright."""
    root = draw_collection(tmp_path_factory.mktemp("evaluate") / "data", TEST, seed=1)
    rng = np.random.default_rng(0)
    for label in ("NORMAL", "PNEUMONIA"):
        for i in range(3):
            noise = Image.fromarray(rng.normal(110, 30, (48, 40)).clip(0, 255).astype(np.uint8))
            noise.save(root / "test" / label / f"noise{i}.png")
    shutil.copy(root / "test" / "NORMAL" / "IM-test0.jpeg", root / "test" / "PNEUMONIA" / "IM-0001-0001.jpeg")
    return root


@pytest.fixture
def changed(export, tmp_path):
    """A copy of the export with other values in its `model.json`."""

    def changed(**settings):
        shutil.copytree(export, tmp_path / "changed", copy_function=os.link)
        (tmp_path / "changed" / "model.json").unlink()
        (tmp_path / "changed" / "model.json").write_text(json.dumps(settings_of(export) | settings))
        return tmp_path / "changed"

    return changed


@pytest.fixture
def evaluated(run, data, tmp_path):
    """Evaluate by the command line; the printed text, `metrics.json` and `predictions.csv`."""

    def evaluated(export, *options, data=data):
        result = run("evaluate", "--model", export, "--data", data, "--output", tmp_path / "out", *options)
        assert result.exit_code == 0, result.output
        (folder,) = (tmp_path / "out").glob("evaluation-*")
        assert {path.name for path in folder.iterdir()} == FILES
        told = json.loads((folder / "metrics.json").read_text())
        return result.stdout, told, pd.read_csv(folder / "predictions.csv")

    return evaluated


@pytest.fixture
def refuse(run, refused, export, tmp_path):
    """Check that an evaluation is refused, and that it leaves nothing."""

    def refuse(data, *words, options=(), model=export):
        refused(run("evaluate", "--model", model, "--data", data, "--output", tmp_path / "out", *options), *words)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    return refuse


def scored(classes, images=60, patients=40, seed=0):
    """Images of several patients, predicted somewhat well, with equal probabilities among them."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=images)
    probabilities = rng.dirichlet(np.ones(classes), images) + np.eye(classes)[truth] * 0.4
    probabilities = np.round(probabilities / probabilities.sum(axis=1, keepdims=True), 1)
    probabilities[:, -1] = 1 - probabilities[:, :-1].sum(axis=1)
    patients = np.unique(rng.integers(patients, size=images), return_inverse=True)[1]
    return metrics.Scored(truth, probabilities, patients, 1 if classes == 2 else None)


def test_what_is_written_and_printed(evaluated, export, data):
    text, told, table = evaluated(export, "--threshold", "0.4")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and text.isascii()
    assert "no medical device" in lines[0] and "no medical device" in lines[-1]
    assert "95 % intervals: bootstrap over 23 patients, an image each, 2,000 resamples" in lines
    assert any("at threshold 0.5 " in line and "at threshold 0.4" in line for line in lines)

    columns = ["path", "patient", "truth", "prediction", "p_NORMAL", "p_PNEUMONIA", "loss"]
    assert table.columns.tolist() == columns
    assert {Path(p).name for p in table.path} == {p.name for p in (data / "test").glob("*/*")}
    assert (table.truth == [Path(p).parent.name for p in table.path]).all()
    assert (table.prediction == np.where(table.p_PNEUMONIA >= 0.4, "PNEUMONIA", "NORMAL")).all()
    of_truth = np.where(table.truth == "PNEUMONIA", table.p_PNEUMONIA, table.p_NORMAL)
    assert table.loss.to_numpy() == pytest.approx(-np.log(of_truth))

    head = {"format": 1, "model": "small", "architecture": "resnet18", "split": "test", "data": str(data)}
    head |= {"images": 23, "patients": 23, "counts": {"NORMAL": 12, "PNEUMONIA": 11}, "positive": "PNEUMONIA"}
    head |= {"calibrated": False, "temperature": 1.0}  # too few validation images
    assert {key: told[key] for key in head} == head
    truth, score = table.truth == "PNEUMONIA", table.p_PNEUMONIA
    free = {
        "roc_auc": sk.roc_auc_score(truth, score),
        "average_precision": sk.average_precision_score(truth, score),
        "brier_score": sk.brier_score_loss(truth, score),
    }
    for threshold, point in zip((0.5, 0.4), ("0.5", "chosen"), strict=True):
        called, found = score >= threshold, told["operating_points"][point]
        expected = {
            "accuracy": sk.accuracy_score(truth, called),
            "balanced_accuracy": sk.balanced_accuracy_score(truth, called),
            "sensitivity": sk.recall_score(truth, called),
            "specificity": sk.recall_score(~truth, ~called),
            "ppv": sk.precision_score(truth, called),
            "npv": sk.precision_score(~truth, ~called),
            "f1": sk.f1_score(truth, called),
        }
        assert found["threshold"] == threshold
        assert found["confusion"] == sk.confusion_matrix(truth, called).tolist()
        assert {name: m["value"] for name, m in found["metrics"].items()} == pytest.approx(expected)
        assert all(m["low"] <= m["value"] <= m["high"] for m in found["metrics"].values())
    assert told["metrics"].keys() == {*free, "expected_calibration_error"}
    assert {name: told["metrics"][name]["value"] for name in free} == pytest.approx(free)


def test_json(run, export, data, tmp_path):
    result = run("evaluate", "--model", export, "--data", data, "--output", tmp_path / "new" / "folder", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "new/folder/evaluation-test/metrics.json").read_text())


def test_python_and_an_earlier_evaluation(run, changed, data):
    """Into the export itself, the newest in ./exports; what an earlier run left there goes as a whole."""
    Path("exports").mkdir()
    shutil.move(changed(), "exports/run")
    first = evaluate(data=data)
    assert first.path == Path("exports/run/evaluation-test")
    (first.path / "stale.png").write_text("")
    second = evaluate(data=str(data), threshold=0.5)
    assert {path.name for path in first.path.iterdir()} == FILES
    assert not list(Path("exports/run").glob(".*"))
    pd.testing.assert_frame_equal(first.metrics, second.metrics)  # the same resamples each time
    assert second.metrics.columns.tolist() == ["value", "low", "high"]
    assert second.metrics.loc["sensitivity", "value"] == second.operating_points["0.5"].loc["sensitivity", "value"]
    assert second.confusion.to_numpy().sum() == len(second.predictions) == 23
    assert second.confusion.loc["PNEUMONIA"].sum() == 11
    html = second._repr_html_()
    assert html.count("data:image/png;base64") == 4 and "ROC AUC" in html


def test_a_failure_leaves_the_earlier_evaluation(run, refused, export, data, tmp_path):
    earlier = tmp_path / "out" / "evaluation-test"
    earlier.mkdir(parents=True)
    (earlier / "metrics.json").write_text("earlier")
    broken = shutil.copytree(data, tmp_path / "data")
    first, second, *_ = sorted((broken / "test" / "NORMAL").iterdir())
    first.write_bytes(b"")
    second.unlink()
    second.symlink_to("nowhere.jpeg")
    options = ["--model", export, "--data", broken, "--output", tmp_path / "out"]
    refused(run("evaluate", *options), first, "(and 1 more)", "a part of the split")
    assert (earlier / "metrics.json").read_text() == "earlier"
    assert os.listdir(tmp_path / "out") == ["evaluation-test"]


def test_uncalibrated(evaluated, changed, data):
    """Raw probabilities, and the same decisions: the threshold of the calibrated ones moves with them."""
    export = changed(temperature=2.5, threshold=0.7, calibration="temperature 2.5 by 100 images")
    calibrated = evaluate(export, data)
    text, told, table = evaluated(export, "--uncalibrated")
    assert not told["calibrated"] and "uncalibrated" in text
    assert "(0.7 on calibrated probabilities)" in " ".join(text.split())
    cooled = np.log(table.p_PNEUMONIA / table.p_NORMAL) / 2.5
    p = calibrated.predictions
    assert cooled.to_numpy() == pytest.approx(np.log(p.p_PNEUMONIA / p.p_NORMAL).to_numpy(), abs=1e-6)
    assert (table.prediction == p.prediction).all()
    assert calibrated.summary["operating_points"]["chosen"]["threshold"] == 0.7
    raw = 0.7**2.5 / (0.7**2.5 + 0.3**2.5)
    assert told["operating_points"]["chosen"]["threshold"] == pytest.approx(raw)


def test_one_class_only(evaluated, export, tmp_path):
    text, told, _ = evaluated(export, data=draw_collection(tmp_path / "one", {"test/PNEUMONIA": 4}))
    for name in ("ROC AUC", "average precision", "specificity", "balanced accuracy"):
        assert any(line.startswith(name) and line.endswith("one class only") for line in text.splitlines()), name
    assert told["metrics"]["roc_auc"] == {"value": None, "low": None, "high": None}
    point = told["operating_points"]["chosen"]
    assert point["metrics"]["sensitivity"]["value"] == point["metrics"]["accuracy"]["value"] is not None
    assert told["metrics"]["brier_score"]["low"] is not None


def test_classes_in_another_order(evaluated, export, changed, data):
    """Truth goes by name: with the names of a network's outputs exchanged, what was right is wrong."""
    _, told, table = evaluated(changed(classes=["PNEUMONIA", "NORMAL"]))
    usual = evaluate(export, data, output="usual")
    assert list(told["counts"]) == ["PNEUMONIA", "NORMAL"]
    assert (table.truth == usual.predictions.truth).all()
    assert table.p_NORMAL.to_numpy() == pytest.approx(usual.predictions.p_PNEUMONIA.to_numpy())
    assert told["metrics"]["roc_auc"]["value"] == pytest.approx(1 - usual.metrics.loc["roc_auc", "value"])
    assert np.trace(told["operating_points"]["0.5"]["confusion"]) == 23 - np.trace(usual.confusion)


def test_three_classes(evaluated, run, refused, tmp_path):
    train = {"train/COVID": 8, "train/NORMAL": 8, "train/PNEUMONIA": 8}
    test = {"test/COVID": 5, "test/NORMAL": 6, "test/PNEUMONIA": 7}
    root = draw_collection(tmp_path / "three", train | test)
    fit = ["--weights", "none", "--epochs", 1, "--exports", tmp_path, "--name", "model"]
    assert run("fit", "--data", root, *QUICK, *fit).exit_code == 0
    text, told, table = evaluated(tmp_path / "model", data=root)
    assert max(map(len, text.splitlines())) <= 80
    assert "at threshold" not in text and told["positive"] is None and told["operating_points"].keys() == {"chosen"}
    classes = ["COVID", "NORMAL", "PNEUMONIA"]
    probabilities = table[[f"p_{name}" for name in classes]].to_numpy()
    assert (table.prediction == np.array(classes)[probabilities.argmax(axis=1)]).all()
    assert told["metrics"]["roc_auc"]["value"] == pytest.approx(
        sk.roc_auc_score(table.truth, probabilities, multi_class="ovr", labels=classes)
    )
    chosen = told["operating_points"]["chosen"]
    assert chosen["threshold"] is None
    assert chosen["confusion"] == sk.confusion_matrix(table.truth, table.prediction).tolist()
    assert chosen["metrics"]["accuracy"]["value"] == pytest.approx(sk.accuracy_score(table.truth, table.prediction))
    options = ["--model", tmp_path / "model", "--data", root, "--threshold", "0.3"]
    refused(run("evaluate", *options), "--threshold 0.3: of 3 classes")


@pytest.mark.parametrize("classes", [2, 3])
def test_resamples_are_those_of_scikit_learn(classes):
    """Each resample's metrics, all at once, are scikit-learn's with the resample as `sample_weight`."""
    images = scored(classes)
    called = images.probabilities.argmax(axis=1)
    weights = np.concatenate(list(metrics.patient_weights(images.patients, 8, seed=3)))
    assert (weights[:, images.patients == 5] == weights[:, images.patients == 5][:, :1]).all()
    found = metrics.resampled(images, {"x": called}, weights)
    for i, weight in enumerate(weights):
        free, curves = metrics.ranking_values(images, weight)
        assert {name: found[None, name][i] for name in free} == pytest.approx(free, abs=1e-12)
        assert np.stack([found[None, "auc by class"][i], found[None, "precision by class"][i]], axis=1) == (
            pytest.approx(np.array(curves), abs=1e-12)
        )
        decided = metrics.decision_values(images, called, weight)
        assert {name: found["x", name][i] for name in decided} == pytest.approx(decided, abs=1e-12)


def test_the_band_holds_the_curve_of_a_resample():
    images = scored(2)
    weights = next(metrics.patient_weights(images.patients, 3, seed=0))
    bands = metrics.resampled(images, {}, weights)[None, "band"]
    for weight, (band,) in zip(weights, bands, strict=True):
        false, true, _ = sk.roc_curve(images.truth, images.probabilities[:, 1], sample_weight=weight)
        inner = np.interp(metrics.FALSE_POSITIVE_RATES + 1e-9, false, true)
        assert band[:-1] == pytest.approx(inner[:-1], abs=1e-6)


def test_one_patient_with_many_images_widens_the_interval():
    """Half of the images are called wrongly: once of as many patients, once of a single one."""
    images, number = scored(2, images=200), np.arange(200)
    called = np.where(number < 100, 1 - images.truth, images.truth)
    intervals = [
        metrics.measure(metrics.Scored(images.truth, images.probabilities, patients, 1), {"x": called}).points["x"]
        for patients in (number, np.maximum(number - 99, 0))
    ]
    (value, low, high), (same, lower, higher) = (points["accuracy"] for points in intervals)
    assert value == same == 0.5
    assert higher - lower > 3 * (high - low)


def test_the_interval_is_the_textbook_one():
    """Of a share of 400 independent images, p +- 1.96 sqrt(p (1 - p) / n)."""
    truth = np.ones(400, dtype=int)
    truth[::2] = 0
    called = np.where(np.arange(400) % 10 < 2, 1 - truth, truth)  # 80 % right
    images = metrics.Scored(truth, np.eye(2)[called], np.arange(400), 1)
    value, low, high = metrics.measure(images, {"x": called}).points["x"]["accuracy"]
    half = 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert (value, low, high) == pytest.approx((0.8, 0.8 - half, 0.8 + half), abs=0.006)


def test_the_calibration_error_of_a_textbook_case():
    """Two bins: 10 images at 0.9 of which 6 are positive, 30 at 0.1 of which 3 are."""
    truth = np.repeat([1, 0, 1, 0], [6, 4, 3, 27])
    positive = np.repeat([0.9, 0.1], [10, 30])
    images = metrics.Scored(truth, np.stack([1 - positive, positive], axis=1), np.arange(40), 1)
    free = metrics.measure(images, {}).free
    assert free["expected_calibration_error"].value == pytest.approx(10 / 40 * 0.3)


def test_undefined_resamples_are_left_out():
    """With two positive images of thirty, every eighth resample has none."""
    images = scored(2, images=30, patients=10**6)
    images = metrics.Scored(np.repeat([1, 0], [2, 28]), images.probabilities, images.patients, 1)
    measured = metrics.measure(images, {"x": images.probabilities.argmax(axis=1)})
    assert all(np.isfinite(interval).all() for interval in measured.free.values())
    assert np.isfinite(measured.points["x"]["sensitivity"]).all() and np.isfinite(measured.curves[0].band).all()


def test_one_patient_has_no_interval():
    images = scored(2, patients=1)
    interval = metrics.measure(images, {}).free["roc_auc"]
    assert np.isfinite(interval.value) and np.isnan([interval.low, interval.high]).all()


def test_2000_resamples_of_624_images_take_seconds():
    images = scored(2, images=624, patients=400)
    called = images.probabilities.argmax(axis=1)
    started = time.perf_counter()
    metrics.measure(images, {"0.5": called, "chosen": called})
    assert time.perf_counter() - started < 5


def test_no_export_at_all(run, refused, data):
    refused(run("evaluate", "--data", data), "exports: no export in it", "xray-fastai fit", "--model")


def test_a_path_that_is_not_an_export(refuse, data, tmp_path):
    refuse(data, f"{tmp_path}: not an export", model=tmp_path)


def test_data_that_is_gone(run, refused, export):
    refused(run("evaluate", "--model", export), f"--data {export.parent / 'data'}: no such folder")


def test_no_such_split(refuse, collection):
    refuse(collection, f"--data {collection}: no test/ in it")
    refuse(collection, "--split foo: choose one of test, valid, train", options=["--split", "foo"])


def test_a_split_without_images(refuse, tmp_path):
    (tmp_path / "data" / "test" / "NORMAL").mkdir(parents=True)
    refuse(tmp_path / "data", "test: no image in it", ".jpeg")


def test_images_without_labels(refuse, data, tmp_path):
    (tmp_path / "data" / "test").mkdir(parents=True)
    shutil.copy(data / "test" / "NORMAL" / "IM-test0.jpeg", tmp_path / "data" / "test")
    refuse(tmp_path / "data", "no class folders in it, but images without a class", "NORMAL, PNEUMONIA")


def test_a_class_that_the_model_does_not_know(refuse, tmp_path):
    root = draw_collection(tmp_path / "data", {"test/NORMAL": 1, "test/COVID": 1})
    refuse(root, "holds class COVID", "the classes known are NORMAL, PNEUMONIA")


@pytest.mark.parametrize("threshold", ["half", "1.5", "-0.1", "nan", ""])
def test_a_threshold_that_is_none(threshold, refuse, data):
    refuse(data, f"--threshold {threshold}: give auto", options=["--threshold", threshold])


def test_output_below_a_file(run, refused, export, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    options = ["--model", export, "--data", data, "--output", tmp_path / "file"]
    refused(run("evaluate", *options), tmp_path / "file", "can't be written", "--output")


def test_a_folder_of_that_name_that_is_no_evaluation(run, refused, export, data, tmp_path):
    (tmp_path / "evaluation-test").mkdir()
    (tmp_path / "evaluation-test" / "mine").write_text("mine")
    options = ["--model", export, "--data", data, "--output", tmp_path]
    refused(run("evaluate", *options), "evaluation-test: already exists", "--output")
    assert (tmp_path / "evaluation-test" / "mine").read_text() == "mine"


def test_the_validation_split_is_the_one_of_fit(run, export, tmp_path):
    options = ["--data", export.parent / "moved", "--split", "valid", "--output", tmp_path]
    result = run("evaluate", "--model", export, *options)
    assert result.exit_code == 0, result.output
    assert "fit chose its epoch, temperature and threshold on this split" in " ".join(result.stdout.split())
    told = json.loads((tmp_path / "evaluation-valid" / "metrics.json").read_text())
    assert told["counts"] == settings_of(export)["data"]["valid"]
