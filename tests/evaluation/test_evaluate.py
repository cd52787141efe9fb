"""`evaluate` writes scikit-learn's numbers with intervals, and says in one line what it cannot evaluate."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn import metrics as sk

from tests.conftest import QUICK, draw_collection, settings_of
from xray_fastai import DISCLAIMER
from xray_fastai.evaluation import subgroups
from xray_fastai.evaluation.evaluate import evaluate
from xray_fastai.export.layout import SETTINGS, WEIGHTS
from xray_fastai.export.weights_file import FACTS, facts_hash
from xray_fastai.metrics import scored
from xray_fastai.metrics.intervals import measure
from xray_fastai.metrics.table import METRICS
from xray_fastai.system.files import sha256

TEST = {"test/NORMAL": 9, "test/PNEUMONIA": 7}
FILES = {"confusion.png", "decision_curve.png", "metrics.json", "precision_recall.png", "predictions.csv"}
FILES |= {"reliability.png", "roc.png", "scores.png"}
FILES_OF_TWO = FILES | {"predictive_values.png"}  # classes


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
        summary = json.loads((folder / "metrics.json").read_text())
        assert {path.name for path in folder.iterdir()} == (FILES if summary["positive"] is None else FILES_OF_TWO)
        return result.stdout, summary, pd.read_csv(folder / "predictions.csv")

    return evaluated


@pytest.fixture
def refuse(run, refused, export, tmp_path):
    """Check that an evaluation is refused, and that it leaves nothing."""

    def refuse(data, *words, options=(), model=export):
        refused(
            run("evaluate", "--model", model, "--data", data, "--output", tmp_path / "out", *options), *words, code=None
        )
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    return refuse


@pytest.mark.slow
def test_what_is_written_and_printed(evaluated, export, data, tmp_path):
    text, summary, table = evaluated(export, "--threshold", "0.4")
    lines = text.splitlines()
    assert not [line for line in lines if len(line) > 80 and "/" not in line] and text.isascii()
    assert lines[0] == lines[-2] == DISCLAIMER and lines[-1].startswith("next: xray-fastai interpret")
    assert "95 % intervals by patient: 23 patients, an image each." in text
    assert any("at threshold 0.5 " in line and "at threshold 0.4" in line for line in lines)

    columns = ["path", "patient", "truth", "prediction", "p_NORMAL", "p_PNEUMONIA", "loss", "unlike", "uncertain"]
    assert table.columns.tolist() == columns
    assert {Path(p).name for p in table.path} == {p.name for p in (data / "test").glob("*/*")}
    assert (table.truth == [Path(p).parent.name for p in table.path]).all()
    assert (table.prediction == np.where(table.p_PNEUMONIA >= 0.4, "PNEUMONIA", "NORMAL")).all()
    of_truth = np.where(table.truth == "PNEUMONIA", table.p_PNEUMONIA, table.p_NORMAL)
    assert table.loss.to_numpy() == pytest.approx(-np.log(of_truth))

    head = {"format": 1, "model": "small", "architecture": "small_resnet", "split": "test", "data": str(data)}
    head |= {"images": 23, "patients": 23, "counts": {"NORMAL": 12, "PNEUMONIA": 11}, "positive": "PNEUMONIA"}
    head |= {"calibrated": False, "temperature": 1.0, "intercepts": None}  # too few validation images
    head |= {"calibration": "none", "probabilities": "not calibrated"}
    head |= {"patients_known_by": {"the file names": 23 - summary["images_without_patient"]}}
    assert {key: summary[key] for key in head} == head
    y_prob = table[["p_NORMAL", "p_PNEUMONIA"]].to_numpy()
    y_true, score = (table.truth == "PNEUMONIA").to_numpy().astype(int), table.p_PNEUMONIA.to_numpy()
    y_pred = {"0.5": (score >= 0.5).astype(int), "chosen": (score >= 0.4).astype(int)}
    patients = pd.factorize(table.patient)[0]
    expected = measure(scored.Scored(y_true, y_prob, patients, positive=1), y_pred)
    for (name, point), threshold in zip(summary["operating_points"].items(), (0.5, 0.4), strict=True):
        assert point["threshold"] == threshold
        assert point["confusion"] == sk.confusion_matrix(y_true, y_pred[name]).tolist()
        assert list(point["metrics"]) == [name for name, metric in METRICS.items() if metric.needs_threshold]
        for metric, interval in point["metrics"].items():
            assert list(interval.values()) == pytest.approx(expected.points[name][metric])
            assert interval["low"] <= interval["value"] <= interval["high"]
    assert list(summary["metrics"]) == [name for name, metric in METRICS.items() if not metric.needs_threshold]
    for metric, interval in summary["metrics"].items():
        limits = [np.nan if number is None else number for number in interval.values()]
        assert limits == pytest.approx(list(expected.free[metric]), nan_ok=True)
        assert (interval["low"] is None) == (metric == "expected_calibration_error")
    assert sum(of_bin["images"] for of_bin in summary["reliability"]) == 23 and summary["note"] is None
    for metric in METRICS.values():
        assert sum(line.startswith(f"{metric.title} ") for line in lines) == 1, metric.name


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "label"), [("1", "NORMAL"), ("0", "PNEUMONIA")])
def test_every_image_called_one_class(threshold, label, evaluated, export, tmp_path):
    text, summary, _ = evaluated(export, "--threshold", threshold)
    said = f"every image is called {label} at the threshold {threshold}: train for more epochs"
    assert said in " ".join(text.split()) and any(note.startswith(said) for note in summary["notes"])
    assert said in (tmp_path / "out" / "report.html").read_text()
    _, summary, _ = evaluated(export, "--threshold", "0.4")
    assert not any("every image is called" in note for note in summary["notes"])


@pytest.mark.slow
def test_json(run, export, data, tmp_path):
    result = run("evaluate", "--model", export, "--data", data, "--output", tmp_path / "new" / "folder", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "new/folder/evaluation-test/metrics.json").read_text())


@pytest.mark.slow
def test_python_and_an_earlier_evaluation(run, changed, data):
    """Into the export itself, the newest in ./exports; what an earlier run left there goes as a whole."""
    Path("exports").mkdir()
    shutil.move(changed(), "exports/run")
    first = evaluate(data=data)
    assert first.path == Path("exports/run/evaluation-test-data")
    (first.path / "stale.png").write_text("")
    second = evaluate(data=str(data), threshold=0.5)
    assert {path.name for path in first.path.iterdir()} == FILES_OF_TWO
    assert not list(Path("exports/run").glob(".*"))
    pd.testing.assert_frame_equal(first.metrics, second.metrics)  # the same resamples each time
    assert second.metrics.columns.tolist() == ["value", "low", "high"]
    assert second.metrics.loc["sensitivity", "value"] == second.operating_points["0.5"].loc["sensitivity", "value"]
    assert second.confusion.to_numpy().sum() == len(second.predictions) == 23
    assert second.confusion.loc["PNEUMONIA"].sum() == 11
    html = second._repr_html_()
    assert html.count("data:image/png;base64") == 7 and "ROC AUC" in html


@pytest.mark.slow
def test_two_data_sets_are_kept_apart(run, changed, data, tmp_path):
    """`evaluate` and `interpret` of a second hospital leave those of the fit's own data, and the report names both."""
    own, other, same_name = data, tmp_path / "hospital b", tmp_path / "deep" / "hospital b"
    copy = changed()
    change_settings = json.loads((copy / SETTINGS).read_text())
    change_settings["settings"]["data"] = change_settings["data"]["name"] = str(own)
    (copy / SETTINGS).write_text(json.dumps(change_settings))
    draw_collection(other, {"test/NORMAL": 3, "test/PNEUMONIA": 2})
    draw_collection(same_name, {"test/NORMAL": 2, "test/PNEUMONIA": 2})
    for command, option in (("evaluate", "--json"), ("interpret", "--top=1")):
        for folder in (["--data", os.path.relpath(own)], [], ["--data", other]):
            result = run(command, "--model", copy, "--split", "test", *folder, option)
            assert result.exit_code == 0 and "replaces" not in result.output, result.output
    kept = [f"{kind}-test{of}" for kind in ("evaluation", "interpretation") for of in ("", "-hospital-b")]
    assert sorted(path.name for path in copy.glob("*-test*")) == kept
    page = (copy / "report.html").read_text()
    assert page.index(f"The test split of {own}: 23 images") < page.index(f"The test split of {other}: 5 images")
    assert f'of the test split of <span class="path">{own}</span>' in page
    assert f"of {other}: " in page[page.index("Where it errs") :]
    assert "test (evaluated)" in page and "test-hospital-b (evaluated)" in page
    for command, kind in (("evaluate", "evaluation"), ("interpret", "interpretation")):
        text = " ".join(run(command, "--model", copy, "--split", "test", "--data", same_name).stdout.split())
        assert f"replaces {kind}-test-hospital-b of {other}" in text


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


