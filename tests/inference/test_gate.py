"""The gate lets drawn X-rays pass and withholds other pictures. It travels and is checked with the weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from tests.conftest import settings_of
from tests.ensembles import joined
from tests.small_network import NAME
from xray_fastai import dataloaders, fit, open_learner, recalibrate, save_export, verify
from xray_fastai.data.sources import phantom
from xray_fastai.export.weights_file import GATE, gate_layout_of, size_of
from xray_fastai.inference.gate import Gate, Measures
from xray_fastai.inference.model import open_model
from xray_fastai.inference.stream import Batch, predict_batches
from xray_fastai.system.errors import UserError
from xray_fastai.training.gate import FEATURES, LEAST, _space, gate_of
from xray_fastai.training.origin import Parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn X-rays, of which more than `LEAST` are trained on."""
    return phantom.write(tmp_path_factory.mktemp("drawn"), images=300, size=48)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """An export of one epoch on them."""
    exports = tmp_path_factory.mktemp("exports")
    result = fit(folder, arch=NAME, size=32, epochs=1, weights="none", batch_size=16, workers=0, device="cpu",
                 exports=str(exports), name="drawn", cache=False)  # fmt: skip
    return result.path


@pytest.fixture(scope="module")
def model(trained):
    return open_model(trained, "cpu", "fp32")


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def unlike(model, sources, **options) -> np.ndarray:
    return np.concatenate([batch.unlike for batch in predict_batches(model, sources, **options)])


def xrays(folder, split="test") -> list[str]:
    return sorted(map(str, (folder / split).glob("*/*")))


def pictures(folder) -> list[Image.Image]:
    return [Image.open(path).convert("L") for path in xrays(folder)]


def test_xrays_of_other_patients_pass(model, folder):
    assert (unlike(model, xrays(folder)) > model.gate.limit).mean() < 0.05
    percentages = unlike(model, xrays(folder, "train"))
    assert percentages.min() >= 0 and percentages.max() <= 100 and 30 < np.median(percentages) < 70


@pytest.mark.parametrize(
    "changed",
    [
        lambda image, rng: rng.integers(0, 256, image.shape, dtype=np.uint8),
        lambda image, rng: rng.permuted(image.ravel()).reshape(image.shape),
        lambda image, rng: 255 - image,
        lambda image, rng: np.rot90(image),
        lambda image, rng: np.rot90(image, 2),
        lambda image, rng: image[::-1],
    ],
    ids=["noise", "shuffled", "inverted", "turned", "turned twice", "upside down"],
)
def test_other_pictures_are_withheld(changed, model, folder):
    rng = np.random.default_rng(0)
    others = [changed(np.asarray(picture), rng) for picture in pictures(folder)]
    assert (unlike(model, others) > model.gate.limit).mean() >= 0.95


def test_the_same_whatever_the_batch(model, folder):
    files = xrays(folder)[:12]
    expected = unlike(model, files)
    assert len(set(expected)) > 6
    # few files are computed by the network as it is, more by the fused one
    for options in ({"batch_size": 1}, {"batch_size": 5}, {"tta": True}):
        np.testing.assert_allclose(unlike(model, files, **options), expected, atol=0.2, err_msg=str(options))


def test_unreadable_files_have_no_number(model, folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (batch,) = predict_batches(model, [str(tmp_path / "broken.png"), *xrays(folder)[:2]])
    assert len(batch.unlike) == len(batch.logits) == 2
    (batch,) = predict_batches(model, [str(tmp_path / "broken.png")])
    assert len(batch.unlike) == 0


def test_it_is_that_of_the_files(trained, model):
    tensors = load((trained / "model.safetensors").read_bytes())
    expected = {name: list(tensor.shape) for name, tensor in tensors.items() if name.startswith(GATE)}
    assert expected and expected == {name: shape for name, (_, shape) in gate_layout_of(model.settings).items()}
    assert json.loads(json.dumps(model.gate.numbers())) == settings_of(trained)["gate"]
    for name, tensor in model.gate.tensors().items():
        np.testing.assert_array_equal(tensor, tensors[name])
    assert len(model.gate.medians) == 4 and model.gate.images >= LEAST
    assert size_of(gate_layout_of(model.settings)) < 1_000_000
    assert verify(trained).ok


def test_that_of_an_ensemble_compares_the_features_of_its_first_member(trained, model, folder, tmp_path):
    three = joined(trained, tmp_path / "three")
    assert verify(three).ok
    opened = open_model(three, "cpu", "fp32")
    files = xrays(folder)[:12]
    expected = unlike(model, files)
    for options in ({"batch_size": 1}, {}):  # by the network as it is, and by the fused one
        np.testing.assert_allclose(unlike(opened, files, **options), expected, atol=0.2, err_msg=str(options))
    logits = [np.concatenate([batch.logits for batch in predict_batches(m, files)]) for m in (opened, model)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2  # the other members are other networks


def test_the_gate_of_an_ensemble_that_was_trained_by_hand(trained, folder, tmp_path):
    three = joined(trained, tmp_path / "three", members=2)
    learn = open_learner(three)
    learn.dls = dataloaders(folder, learn, batch_size=16, workers=0, device="cpu", cache=False)
    again = save_export(learn, tmp_path / "again")
    assert verify(again).ok and settings_of(again)["members"] == 2
    features = gate_layout_of(settings_of(again))[f"{GATE}features.mean"]
    assert features == gate_layout_of(settings_of(trained))[f"{GATE}features.mean"] == ("F32", [64])


def test_networks_leave_it_out(trained, model):
    assert not any(name.startswith("gate") for name in model.network.state_dict())
    assert not any(name.startswith("gate") for name in open_learner(trained).model.state_dict())
    parent = Parent(trained, settings_of(trained))
    (start,) = parent.weights(model.classes)
    assert start and not any(name.startswith("gate") for name in start)


def spoil(folder, change) -> None:
    settings = settings_of(folder)
    change(settings)
    (folder / "model.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("gate"), "not the weights of"),
        (lambda s: s["gate"]["dimensions"].update(features=1), "not the weights of"),
        (lambda s: s["gate"]["quantiles"].reverse(), "gate.quantiles: they fall"),
        (lambda s: s["gate"]["spreads"].pop(), "gate.spreads"),
        (lambda s: s["gate"].update(limit=101), "gate.limit"),
        (lambda s: s["gate"]["rest"].update(pictures=0), "gate.rest.pictures"),
        (lambda s: s["gate"].pop("medians"), "gate.medians"),
    ],
)
def test_a_spoiled_gate_is_refused(change, words, copy):
    spoil(copy, change)
    assert any(words in fault for fault in verify(copy).faults)
    with pytest.raises(UserError, match=words):
        open_model(copy, "cpu")


def test_few_images_have_none(export, an_image):
    assert settings_of(export)["gate"] is None
    model = open_model(export, "cpu")
    assert model.gate is None
    (batch,) = predict_batches(model, [str(an_image)])
    assert batch.unlike is None and Batch([], [], batch.images, batch.logits).unlike is None


def test_a_learner_trained_by_hand_gets_one(trained, model, folder, tmp_path):
    learn = open_learner(trained)
    learn.dls = dataloaders(folder, learn, workers=0, device="cpu", cache=False)
    saved = open_model(save_export(learn, tmp_path / "saved"), "cpu", "fp32")
    # the same images and weights
    for name, tensor in model.gate.tensors().items():
        np.testing.assert_allclose(saved.gate.tensors()[name], tensor, atol=1e-3, err_msg=name)


def drawn(count: int, seed: int, closer: float = 0.0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, 4))
    values[:, FEATURES] -= closer
    return values


