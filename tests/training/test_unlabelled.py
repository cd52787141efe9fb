"""A model is adapted to images of another place that have no labels."""

import re

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit, logit

from tests.conftest import settings_of
from xray_fastai.inference.model import open_model
from xray_fastai.inference.stream import predict_all
from xray_fastai.metrics import alignment
from xray_fastai.model.batch_norm import layers_of
from xray_fastai.system.errors import UserError
from xray_fastai.training import unlabelled
from xray_fastai.training.unlabelled import (
    Request,
    adapt,
    find_unlabelled,
    match,
    reference_of,
    without_labels,
)


def draw_elsewhere(folder, images: int, positives: int):
    """The images of `conftest.draw_collection`, darker and flatter, without labels; two of each patient."""
    rng = np.random.default_rng(5)
    (folder / "deep").mkdir(parents=True)
    for i in range(images):
        pixels = rng.normal(80, 15, (48, 40))
        pixels[16:32, 12:28] += 40 if i < positives else -40
        name = f"person{i // 2}_virus_{i}.jpeg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / ("deep" if i % 2 else "") / name)
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return draw_elsewhere(tmp_path_factory.mktemp("local") / "images", 120, 90)


@pytest.fixture(scope="module")
def model(export):
    return open_model(export, "cpu", "fp32")


@pytest.fixture(scope="module")
def images(local):
    return find_unlabelled(Request(local), None)


def test_a_fit_writes_the_scores_of_validation_by_class(export):
    settings = settings_of(export)
    assert settings["scores"].keys() == {"NORMAL", "PNEUMONIA"}
    assert np.mean(settings["scores"]["PNEUMONIA"]) > np.mean(settings["scores"]["NORMAL"])
    assert all(len(values) == 101 and values == sorted(values) for values in settings["scores"].values())


def test_images_are_found_at_any_depth_with_their_patients(images):
    assert len(images.paths) == 120 and images.patient_count == 60


@pytest.mark.parametrize(("few", "matched", "fewest"), [(15, False, 16), (99, True, 100)])
def test_too_few_images_are_refused(few, matched, fewest, tmp_path):
    draw_elsewhere(tmp_path / "few", few, few // 2)
    with pytest.raises(UserError, match=f"unlabelled .*few: {few} images; .* needs {fewest} or more"):
        find_unlabelled(Request(tmp_path / "few", matched), None)
    with pytest.raises(UserError, match="no such folder"):
        find_unlabelled(Request(tmp_path / "none", matched), None)


def test_batch_norm_is_adapted_in_a_copy_and_the_same_way_again(model, images):
    before = [layer.running_mean.clone() for layer in layers_of(model.network)]
    once, again = (layers_of(adapt(model, images).network) for _ in range(2))
    for old, kept, one, other in zip(before, layers_of(model.network), once, again, strict=True):
        assert old.equal(kept.running_mean) and not old.equal(one.running_mean)
        assert one.running_mean.equal(other.running_mean) and one.running_var.equal(other.running_var)


def test_a_network_without_batch_norm_is_refused(model, images, monkeypatch):
    monkeypatch.setattr(unlabelled, "layers_of", lambda network: [])
    with pytest.raises(UserError, match="has no batch norm that images without labels could adapt"):
        adapt(model, images)


def test_an_image_that_cannot_be_read_is_named(model, local, tmp_path):
    folder = draw_elsewhere(tmp_path / "images", 20, 10)
    (folder / "a.jpeg").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a\.jpeg: not an image"):
        adapt(model, find_unlabelled(Request(folder), None))


def test_the_intercept_moves_so_that_the_share_called_is_validations(model, images, monkeypatch):
    """And by the export's own threshold and temperature."""
    monkeypatch.setattr(alignment, "LEVEL", 1.1)  # eight validation images prove no difference
    reference = reference_of(model)
    found = match(model, images, reference, 0.75)
    intercepts = np.array(found.intercepts)
    logits = predict_all(model, images.paths) / model.scaling.temperature + intercepts
    called = expit(logits[:, 1] - logits[:, 0]) >= model.threshold
    expected = reference.share_called(logit(model.threshold) * model.scaling.temperature, 0.75)
    assert called.mean() == pytest.approx(found.called) == pytest.approx(expected, abs=0.01)


def test_without_its_scores_an_export_needs_its_validation_images(model, export, monkeypatch):
    monkeypatch.setitem(model.settings, "scores", None)
    with pytest.raises(UserError, match=r"holds no validation scores, and its validation images are not here"):
        reference_of(model)
    monkeypatch.setitem(model.settings["settings"], "data", str(export.parent / "moved"))
    found = reference_of(model)
    monkeypatch.undo()
    stored = reference_of(model)
    assert np.allclose(found.positives, stored.positives, atol=1e-3)
    assert np.allclose(found.negatives, stored.negatives, atol=1e-3)


def test_a_recalibrated_export_is_not_matched_again(model, monkeypatch):
    monkeypatch.setitem(model.settings, "recalibrated", {"images": 30})
    with pytest.raises(UserError, match="was recalibrated before; give the export that it comes from"):
        reference_of(model)


def test_the_share_of_positive_images_must_be_stated(model, local):
    with pytest.raises(UserError, match=r"state it by prevalence=, which was 0\.\d\d on validation"):
        without_labels(model, Request(local, match_scores=True))


def test_batch_norm_or_the_intercept_is_adapted(model, local):
    adapted = without_labels(model, Request(local))
    matched = without_labels(model, Request(local, match_scores=True, prevalence=0.75))
    assert adapted.model.network is not model.network and matched.model.network is model.network
    assert adapted.model.settings["intercepts"] == model.settings["intercepts"]
    assert adapted.model.settings["calibration"].endswith("; batch norm adapted to 120 images without labels")
    assert matched.model.settings["calibration_kind"] == "matched"
    assert matched.model.settings["prior"] == model.settings["prior"]
    for found in (adapted, matched):
        assert found.images == 120 and found.model.settings["scores"] is None
        assert found.lines[0].endswith("120 images without labels, of 60 patients")
        assert found.lines[-1].startswith("validation's images are not here")


def test_what_it_does_to_the_validation_images_is_said_where_they_are(model, export, local, monkeypatch):
    monkeypatch.setitem(model.settings["settings"], "data", str(export.parent / "moved"))
    *_, before, after = without_labels(model, Request(local)).lines
    assert re.fullmatch(r"validation's images before: AUC \S+, recall of NORMAL \S+, of PNEUMONIA \S+", before)
    assert after.startswith("validation's images after: AUC ")


def test_the_command_writes_an_export_that_every_command_takes(export, local, run, refused, tmp_path):
    new, matched = tmp_path / "new", tmp_path / "matched"
    result = run("recalibrate", export, "--unlabelled", local, "--output", new)
    assert result.exit_code == 0, result.output
    assert "120 images without labels" in " ".join(result.output.split())  # it may be wrapped
    assert run("verify", new).exit_code == 0 and run("predict", local, "--model", new).exit_code == 0
    assert settings_of(new)["recalibrated"]["unlabelled"] == 120
    options = ["--unlabelled", local, "--match-scores", "--prevalence", 0.75]
    refused(run("recalibrate", new, *options), "was recalibrated before")
    result = run("recalibrate", export, *options, "--output", matched)
    assert result.exit_code == 0, result.output
    assert "called PNEUMONIA" in " ".join(result.output.split())
    assert run("verify", matched).exit_code == 0
    refused(run("recalibrate", export, *options[:-2]), "--match-scores: ", "state it by --prevalence", code=None)