@pytest.mark.slow
def test_uncalibrated(evaluated, changed, data):
    """Raw probabilities, and the same decisions: the threshold of the export's own moves with them."""
    note = {"calibration": "temperature 2.5 by 100 images", "calibration_kind": "cautious", "calibrated": True}
    export = changed(temperature=2.5, threshold=0.7, **note)
    calibrated = evaluate(export, data)
    assert calibrated.summary["calibration"] == "cautious" and calibrated.summary["calibrated"]
    assert calibrated.about["probabilities"] == "cautious temperature 2.5 from validation images"
    text, summary, table = evaluated(export, "--uncalibrated")
    assert not summary["calibrated"] and summary["calibration"] == "none"
    assert "not calibrated, by --uncalibrated" in text
    assert "(0.7 on the export's own probabilities)" in " ".join(text.split())
    cooled = np.log(table.p_PNEUMONIA / table.p_NORMAL) / 2.5
    p = calibrated.predictions
    assert cooled.to_numpy() == pytest.approx(np.log(p.p_PNEUMONIA / p.p_NORMAL).to_numpy(), abs=1e-6)
    assert (table.prediction == p.prediction).all()
    assert calibrated.summary["operating_points"]["chosen"]["threshold"] == 0.7
    raw = 0.7**2.5 / (0.7**2.5 + 0.3**2.5)
    assert summary["operating_points"]["chosen"]["threshold"] == pytest.approx(raw)


