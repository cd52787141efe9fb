"""`recalibrate` fits the probabilities and the threshold of an export to labelled images of another place."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from tests.conftest import settings_of
from xray_fastai import open_learner, predict, recalibrate
from xray_fastai.inference.model import open_model
from xray_fastai.inference.stream import predict_all
from xray_fastai.training.calibration import Validated
from xray_fastai.training.local_fit import FEWEST_FOR_SLOPE, Rule, fit_locally
from xray_fastai.training.recalibrate import wrong_way


def draw_local(folder, normal: int, pneumonia: int):
    """The images of `conftest.draw_collection`, darker, flatter and harder to tell apart."""
    rng = np.random.default_rng(7)
    for label, count, sign in (("NORMAL", normal, -1), ("PNEUMONIA", pneumonia, 1)):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(100, 15, (48, 40))
            pixels[16:32, 12:28] += sign * rng.normal(12, 12)
            name = f"person{i // 2}_virus_{i}.jpeg" if label == "PNEUMONIA" else f"IM-{i:04}-0001.jpeg"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / label / name)
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return draw_local(tmp_path_factory.mktemp("place") / "secret_hospital", 30, 40)


@pytest.fixture(scope="module")
def recalibrated(export, local, run, tmp_path_factory):
    """An export that the command wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("exports") / "local"
    result = run("recalibrate", export, "--data", local, "--output", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_the_new_export_stands_beside_the_old_one_by_the_path_that_was_given(export, local, run, tmp_path, monkeypatch):
    shutil.copytree(export, tmp_path / "exports" / "first")
    monkeypatch.chdir(tmp_path)
    for name in ("first-recalibrated", "first-recalibrated-2"):
        assert f"written        exports/{name}\n" in run("recalibrate", "exports/first", "--data", local).stdout
    monkeypatch.chdir("exports/first")
    printed = run("recalibrate", ".", "--data", local).stdout.replace("\n", "")
    assert f"{tmp_path}/exports/first-recalibrated-3" in printed


def simulated(n: int, slope: float, intercept: float, seed: int = 0) -> Validated:
    """Images whose outcome follows slope * z + intercept, where the model says z."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 3, n)
    y = (rng.random(n) < expit(slope * z + intercept)).astype(int)
    return Validated(np.stack([-z / 2, z / 2], axis=1), y, np.arange(n), np.ones(2), np.ones(2))


def test_slope_and_intercept_are_those_of_the_place():
    images = simulated(4000, 0.6, -1.5)
    fitted = fit_locally(images, 1, Rule())
    z = images.logits[:, 1] - images.logits[:, 0]
    other = LogisticRegression(C=np.inf).fit(z[:, None], images.targets)
    assert 1 / fitted.scaling.temperature == pytest.approx(other.coef_[0, 0], abs=0.01)
    assert fitted.scaling.intercept_of(1) == pytest.approx(other.intercept_[0], abs=0.02)
    assert fitted.probabilities(images.logits)[:, 1].mean() == pytest.approx(images.targets.mean(), abs=0.005)


def test_with_few_images_the_slope_stays():
    few, enough = (fit_locally(simulated(n, 0.3, 0), 1, Rule()) for n in (FEWEST_FOR_SLOPE - 1, FEWEST_FOR_SLOPE))
    assert few.scaling.temperature == 1 and few.note.startswith("intercept fitted to 19 local images")
    assert enough.scaling.temperature > 1


def test_the_fewer_images_the_less_is_changed():
    sizes = (20, 200, 4000)
    moved = [abs(np.mean([fit_locally(simulated(n, 1, -3, s), 1, Rule()).scaling.intercept_of(1) for s in range(5)]))
             for n in sizes]  # fmt: skip
    assert moved == sorted(moved) and moved[0] < 2.5 and moved[-1] == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize(
    "rule, reached",
    [
        (Rule(cost_ratio=4), lambda p, y, t: t == 0.2),
        (Rule(target_sensitivity=0.97), lambda p, y, t: (p[y == 1] >= t).mean() >= 0.97),
        (Rule(), lambda p, y, t: 0.4 < t < 0.6),
    ],
)
def test_the_threshold_follows_the_rule(rule, reached):
    images = simulated(4000, 1, 0)
    fitted = fit_locally(images, 1, rule)
    assert reached(fitted.probabilities(images.logits)[:, 1], images.targets, fitted.threshold)


def test_a_model_that_ranks_the_wrong_way_round_is_warned_of(export, local, recalibrated, run, tmp_path):
    """The folders of the two classes are swapped."""
    for name, other in (("NORMAL", "PNEUMONIA"), ("PNEUMONIA", "NORMAL")):
        shutil.copytree(local / name, tmp_path / "swapped" / other)
    printed = run("recalibrate", export, "--data", tmp_path / "swapped", "--output", tmp_path / "out").output
    assert "WARNING on these images a higher probability goes with the class less often" in " ".join(printed.split())
    assert "WARNING" not in recalibrated[1]


@pytest.mark.parametrize(
    ("auc", "slopes", "warned"),
    [(0.8, (0.5, 0.9), False), (0.4, (None, None), True), (0.6, (0.1, 0.0), True), (0.6, (-0.1, 0.1), True),
     (None, (0.5, 0.5), False)],
)  # fmt: skip
def test_the_warning_needs_one_figure(auc, slopes, warned):
    before, after = ([slope, None, None] for slope in slopes)
    metrics = {"roc_auc": {"after": [auc, None, None]}, "calibration_slope": {"before": before, "after": after}}
    assert (wrong_way(metrics) is not None) == warned and wrong_way({}) is None


def test_the_command_shows_what_it_gained(recalibrated, export):
    folder, printed = recalibrated[0], " ".join(recalibrated[1].split())
    assert "NORMAL 30, PNEUMONIA 40, of 50 patients" in printed
    assert "slope and intercept fitted to 70 local images; threshold by" in printed
    record = settings_of(folder)["recalibrated"]
    assert (record["images"], record["patients"], record["counts"]) == (70, 50, {"NORMAL": 30, "PNEUMONIA": 40})
    figures = record["metrics"]
    assert figures["nll"]["after"][0] < figures["nll"]["before"][0]
    assert figures["roc_auc"]["after"][0] == pytest.approx(figures["roc_auc"]["before"][0], abs=1e-9)
    for pair in figures.values():
        for value, low, high in pair.values():
            assert low is None or low <= value <= high
    numbers = [f"{figures['nll'][part][0]:.3f}" for part in ("before", "after", "difference")]
    assert f"negative log-likelihood {' '.join(numbers)} (" in printed


def test_nothing_of_the_local_images_is_in_the_export(recalibrated, local):
    folder, _ = recalibrated
    words = [b"secret_hospital", b"IM-0001-0001", b"person3_virus"]
    for file in folder.iterdir():
        content = file.read_bytes()
        assert not any(word in content for word in words), file


def test_every_command_takes_the_new_export(recalibrated, export, local, run):
    folder, _ = recalibrated
    settings, parent = settings_of(folder), settings_of(export)
    assert settings["lineage"][0]["sha256"] == parent["weights"]["sha256"] == settings["weights"]["sha256"]
    assert settings["calibration_kind"] == "local" and settings["prior"] == pytest.approx([3 / 7, 4 / 7])
    verified = run("verify", folder)
    assert verified.exit_code == 0 and "verdict             good" in verified.output
    file = next((local / "PNEUMONIA").iterdir())
    table = predict(file, folder)
    outputs = predict_all(open_model(export, "cpu", "fp32"), [str(file)])[0]
    scaled = outputs / settings["temperature"] + settings["intercepts"]
    expected = expit(scaled[1] - scaled[0])
    assert table.p_PNEUMONIA[0] == pytest.approx(expected, abs=1e-5)
    assert open_learner(folder).predict(file)[2][1].item() == pytest.approx(expected, abs=1e-5)
    assert predict(file, export).p_PNEUMONIA[0] != pytest.approx(expected, abs=1e-4)


def test_the_probabilities_fit_the_place(recalibrated, local, export):
    """In all images that it was fitted to, the mean probability is near the share of the class."""
    files = [str(path) for path in sorted(local.rglob("*.jpeg"))]
    means = [predict(files, model).p_PNEUMONIA.mean() for model in (export, recalibrated[0])]
    assert abs(means[1] - 40 / 70) < min(0.05, abs(means[0] - 40 / 70))


def test_the_new_export_has_the_new_threshold(export, local, run, tmp_path):
    result = run("recalibrate", export, "--data", local, "--cost-ratio", 4, "--output", tmp_path / "new")
    assert result.exit_code == 0 and settings_of(tmp_path / "new")["threshold"] == pytest.approx(0.2)
    assert predict(next((local / "NORMAL").iterdir()), tmp_path / "new").threshold[0] == pytest.approx(0.2)


def test_a_second_fit_starts_from_the_first(recalibrated, local, tmp_path):
    """Fitted to the same images again, the probabilities hardly move: the penalty pulls to those of the first fit."""
    files = [str(path) for path in sorted(local.rglob("*.jpeg"))]
    again = recalibrate(recalibrated[0], local, output=tmp_path / "again").path
    first, second = (predict(files, model).p_PNEUMONIA for model in (recalibrated[0], again))
    assert abs(settings_of(recalibrated[0])["intercepts"][1]) > 0.2
    assert np.abs(second - first).max() < 0.03


def test_the_report_says_it(recalibrated):
    folder, _ = recalibrated
    page = (folder / "report.html").read_text()
    assert "70 images of 50 patients" in page and "slope and intercept fitted to 70 local images" in page


def test_a_second_one_gets_the_next_name(export, local, tmp_path, monkeypatch):
    shutil.copytree(export, tmp_path / "exports" / "first")
    monkeypatch.chdir(tmp_path)
    paths = [recalibrate("exports/first", local).path for _ in range(2)]
    assert [path.name for path in paths] == ["first-recalibrated", "first-recalibrated-2"]
    again = recalibrate(paths[0], local, output="exports/again").path
    assert [ancestor["name"] for ancestor in settings_of(again)["lineage"]] == ["first-recalibrated", "first"]


def test_split_folders_are_named(export, local, run, refused, tmp_path):
    (tmp_path / "test").symlink_to(local)
    refused(run("recalibrate", export, "--data", tmp_path), "--data", "test", "did you mean")
    result = run("recalibrate", export, "--data", tmp_path, "--split", "test", "--output", tmp_path / "new")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "options, words",
    [
        ([], ["--data", "--unlabelled"]),
        (["--data", "LOCAL", "--target-sensitivity", "1.5"], ["--target-sensitivity 1.5", "below 1"]),
        (["--data", "LOCAL", "--target-sensitivity", "0.9", "--cost-ratio", "3"], ["--cost-ratio", "leave one"]),
        (["--data", "LOCAL", "--cost-ratio", "-1"], ["--cost-ratio -1", "above 0"]),
        (["--data", "nowhere"], ["--data nowhere", "no such folder"]),
        (["--data", "LOCAL", "--output", "LOCAL"], ["--output", "already exists"]),
        (["--match-scores", "--data", "LOCAL"], ["--match-scores", "--unlabelled"]),
        (["--data", "FEW"], ["9 labelled images", "10 or more"]),
        (["--data", "ONE"], ["no image of NORMAL"]),
    ],
)
def test_wrong_input_is_one_line(options, words, export, local, run, refused, tmp_path):
    folders = {"LOCAL": local, "FEW": tmp_path / "few", "ONE": tmp_path / "one"}
    if "FEW" in options:
        draw_local(folders["FEW"], 4, 5)
    if "ONE" in options:
        (folders["ONE"] / "PNEUMONIA").mkdir(parents=True)
        file = next((local / "PNEUMONIA").iterdir())
        (folders["ONE"] / "PNEUMONIA" / file.name).symlink_to(file)
    refused(run("recalibrate", export, *(folders.get(word, word) for word in options)), *words, code=None)


def test_an_image_that_cannot_be_read_leaves_nothing(export, local, run, refused, tmp_path):
    shutil.copytree(local, tmp_path / "place")
    (tmp_path / "place/NORMAL/broken.jpeg").write_bytes(b"no image")
    refused(run("recalibrate", export, "--data", tmp_path / "place", "--output", tmp_path / "new"), "broken.jpeg")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))


def test_the_table_is_a_data_frame(recalibrated, export, local, tmp_path):
    result = recalibrate(export, local, output=tmp_path / "new")
    assert isinstance(result.metrics, pd.DataFrame) and ("after", "low") in result.metrics.columns
    assert "<table" in result._repr_html_()
    assert json.loads((tmp_path / "new/model.json").read_text())["temperature"] == pytest.approx(
        settings_of(recalibrated[0])["temperature"]
    )