def test_the_limit_fits_new_images():
    """Features of training images are closer together here, by five standard deviations."""
    none = Measures({}, np.zeros(256, np.float32))
    gate = gate_of(none, drawn(2000, 0, closer=5), drawn(400, 1))
    assert (gate.percentages(drawn(20000, 2)) > gate.limit).mean() < 0.015
    assert (gate.percentages(drawn(20000, 2) + 6) > gate.limit).all()
    assert gate.limit < 100
    # nothing is known of new images: those of training decide
    assert (gate_of(none, drawn(2000, 0), None).percentages(drawn(20000, 2)) > gate.limit).mean() < 0.015


def test_new_images_raise_the_limit():
    """Ten of 400 validation images are unlike all training images."""
    new = drawn(400, 1)
    new[:10] += 20
    gate = gate_of(Measures({}, np.zeros(256, np.float32)), drawn(2000, 0), new)
    assert (gate.percentages(new) > gate.limit).sum() <= 6


def test_features_may_all_be_the_same():
    vectors, targets = {"features": np.ones((200, 64), np.float32)}, np.arange(200) % 2
    space = _space(vectors["features"], targets, 2, 32)
    own = drawn(200, 0)
    own[:, FEATURES] = space.distances(vectors["features"])
    gate = gate_of(Measures({"features": space}, np.zeros(256, np.float32)), own, own.copy())
    json.dumps(gate.numbers(), allow_nan=False)
    assert (gate.spreads > 0).all() and all(np.isfinite(part).all() for part in gate.tensors().values())


def test_features_are_what_the_last_layer_gets(model, folder):
    images = torch.stack([torch.from_numpy(np.array(p.resize((32, 32)))) for p in pictures(folder)[:9]])[:, None]
    exact, fast = (model.logits_and_features(images, exact=exact) for exact in (True, False))
    for logits, features in (exact, fast):
        with torch.inference_mode():
            expected = model.network[1][-1](features)
        torch.testing.assert_close(expected, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exact[1], fast[1], rtol=1e-4, atol=1e-4)
    assert isinstance(model.gate, Gate)


def test_recalibrate_keeps_it_with_labels_and_leaves_it_out_with_adapted_features(trained, folder, tmp_path):
    """Labels change slope, intercept and threshold; batch norm changes the features that it compares."""
    kept = recalibrate(trained, folder, "test", output=tmp_path / "kept", device="cpu")
    adapted = recalibrate(trained, unlabelled=folder / "test", output=tmp_path / "adapted", device="cpu")
    assert settings_of(kept.path)["gate"] == settings_of(trained)["gate"] is not None
    assert settings_of(adapted.path)["gate"] is None and "gate: left out" in str(adapted)
    for path in (kept.path, adapted.path):
        tensors = load((path / "model.safetensors").read_bytes())
        assert verify(path).ok and settings_of(path)["weights"]["tensors"] == len(tensors)
        assert any(name.startswith(GATE) for name in tensors) == (path == kept.path)
    (batch,) = predict_batches(open_model(kept.path, "cpu", "fp32"), xrays(folder)[:3])
    (before,) = predict_batches(open_model(trained, "cpu", "fp32"), xrays(folder)[:3])
    np.testing.assert_array_equal(batch.unlike, before.unlike)