@pytest.mark.slow
def test_one_class_only(evaluated, export, tmp_path):
    text, summary, _ = evaluated(export, data=draw_collection(tmp_path / "one", {"test/PNEUMONIA": 4}))
    for name in ("ROC AUC", "average precision", "specificity", "balanced accuracy"):
        assert any(line.startswith(name) and line.endswith("one class only") for line in text.splitlines()), name
    assert summary["metrics"]["roc_auc"] == {"value": None, "low": None, "high": None}
    point = summary["operating_points"]["chosen"]
    assert point["metrics"]["sensitivity"]["value"] == point["metrics"]["accuracy"]["value"] is not None
    assert summary["metrics"]["brier_score"]["low"] is not None


def sign_anew(folder):
    """Write an export's weights as those of its changed `model.json`."""
    settings, weights = settings_of(folder), folder / WEIGHTS
    save_file(load_file(weights), weights, metadata={FACTS: facts_hash(settings)})
    settings["weights"]["sha256"] = sha256(weights)
    (folder / SETTINGS).write_text(json.dumps(settings))


@pytest.mark.slow
def test_classes_in_another_order(evaluated, export, changed, data):
    """Truth goes by name: with the names of a network's outputs exchanged, what was right is wrong."""
    model = changed(classes=["PNEUMONIA", "NORMAL"])
    sign_anew(model)
    _, summary, table = evaluated(model)
    usual = evaluate(export, data, output="usual")
    assert list(summary["counts"]) == ["PNEUMONIA", "NORMAL"]
    assert (table.truth == usual.predictions.truth).all()
    assert table.p_NORMAL.to_numpy() == pytest.approx(usual.predictions.p_PNEUMONIA.to_numpy())
    assert summary["metrics"]["roc_auc"]["value"] == pytest.approx(1 - usual.metrics.loc["roc_auc", "value"])
    assert np.trace(summary["operating_points"]["0.5"]["confusion"]) == 23 - np.trace(usual.confusion)


@pytest.mark.slow
def test_three_classes(evaluated, run, refused, tmp_path):
    train = {"train/COVID": 8, "train/NORMAL": 8, "train/PNEUMONIA": 8}
    test = {"test/COVID": 5, "test/NORMAL": 6, "test/PNEUMONIA": 7}
    root = draw_collection(tmp_path / "three", train | test)
    fit = ["--weights", "none", "--epochs", 1, "--exports", tmp_path, "--name", "model"]
    assert run("fit", "--data", root, *QUICK, *fit).exit_code == 0
    text, summary, table = evaluated(tmp_path / "model", data=root)
    assert all(len(line) <= 80 for line in text.splitlines() if str(tmp_path) not in line)
    assert (
        "at threshold" not in text and summary["positive"] is None and summary["operating_points"].keys() == {"chosen"}
    )
    classes = ["COVID", "NORMAL", "PNEUMONIA"]
    probabilities = table[[f"p_{name}" for name in classes]].to_numpy()
    assert (table.prediction == np.array(classes)[probabilities.argmax(axis=1)]).all()
    assert summary["metrics"]["roc_auc"]["value"] == pytest.approx(
        sk.roc_auc_score(table.truth, probabilities, multi_class="ovr", labels=classes)
    )
    chosen = summary["operating_points"]["chosen"]
    assert chosen["threshold"] is None
    assert chosen["confusion"] == sk.confusion_matrix(table.truth, table.prediction).tolist()
    assert chosen["metrics"]["accuracy"]["value"] == pytest.approx(sk.accuracy_score(table.truth, table.prediction))
    options = ["--model", tmp_path / "model", "--data", root, "--threshold", "0.3"]
    refused(run("evaluate", *options), "--threshold 0.3: a model of 3 classes")


