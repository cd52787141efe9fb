"""The HTML report: whole, self-contained, escaped, small; and the picture of a batch."""

import csv
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.conftest import settings_of
from xray_fastai.evaluation.embedded_pictures import embed_pictures
from xray_fastai.evaluation.learning_curves import plot_batch
from xray_fastai.evaluation.report import write_report
from xray_fastai.metrics.table import METRICS
from xray_fastai.system.errors import UserError

pytestmark = pytest.mark.curves

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "hr", "input", "link"}
PLOTS = ("confusion.png", "roc.png", "precision_recall.png", "reliability.png", "decision_curve.png", "scores.png")


class Page(HTMLParser):
    """What a report holds, once its elements are seen to be closed in order."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text()
        self.tags, self.open, self.words, self.headings = [], [], [], []
        self.feed(self.source)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
            if self.open and self.open[-1] in ("h1", "h2", "h3"):
                self.headings.append((self.open[-1], data.strip()))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def metric(value):
    return {"value": value, "low": value and value - 0.05, "high": value and value + 0.02}


def evaluation(split="test", classes=("NORMAL", "PNEUMONIA"), **changes):
    names = ("accuracy", "sensitivity", "specificity", "npv")
    points = {
        key: {
            "threshold": at,
            "metrics": {name: metric(0.9 - i / 100) for i, name in enumerate(names)},
            "confusion": [[k * 10 + j for j in range(len(classes))] for k in range(len(classes))],
        }
        for key, at in [("0.5", 0.5), ("chosen", 0.4375)]
    }
    return {
        "format": 1, "created": "2026-11-23T03:00:00+00:00", "model": "small", "architecture": "resnet18",
        "split": split, "data": "data", "images": 624, "patients": 310,
        "counts": {name: 300 + i for i, name in enumerate(classes)}, "calibrated": True, "temperature": 1.25,
        "positive": classes[-1], "intervals": "95 % intervals: bootstrap over 310 patients, 2,000 resamples",
        "operating_points": points, "metrics": {"roc_auc": metric(0.955), "average_precision": metric(None)},
    } | changes  # fmt: skip


def summary(paths, split="valid", **changes):
    facts = {"truth": "NORMAL", "prediction": "PNEUMONIA", "probability": 0.97, "loss": 3.5066}
    worst = [{"path": path, **facts} for path in paths]
    selection, causes = "the images with the largest loss", ["Patient person12: 3 of 3 images wrong."]
    content = {"format": 1, "split": split, "images": 102, "errors": 9, "worst": worst}
    return content | {"causes": causes, "selection": selection} | changes


def add(export, name, content, pictures=(), size=(320, 240)):
    """A part of a report, with noise for its pictures."""
    folder = export / name
    folder.mkdir()
    (folder / ("metrics.json" if name.startswith("evaluation") else "summary.json")).write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    for picture in pictures:
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / picture)
    return folder


@pytest.fixture
def bare(export, tmp_path):
    """What a report reads of the small export, to be changed at will."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name in ("model.json", "history.csv"):
        shutil.copy(export / name, folder)
    return folder


@pytest.fixture
def change(bare):
    def change(**changes):
        (bare / "model.json").write_text(json.dumps(settings_of(bare) | changes))
        return Page(write_report(bare))

    return change


@pytest.fixture
def whole(bare):
    """An export with all that a report can show."""
    Image.new("L", (600, 400), 128).save(bare / "batch.png")
    for split in ("valid", "test"):
        add(bare, f"evaluation-{split}", evaluation(split), PLOTS)
    add(bare, "interpretation-valid", summary([f"/d/train/NORMAL/IM-{i}.jpeg" for i in range(16)]), ["top_losses.png"])
    return bare


def test_metrics_by_group(bare):
    interval = {"value": 0.9, "low": 0.85, "high": 0.94}
    groups = [
        {"name": EVIL, "images": 500, "patients": 400, "metrics": {"roc_auc": interval}, "too_few": None},
        {"name": "M", "images": 12, "patients": 9, "metrics": {"roc_auc": metric(None)}, "too_few": "9 patients; more"},
    ]
    gap = {"metric": "roc_auc", "best": "F", "worst": "M", "difference": 0.1, "low": 0.01, "high": 0.2, "groups": 2}
    column = {"column": "sex", "bands": None, "groups": groups, "gaps": [gap]}
    add(bare, "evaluation-test", evaluation(groups=[column]))
    page = Page(write_report(bare))
    assert EVIL not in page.source and "Metrics by sex, at the chosen threshold" in page.text
    assert f"{EVIL} 500 400 0.900 0.850 to 0.940 M 12 9 too few" in page.text
    assert "ROC AUC, F less M: 0.100 (0.010 to 0.200). M: 9 patients; more." in page.text


