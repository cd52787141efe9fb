"""The worst images, their heat maps, and what the errors have in common."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import ClassificationInterpretation
from PIL import Image

from tests.conftest import draw_collection, settings_of
from xray_fastai import DISCLAIMER
from xray_fastai.data.image_keys import file_key
from xray_fastai.evaluation.contact_sheet import LIMIT, Cell, draw_sheet
from xray_fastai.evaluation.error_patterns import suspicious_causes
from xray_fastai.evaluation.interpret import interpret
from xray_fastai.evaluation.interpretation import XrayInterpretation
from xray_fastai.export.learner import load_learner
from xray_fastai.inference.gradcam import grad_cam, overlay, upsample
from xray_fastai.inference.model import Model
from xray_fastai.model.architectures import build_network


@pytest.fixture(scope="module")
def data(export, tmp_path_factory):
    """The folder of the fit, and a `test` split of odd shapes in it."""
    root = tmp_path_factory.mktemp("data")
    shutil.copytree(export.parent / "moved" / "train", root / "train")
    draw_collection(root, {"test/NORMAL": 6, "test/PNEUMONIA": 6}, seed=1)
    for i, file in enumerate(sorted((root / "test").rglob("*.jpeg"))):
        with Image.open(file) as image:
            image.resize((60 + 30 * (i % 4), 90)).save(file)
    return root


@pytest.fixture
def look(run, export, data, tmp_path):
    """Interpret the small export; the result of the command, and the folder that it wrote."""

    def look(*options, split="test", data=data, output=tmp_path / "out"):
        result = run("interpret", "--model", export, "--data", data, "--split", split, "--output", output, *options)
        return result, output / f"interpretation-{split}"

    return look


@pytest.fixture(scope="module")
def found(export, data, tmp_path_factory):
    """The test split, from Python, as precisely as fastai computes."""
    return interpret(export, data, "test", output=tmp_path_factory.mktemp("found"), precision="fp32")


@pytest.mark.slow
def test_valid_is_what_fit_validated_on(look, export):
    result, folder = look(split="valid")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(folder / "top_losses.csv")
    keys = {file_key("/".join(Path(path).parts[-3:])) for path in table.path}
    assert keys == set(settings_of(export)["data"]["valid_files"])
    train = pd.read_csv(look(split="train")[1] / "top_losses.csv")
    assert len(train) + len(table) == 40 and not set(train.path) & set(table.path)


@pytest.mark.slow
def test_terminal(look, export, data):
    result, folder = look("--top", 3)
    lines = result.stdout.splitlines()
    assert lines[0] == lines[-2] == DISCLAIMER and lines[-1].startswith("next: xray-fastai predict")
    assert all(len(line) <= 80 for line in lines if str(folder.parent) not in line and str(export) not in line)
    for words in (export, data, "test split, 12 images", "The 3 images with the largest loss", folder / "summary.json"):
        assert str(words) in result.stdout
    assert sum(line.startswith("   ") and line.rstrip().endswith(".jpeg") for line in lines) == 3


@pytest.mark.slow
def test_files(look):
    result, folder = look("--top", 5)
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in folder.iterdir()) == ["summary.json", "top_losses.csv", "top_losses.png"]
    table = pd.read_csv(folder / "top_losses.csv")
    assert list(table) == [
        "path",
        "patient",
        "truth",
        "prediction",
        "p_NORMAL",
        "p_PNEUMONIA",
        "loss",
        "wrong",
        "unlike",
        "uncertain",
    ]
    assert (table.wrong == (table.truth != table.prediction)).all()
    assert len(table) == 12 and table.loss.is_monotonic_decreasing
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["format"], summary["split"], summary["images"]) == (1, "test", 12)
    assert summary["errors"] == (table.truth != table.prediction).sum()
    assert summary["selection"] == "the 5 images with the largest loss" and summary["causes"]
    assert [row["path"] for row in summary["worst"]] == table.path[:5].tolist()
    for row, (_, of_table) in zip(summary["worst"], table.iterrows(), strict=False):
        assert row["probability"] == pytest.approx(of_table[f"p_{row['prediction']}"])
        assert row["loss"] == pytest.approx(of_table.loss)
    with Image.open(folder / "top_losses.png") as picture:
        assert picture.width > 1000


def test_the_loss_is_that_of_the_calibrated_probability_unweighted(found, export):
    learn = load_learner(export)
    for row in found.table.iloc[::4].itertuples():
        _, _, probabilities = learn.predict(row.path)
        of_truth = float(probabilities[learn.dls.vocab.o2i[row.truth]])
        assert row.loss == pytest.approx(-math.log(of_truth), abs=1e-4)


def test_the_newest_export_and_into_it_by_default(run, refused, export, data, tmp_path, monkeypatch):
    refused(run("interpret", "--data", data), "exports: no export in it", "xray-fastai fit")
    copy = tmp_path / "exports" / "copy"
    copy.mkdir(parents=True)
    for name in ("model.json", "model.safetensors"):
        shutil.copy(export / name, copy)
    monkeypatch.chdir(tmp_path)
    result = run("interpret", "--data", data, "--top", 1)
    assert result.exit_code == 0 and "Model: exports/copy" in result.stdout
    assert (copy / "interpretation-valid" / "top_losses.png").is_file()
    assert sorted(path.name for path in copy.iterdir()) == [
        "interpretation-valid", "model.json", "model.safetensors", "report.html"
    ]  # fmt: skip


@pytest.mark.slow
def test_more_than_there_are(look):
    result, _ = look("--top", 1000)
    assert (
        result.exit_code == 0 and "1000 images were asked for, and there are only 12: all are shown." in result.stdout
    )
    assert "The 12 images with the largest loss" in result.stdout


@pytest.mark.slow
def test_one_class_and_confident(look):
    _, folder = look("--class", "NORMAL", "--top", 2)
    summary = json.loads((folder / "summary.json").read_text())
    assert {row["truth"] for row in summary["worst"]} == {"NORMAL"}
    assert summary["selection"] == "the 2 NORMAL images with the largest loss"
    _, folder = look("--confident", "--top", 3)
    table, worst = pd.read_csv(folder / "top_losses.csv"), json.loads((folder / "summary.json").read_text())["worst"]
    assert len(table) == 12 and all(row["truth"] == row["prediction"] for row in worst)
    assert worst[0]["probability"] == max(row["probability"] for row in worst)


@pytest.mark.slow
def test_only_errors(look, found, tmp_path):
    """Two images are put into the folder of the class that the model does not predict, or none."""
    for wrong in (2, 0):
        moved = tmp_path / f"moved{wrong}"
        for i, row in enumerate(found.table.itertuples()):
            other = next(name for name in ("NORMAL", "PNEUMONIA") if (name == row.prediction) == (i >= wrong))
            (moved / "test" / other).mkdir(parents=True, exist_ok=True)
            shutil.copy(row.path, moved / "test" / other)
        result, folder = look("--only-errors", data=moved)
        assert result.exit_code == 0, result.output
        listed = pd.read_csv(folder / "top_losses.csv")
        assert len(listed) == wrong and (listed.truth != listed.prediction).all() and listed.wrong.all()
        assert (folder / "top_losses.png").exists() == (wrong > 0)
        assert f"Wrong: {wrong} of 12" in result.stdout
    assert "No misclassified image in this split, so there is no picture." in result.stdout
    assert json.loads((folder / "summary.json").read_text())["causes"] == ["No image is misclassified."]


@pytest.mark.slow
def test_replaced_whole_or_not_at_all(look, refused, data, tmp_path):
    result, folder = look("--top", 1)
    (folder / "old").write_text("of the first run")
    result, _ = look("--top", 1)
    assert result.exit_code == 0 and not (folder / "old").exists()
    before = (folder / "summary.json").read_text()
    shutil.copytree(data / "test", tmp_path / "bad" / "test")
    first, second = sorted((tmp_path / "bad" / "test" / "NORMAL").iterdir())[:2]
    first.write_bytes(b"no image")
    second.unlink()
    second.symlink_to("nowhere.jpeg")
    refused(look("--top", 2, data=tmp_path / "bad")[0], first, "and 1 more")
    assert (folder / "summary.json").read_text() == before
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, "report.html"]


def test_a_folder_of_something_else_stays(look, refused, tmp_path):
    (tmp_path / "out" / "interpretation-test").mkdir(parents=True)
    (tmp_path / "out" / "interpretation-test" / "thesis.txt").write_text("years of work")
    refused(look()[0], "interpretation-test", "--output")
    assert (tmp_path / "out" / "interpretation-test" / "thesis.txt").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--class", "FLU"], ["--class FLU", "NORMAL, PNEUMONIA"]),
        (["--split", "holdout"], ["--split holdout", "test, valid, train"]),
        (["--only-errors", "--confident"], ["--confident", "--only-errors"]),
        (["--model", "nowhere"], ["nowhere: not an export"]),
    ],
)
def test_options_that_make_no_sense(options, words, look, refused):
    refused(look(*options)[0], *words, code=None)


def test_top_zero(run):
    assert run("interpret", "--top", 0).exit_code == 2


def test_output_below_a_file(look, refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(look(output=tmp_path / "file")[0], "cannot be written", "--output")


def test_data_that_does_not_fit(look, refused, data, tmp_path):
    refused(look(data=tmp_path / "nowhere")[0], "no such folder")
    (tmp_path / "empty" / "test" / "NORMAL").mkdir(parents=True)
    refused(look(data=tmp_path / "empty")[0], "no image in it")
    (tmp_path / "flat" / "test").mkdir(parents=True)
    shutil.copy(next((data / "test" / "NORMAL").iterdir()), tmp_path / "flat" / "test")
    refused(look(data=tmp_path / "flat")[0], "images without a class")
    refused(look(data=draw_collection(tmp_path / "flu", {"test/FLU": 1}))[0], "holds class FLU")
    other = draw_collection(tmp_path / "other", {"train/NORMAL": 2, "train/PNEUMONIA": 2})
    refused(look(split="valid", data=other)[0], "files that the fit validated on are missing", "--data")


@pytest.mark.slow
def test_one_class_only(look, tmp_path):
    result, _ = look(data=draw_collection(tmp_path / "one", {"test/NORMAL": 3}))
    assert result.exit_code == 0, result.output


def test_names_that_would_be_markup(export, tmp_path):
    data = draw_collection(tmp_path / "data", {"test/NORMAL": 1})
    (file,) = (data / "test" / "NORMAL").iterdir()
    file.rename(file.with_name("$<b>_^{x" + "y" * 90 + "z}.jpeg"))
    result = interpret(export, data, "test", output=tmp_path)
    shown = result._repr_html_()
    assert "<b>" not in shown and "&lt;b&gt;" in shown and "data:image/png;base64," in shown
    assert "$<b>_^{xyyyy" in str(result) and "yyyz}.jpeg" in str(result)


@pytest.mark.slow
def test_as_fastai_knows_it(found, export):
    inside = found.interpretation
    assert isinstance(inside, ClassificationInterpretation)
    losses, _, rows = inside.top_losses(3, items=True)
    assert losses.tolist() == pytest.approx(found.table.loss[:3].tolist())
    assert rows.path.tolist() == found.table.path[:3].tolist()
    counts = pd.crosstab(found.table.truth, found.table.prediction)
    counts = counts.reindex(index=inside.vocab, columns=inside.vocab, fill_value=0)
    assert inside.confusion_matrix().tolist() == counts.to_numpy().tolist()
    learn = load_learner(export)
    again = XrayInterpretation.from_learner(learn, dl=learn.dls.test_dl(inside.dl.items, with_labels=True))
    assert again.losses.numpy() == pytest.approx(inside.losses.numpy(), abs=1e-4)
    assert (
        again.predicted.tolist()
        == (found.table.p_PNEUMONIA > 0.5)
        .loc[[found.table.path.tolist().index(path) for path in inside.dl.items.path]]
        .astype(int)
        .tolist()
    )


def random_model(arch: str, size: int) -> Model:
    """A network with random weights, whose batch norms have seen noise, so that activations are neither 0 nor huge.

    What speaks for one of its classes speaks against the other: one of their maps is not 0.
    """
    torch.manual_seed(0)
    network = build_network(arch, 2, dropout=0.5)
    with torch.no_grad():
        network.train()
        for _ in range(5):
            network(torch.randn(4, 3, 64, 64))
        network[1][-1].weight[1] = -network[1][-1].weight[0]
    network.eval()
    settings = {"classes": ["NORMAL", "PNEUMONIA"], "positive": "PNEUMONIA", "threshold": 0.5, "temperature": 1.0}
    settings |= {"preprocessing": {"size": size}, "calibration_kind": "none"}
    return Model(Path("random"), settings, network)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, layer_of",  # the layer of 12 x 12 cells at 96 pixels
    [
        ("resnet18", lambda backbone: backbone[5]),  # torchvision's layer2
        ("densenet121", lambda backbone: backbone[0].denseblock2),
        ("convnext_tiny", lambda backbone: backbone[0][3]),
        ("efficientnet_b0", lambda backbone: backbone[0][3]),
    ],
)
def test_the_same_map_as_pytorch_grad_cam(arch, layer_of):
    package = pytest.importorskip("pytorch_grad_cam")
    size, targets = 96, [0, 1, 0, 1]
    model = random_model(arch, size)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, size, size), dtype=np.uint8))
    images = images.repeat_interleave(2, dim=0)  # each for both classes
    maps = grad_cam(model, images, targets)
    assert maps.shape == (4, 12, 12)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    batch = (images / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        probabilities = model.network(batch).softmax(1).numpy()
    log_odds = [lambda logits, k=k: logits[..., k] - logits[..., 1 - k] for k in targets]
    with package.GradCAM(model.network, [layer_of(model.network[0])]) as cam:
        expected = cam(batch, log_odds)
    assert sum(ours.any() for ours in maps) >= 2  # only what speaks for a class is drawn
    for ours, theirs, target, p in zip(maps, expected, targets, probabilities, strict=True):
        assert ours.any() == theirs.any() and ours.min() >= 0
        if not ours.any():
            continue
        assert ours.max() == pytest.approx(p[target], abs=1e-5)
        fine = upsample(ours, (size, size))
        ours, theirs = ((one - one.min()) / (one.max() - one.min()) for one in (fine, theirs))
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_grad_cam_of_a_frozen_network_and_the_predicted_class():
    model = random_model("resnet18", 64)
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 1, 64, 64), dtype=np.uint8))
    y_pred = model.decide(model.probabilities(model.logits(images).numpy()))
    expected = grad_cam(model, images, y_pred)
    assert all(parameter.grad is None for parameter in model.network.parameters())
    model.network.requires_grad_(False)
    with torch.inference_mode():
        np.testing.assert_array_equal(grad_cam(model, images), expected)
    for i in range(3):  # whatever the batch
        np.testing.assert_allclose(grad_cam(model, images[i : i + 1])[0], expected[i], atol=1e-4)


def test_the_overlay_lies_where_the_map_says():
    image, cam = Image.new("L", (300, 100), 100), np.zeros((7, 7), dtype=np.float32)
    assert (np.asarray(overlay(image, cam)) == 100).all()
    cam[0, 6] = 1
    pixels = np.asarray(overlay(image, cam)).astype(int)  # (100, 300, 3)
    assert pixels.shape == (100, 300, 3)
    red, _, blue = pixels[2, 297]
    assert red > blue + 50
    changed = np.argwhere((pixels != 100).any(axis=-1))
    assert changed[:, 0].max() < 100 * 1.5 / 7 + 1 and changed[:, 1].min() > 300 * 5.5 / 7 - 2


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4, LIMIT])
def test_the_picture_keeps_the_aspect_ratio(count, tmp_path):
    maps = {"NORMAL": np.zeros((7, 7)), "PNEUMONIA": np.zeros((7, 7))}
    cell = Cell(Image.new("L", (160, 100)), maps, "a" * 200, "NORMAL", "PNEUMONIA", 0.9, 2.3, False)
    draw_sheet([cell] * count, "title", ["one", "two", "three"], "footer", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        black = np.asarray(picture.convert("L")) == 0
        assert max(picture.size) < 12_000
    rows, columns = np.flatnonzero(black.mean(axis=1) > 0.15), np.flatnonzero(black.mean(axis=0) > 0.15)
    height, width = (int(np.argmax(np.diff(run) > 1)) + 1 if (np.diff(run) > 1).any() else len(run)
                     for run in (rows, columns))  # fmt: skip
    assert width > 150 and width / height == pytest.approx(1.6, abs=0.02)


def split(n: int, **columns) -> pd.DataFrame:
    """A split of n images, all right, a patient each, of one size."""
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(n)], "truth": "NORMAL", "prediction": "NORMAL"})
    return table.assign(**{"patient": table.path, "width": 100, "height": 100, **columns})


def test_no_cause_where_there_is_none():
    rng = np.random.default_rng(0)
    table = split(300, width=rng.integers(100, 900, 300), height=rng.integers(100, 900, 300))
    table.loc[rng.permutation(300)[:30], "prediction"] = "PNEUMONIA"
    lines = suspicious_causes(table)
    assert lines[0] == "By class: NORMAL 30 of 300 wrong."
    assert lines[1:] == ["No patient, image size or aspect ratio stands out among the errors."]


def test_a_patient_as_the_cause():
    table = split(60, patient=[f"p{i // 3}" for i in range(60)])
    table.loc[[0, 9, 10, 11], "prediction"] = "PNEUMONIA"
    lines = suspicious_causes(table)
    assert "Patient p3: 3 of 3 images wrong." in lines and not any("p0" in line for line in lines)


def test_where_errors_cluster_by_patient_no_patient_is_special():
    """Of 60 patients with 8 images, 12 have errors alone. At the overall rate, 8 of 8 would be very unlikely."""
    table = split(480, patient=[f"p{i // 8}" for i in range(480)])
    table.loc[:95, "prediction"] = "PNEUMONIA"
    assert not any("Patient" in line for line in suspicious_causes(table))


def test_size_and_shape_as_the_cause():
    table = split(90, width=np.repeat([100, 200, 300], 30))
    table.loc[60:79, "prediction"] = "PNEUMONIA"
    (line,) = (line for line in suspicious_causes(table) if "widest third" in line)
    assert line.startswith("Of NORMAL the widest third (width/height from 3.00), 20 of 30 are misclassified")
    assert "of the rest 0 of 60" in line
    table.loc[:, "prediction"] = "NORMAL"
    table.loc[0:19, "prediction"] = "PNEUMONIA"
    assert any("the smallest third (up to 0.01 megapixels), 20 of 30" in line for line in suspicious_causes(table))


def test_chance_is_no_cause():
    """Four comparisons raise p = 0.014 above 0.05; at an error rate of 0.3 two errors of two images are likely."""
    table = split(90, width=np.repeat([100, 200, 300], 30))
    table.loc[[0, 1, 30, *range(60, 67)], "prediction"] = "PNEUMONIA"
    assert not any("third" in line for line in suspicious_causes(table))
    table = split(20, patient=["p0", "p0", *(f"p{i}" for i in range(2, 20))])
    table.loc[:5, "prediction"] = "PNEUMONIA"
    assert not any("Patient" in line for line in suspicious_causes(table))


def test_a_class_of_another_size_is_no_cause():
    """All NORMAL images are small, and all errors are NORMAL: what counts is within a class."""
    table = split(60, width=[100] * 30 + [500] * 30, truth=["NORMAL"] * 30 + ["PNEUMONIA"] * 30)
    assert not any("third" in line for line in suspicious_causes(table.assign(prediction="PNEUMONIA")))


def test_the_cause_in_the_name():
    names = [f"test/PNEUMONIA/person{i}_{'virus' if i % 2 else 'bacteria'}_{i}.jpeg" for i in range(40)]
    table = split(40, path=names, truth="PNEUMONIA", prediction="PNEUMONIA")
    table.loc[1:19:2, "prediction"] = "NORMAL"
    (line,) = (line for line in suspicious_causes(table) if "cause in the name" in line)
    assert "bacteria 0 of 20 wrong, virus 10 of 20 wrong (differs" in line