def test_no_export_at_all(run, refused, data):
    refused(run("evaluate", "--data", data), "exports: no export in it", "xray-fastai fit", "--model")


def test_a_path_that_is_not_an_export(refuse, data, tmp_path):
    refuse(data, f"{tmp_path}: not an export", model=tmp_path)


def test_data_that_is_gone(run, refused, export):
    refused(run("evaluate", "--model", export), "Error: the data folder of the fit,", "(no such folder", "by --data")


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
    refuse(root, "holds class COVID", "the known classes are NORMAL, PNEUMONIA")


@pytest.mark.parametrize("threshold", ["half", "1.5", "-0.1", "nan", ""])
def test_a_threshold_that_is_none(threshold, refuse, data):
    refuse(data, f"--threshold {threshold}: give auto", options=["--threshold", threshold])


def test_output_below_a_file(run, refused, export, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    options = ["--model", export, "--data", data, "--output", tmp_path / "file"]
    refused(run("evaluate", *options), tmp_path / "file", "cannot be written", "--output")


def test_a_folder_of_that_name_that_is_no_evaluation(run, refused, export, data, tmp_path):
    (tmp_path / "evaluation-test").mkdir()
    (tmp_path / "evaluation-test" / "mine").write_text("mine")
    options = ["--model", export, "--data", data, "--output", tmp_path]
    refused(run("evaluate", *options), "evaluation-test: already exists", "--output")
    assert (tmp_path / "evaluation-test" / "mine").read_text() == "mine"


@pytest.mark.slow
def test_the_validation_split_is_the_one_of_fit(run, export, tmp_path):
    options = ["--data", export.parent / "moved", "--split", "valid", "--output", tmp_path]
    result = run("evaluate", "--model", export, *options)
    assert result.exit_code == 0, result.output
    assert "fit chose its epoch, temperature and threshold on this split" in " ".join(result.stdout.split())
    summary = json.loads((tmp_path / "evaluation-valid" / "metrics.json").read_text())
    assert summary["counts"] == settings_of(export)["data"]["valid"]


@pytest.mark.slow
def test_the_worst_group_of_a_split(run, export, tmp_path, monkeypatch):
    """The sharpest images of each class are those that the model mistakes: they are drawn as the other class."""
    root = draw_collection(tmp_path / "data", {"test/NORMAL": 40, "test/PNEUMONIA": 40}, seed=3)
    folders = [root / "test" / label for label in ("NORMAL", "PNEUMONIA")]
    for own, other in zip(folders, reversed(folders), strict=True):
        for i, path in enumerate(sorted(other.iterdir())[10:14]):
            noise = np.random.default_rng(i).integers(-60, 60, (48, 40))
            pixels = np.asarray(Image.open(path)).astype(int) + noise
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(own / f"noisy{i}.png")
    options = ["evaluate", "--model", export, "--data", root, "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(subgroups, "MIN_IMAGES", 3)
        said = run(*options)
    assert said.exit_code == 0, said.output
    summary = json.loads((tmp_path / "out/evaluation-test/metrics.json").read_text())
    worst, auc = summary["worst_group"], summary["metrics"]["roc_auc"]["value"]
    assert worst["name"] in ("sharpest", "most contrasty", "least typical") and worst["images"] == 8
    assert worst["roc_auc"] < 0.5 < auc
    text = " ".join(said.stdout.split())
    assert f"the {worst['name']} tenth of each class, 8 images: AUC {worst['roc_auc']:.3f}" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"worst on the {worst['name']} tenth of each class (8 images)" in page
    said = run(*options)  # too few images now: neither refused nor reported
    assert said.exit_code == 0 and "worst group" not in said.stdout
    assert json.loads((tmp_path / "out/evaluation-test/metrics.json").read_text())["worst_group"] is None