def test_what_named_the_patients(bare, change):
    known = {"PatientID": 600, "the file names": 1}
    add(bare, "evaluation-test", evaluation(patients_known_by=known))
    counts = settings_of(bare)["data"]["patients"] | {"known_by": {"the list of patients": 40}}
    text = change(data=settings_of(bare)["data"] | {"patients": counts}).text
    assert "Patients are known by PatientID (600 images) and by the file names (1 image)." in text
    assert "Patients are known by the list of patients (40 images). An image without a patient" in text


def test_an_earlier_export_does_not_say_what_named_the_patients(bare, change):
    counts = {name: count for name, count in settings_of(bare)["data"]["patients"].items() if name != "known_by"}
    text = change(data=settings_of(bare)["data"] | {"patients": counts}).text
    assert "Patients are known from a list, file names or DICOM headers. An image without a patient" in text


def test_after_fit(bare):
    page = Page(write_report(bare))
    model = settings_of(bare)
    assert ("h1", "small") in page.headings
    assert page.text.count(model["disclaimer"]) >= 2
    assert "xray-fastai evaluate --model exports/small" in page.text
    assert "xray-fastai interpret --model exports/small" in page.text
    assert 'learn = load_learner("exports/small")'.replace('"', "'") in page.text
    assert "complete" in page.text and "Rehearsal" not in page.text and "Some parts cannot be shown" not in page.text
    for value in [*model["versions"].values(), model["weights"]["sha256"], model["data"]["name"]]:
        assert value in page.text
    for name in model["settings"]:
        assert name in page.text
    assert {path.name for path in bare.iterdir()} == {"model.json", "history.csv", "report.html"}


def test_whole(whole):
    path = write_report(whole)
    page = Page(path)
    assert path.stat().st_size < 6e6
    pictures = page.all("img")
    assert len(pictures) == 1 + 2 * len(PLOTS) + 1
    assert all(picture["alt"] and picture["src"].startswith("data:image/png;base64,") for picture in pictures)
    first, second = (page.text.index(f"The {split} split of data: 624 images") for split in ("test", "valid"))
    assert first < second
    for words in ("threshold 0.4375 (chosen)", "0.955", "0.905 to 0.975", "undefined", "bootstrap over 310 patients"):
        assert words in page.text
    assert page.text.count("was trained or chosen on these images") == 1
    assert "train/NORMAL/IM-15.jpeg" in page.text and "/d/train" not in page.text
    assert "9 of 102 images misclassified" in page.text and "Patient person12" in page.text
    for metric in METRICS.values():
        assert f"{metric.title} : {metric.meaning}" in page.text
    assert "Not evaluated yet" not in page.text and "Not interpreted yet" not in page.text


def test_the_figures_at_the_top_are_those_of_the_chosen_threshold(bare):
    content = evaluation()
    content["operating_points"]["chosen"]["metrics"] = {
        name: metric(value) for name, value in (("accuracy", 0.61), ("sensitivity", 0.62), ("specificity", 0.63))
    }
    add(bare, "evaluation-test", content)
    page = Page(write_report(bare))
    top = page.text[page.text.index("with 95 % intervals:") : page.text.index("What it was trained on")]
    for text in ("ROC AUC 0.955", "accuracy 0.610", "sensitivity (recall) 0.620", "specificity 0.630"):
        assert text in top
    assert "here: threshold 0.4375 (chosen)" in top


def test_loads_nothing_and_can_be_read_by_all(whole):
    page = Page(write_report(whole))
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            assert attrs.get(name, "#").startswith(("#", "data:"))
    assert "@import" not in page.source and "url(http" not in page.source
    labelled = [attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(labelled) == len(page.all("svg")) == 3 and all(labelled)
    assert f"training NORMAL {settings_of(whole)['data']['train']['NORMAL']}; " in labelled[0]
    assert [tag for tag, _ in page.tags if tag in ("h1", "h2")] == ["h1"] + ["h2"] * 8
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {attrs["href"][1:] for attrs in page.all("a")} <= targets
    for query in ("prefers-color-scheme: dark", "@media print", "max-width: 560px"):
        assert query in page.source


def test_curves_follow_the_theme(bare):
    page = Page(write_report(bare))
    curves = page.source[page.source.index('class="curve"') : page.source.index("Phases</h3>")]
    assert curves.count("<svg") == 2 and "training loss" in curves and "ROC AUC" in curves
    best = settings_of(bare)["best"]
    assert curves.count(f"weights kept: {best['phase']} {best['epoch']}<") == 1
    assert "var(--second)" in curves and "currentColor" in curves
    assert "#000000" not in curves and "#0b6e99" not in curves and "<style" not in curves


def test_names_from_the_data_are_text(bare, change):
    model = settings_of(bare)
    label = EVIL.replace("/", "")  # the name of a folder
    data = model["data"] | {
        "name": f"/{EVIL}",
        "notes": [f"note {EVIL}"],
        "train": {label: 5, "B": 6},
        "valid": {"B": 1},
    }
    add(bare, "evaluation-test", evaluation(classes=(label, "B"), data=EVIL, intervals=EVIL))
    add(bare, f"interpretation-{EVIL.replace('/', '')}", summary([f"/d/{EVIL}.jpeg"], causes=[EVIL], selection=EVIL),
        ["top_losses.png"])  # fmt: skip
    with (bare / "history.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["phase", "epoch", "train_loss", "valid_loss"], [EVIL, 1, 0.5, 0.25]])
    page = change(data=data, classes=[label, "B"], scores=None, positive="B", disclaimer=EVIL, calibration=EVIL)
    assert not page.all("script")
    assert "<script" not in page.source and page.source.count("&lt;script&gt;alert(1)") > 15
    assert f"{EVIL}.jpeg" in page.text.replace("d/", "")
    assert any(EVIL in picture["alt"] for picture in page.all("img"))


@pytest.mark.slow
def test_a_hundred_images_stay_small(whole):
    shutil.rmtree(whole / "interpretation-valid")
    content = summary([f"test/NORMAL/{i}.jpeg" for i in range(16)])
    folder = add(whole, "interpretation-valid", content, ["top_losses.png"], (1300, 3000))
    assert (folder / "top_losses.png").stat().st_size > 8e6
    path = write_report(whole)
    page = Page(path)
    assert path.stat().st_size < 6e6
    (picture,) = [picture for picture in page.all("img") if "heat maps" in picture["alt"]]
    assert picture["src"].startswith("data:image/jpeg")
    assert "Compressed here; the full picture (1300" in page.text
    assert "interpretation-valid/top_losses.png" in page.text


def test_pictures_share_the_room(tmp_path):
    rng = np.random.default_rng(0)
    for name, side in [("roc.png", 40), ("batch.png", 300), ("top_losses.png", 400)]:
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / name)
    pictures = embed_pictures(list(tmp_path.iterdir()), 100_000)
    assert [pictures[tmp_path / name]["reduced"] for name in ("roc.png", "batch.png", "top_losses.png")] == [0, 1, 1]
    assert sum(len(picture["uri"]) for picture in pictures.values()) < 100_000 * 4 / 3 + 200
    refused = embed_pictures([tmp_path / "batch.png"], 100)[tmp_path / "batch.png"]
    assert "cannot be shown" in refused["fault"]


def test_what_cannot_be_shown_is_named(whole):
    (whole / "evaluation-valid" / "metrics.json").write_text("{")
    (whole / "evaluation-test" / "roc.png").write_bytes(b"no picture")
    add(whole, "evaluation-train", evaluation("train", format=2))
    add(whole, "interpretation-test", summary([], worst=None))
    (whole / "history.csv").write_bytes(b"\xff\xfe\x00")
    page = Page(write_report(whole))
    named = page.text[page.text.index("Some parts cannot be shown") : page.text.index("At a glance")]
    for part in ("evaluation-valid/metrics.json", "evaluation-test/roc.png", "interpretation-test", "history.csv"):
        assert part in named
    assert "evaluation-train/metrics.json: not readable (ValueError: written by a newer version, format 2)" in named
    assert "The test split of data: 624 images" in page.text and len(page.all("img")) == 1 + len(PLOTS) - 1 + 1


@pytest.mark.parametrize("status", ["interrupted", "diverged"])
def test_an_unfinished_fit_says_so(change, status):
    page = change(status=status)
    assert f"The {'fit was stopped' if status == 'interrupted' else 'loss was no longer finite'}" in page.text
    assert status.capitalize() in page.text and "complete" not in page.text


def test_a_rehearsal_says_so(bare, change):
    page = change(data=settings_of(bare)["data"] | {"rehearsal": True})
    assert "This model knows nothing about patients" in page.text and "drawn by a program" in page.text


@pytest.mark.parametrize(("name", "known"), [("/x/chest_xray", True), ("C:\\chest_xray\\", True), ("/x/mine", False)])
def test_limits_claim_only_what_is_known(bare, change, name, known):
    page = change(data=settings_of(bare)["data"] | {"name": name})
    assert ("children of one to five years" in page.text) == known
    assert ("does not say which people" in page.text) != known


@pytest.mark.parametrize("outputs", ["out of fold", "validation"])
def test_the_figures_of_an_ensemble_after_it_was_recalibrated(change, outputs):
    metrics = {"roc_auc": [0.9, 0.8, 0.95], "sensitivity": [0.7, 0.6, 0.8]}
    record = {"outputs": outputs, "planned": 2, "images": 60, "patients": 30, "metrics": metrics, "weakest": None}
    chosen = "Epochs, calibration and threshold were chosen on these images"
    then = "of the export before it was fitted to another place, at its threshold then"
    text = change(ensemble=record).text
    assert text.count(chosen) == 2 and then not in text and "Best epoch, temperature and threshold were" in text
    local = {"created": "2026-11-20T00:00:00", "method": "m", "images": 80, "patients": 40, "metrics": {}}
    local |= {"counts": {}, "unlabelled": 0}
    text = change(recalibrated=local, calibration_kind="local").text
    assert chosen not in text and text.count(then) == 2 and "Best epoch was chosen on the" in text
    assert text.count("Epochs, and the calibration and threshold of that time, were chosen on these images") == 2


def test_no_epoch_completed(bare, change):
    (bare / "history.csv").write_text("\n")
    page = change(status="interrupted", best=None)
    assert "no epoch was recorded" in page.text and "No epoch was completed" in page.text


def test_losses_that_are_missing_or_run_away(bare):
    rows = ["phase,epoch,train_loss,valid_loss,accuracy,roc_auc,lr"]
    rows += [f"{p},{e},0.5,{'' if e == 2 else 0.4 if e < 4 else 1e9},0.5,,1e-3" for p in ("a", "b") for e in (1, 2, 4)]
    (bare / "history.csv").write_text("\n".join(rows) + "\nb,5,nan,nan,nan,nan,0.001\n")
    page = Page(write_report(bare))
    assert page.source.count('class="curve"') == 2 and "backbone unfrozen" in page.source


def test_more_than_two_classes(bare, change):
    classes = ["A", "B", "C"]
    content = evaluation(classes=classes, positive=None)
    content["operating_points"] = {"chosen": content["operating_points"]["chosen"] | {"threshold": None}}
    add(bare, "evaluation-test", content)
    counts = dict.fromkeys(classes, 7)
    data = settings_of(bare)["data"] | {"train": counts, "valid": counts}
    page = change(
        classes=classes, positive=None, threshold=None, prior=None, scores=None, class_weights=None, data=data
    )
    assert "The most probable class is predicted" in page.text and "most probable class" in page.text
    assert "A or B or C" in page.text and page.text.count("22") >= 1


def test_written_elsewhere_in_one_step(whole, tmp_path):
    output = tmp_path / "out" / "deep"
    (output / "evaluation-test").mkdir(parents=True)
    (output / "evaluation-test" / "metrics.json").write_text(json.dumps(evaluation(images=77)))
    path = write_report(whole, output, name="run-1")
    assert path == output / "report.html" and not (whole / "report.html").exists()
    page = Page(path)
    assert ("h1", "run-1") in page.headings
    assert "77 images" in page.text and "The valid split of data: 624 images" in page.text
    assert sorted(file.name for file in output.iterdir()) == ["evaluation-test", "report.html"]


def test_refused(bare, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.model\.json: no such file"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"report\.html: cannot be written .*output="):
        write_report(bare, tmp_path / "file")
    (bare / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(bare)
    assert not list(bare.glob(".report*"))
    for damage in ("{", "[]", '{"classes": 3}'):
        (bare / "model.json").write_text(damage)
        with pytest.raises(UserError, match=r"model\.json: damaged"):
            write_report(bare)
    (bare / "model.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"model\.json: damaged"):
        write_report(bare)


@pytest.mark.parametrize("channels", [1, 3])
def test_batch_is_shown_as_the_network_sees_it(tmp_path, channels):
    import torch

    images = torch.linspace(0, 1, 30).view(30, 1, 1, 1).expand(30, channels, 8, 8)
    if channels == 3:
        mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
        images = (images - mean) / deviation
    plot_batch(images.to(torch.bfloat16), ["$x_1$ " + "long" * 30] * 30, tmp_path / "batch.png")
    with Image.open(tmp_path / "batch.png") as sheet:
        assert sheet.mode == "L" and sheet.size == (6 * 184 + 8, 4 * 204 + 8)
        shades = [sheet.getpixel((8 + i % 6 * 184 + 88, 8 + i // 6 * 204 + 88)) for i in range(24)]
    assert np.allclose(shades, np.arange(24) / 29 * 255, atol=4)
