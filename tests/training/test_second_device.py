"""A whole fit and all that uses its export on a second device: where two devices meet, CUDA would raise, too."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from fastai.vision.all import Callback
from fastai.vision.all import load_learner as load_pickled

from tests.conftest import draw_collection, settings_of
from tests.second_device import DEVICE, second_device
from tests.small_network import NAME as SMALL
from xray_fastai import evaluate, fit, interpret, predict
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.inference.gradcam import grad_cam
from xray_fastai.inference.model import open_model
from xray_fastai.inference.rows import RowBuilder
from xray_fastai.model import decoded
from xray_fastai.serving.decoding import Decoder
from xray_fastai.serving.predictions import predict_file
from xray_fastai.training import calibration, frozen_features


@pytest.fixture
def device():
    with second_device() as device:
        yield device


MISTAKES = {
    "a product": lambda on, off: on * off,
    "an index on the device": lambda on, off: off[on.long()],
    "a loss with weights of another device": lambda on, off: torch.nn.functional.cross_entropy(
        on[None], torch.tensor([0]).to(DEVICE), off
    ),
    "a concatenation": lambda on, off: torch.cat([on, off]),
    "a stack of two numbers": lambda on, off: torch.stack([on[0], off[0]]),
    "a choice": lambda on, off: torch.where(on > 0, on, off),
    "a comparison": lambda on, off: torch.equal(on, off),
    "a matrix product of a gradient": lambda on, off: (
        torch.autograd.grad((on.requires_grad_() ** 2).sum(), on)[0] @ off
    ),
    "numpy": lambda on, off: on.numpy(),
    "an array": lambda on, off: np.asarray(on),
    "a pickle": lambda on, off: pickle.dumps(on),
    "a pickled parameter": lambda on, off: pickle.dumps(torch.nn.Linear(2, 2).to(DEVICE)),
    "a copy that does not block": lambda on, off: on.to("cpu", non_blocking=True),
    "a copy in place that does not block": lambda on, off: off.copy_(on, non_blocking=True),
    "float64": lambda on, off: on.double(),
    "float64 from the CPU": lambda on, off: off.double().to(DEVICE),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_device_refuses_what_cuda_or_mps_refuse(mistake, device):
    on, off = torch.ones(2).to(DEVICE), torch.ones(2)
    with pytest.raises((RuntimeError, TypeError)):
        MISTAKES[mistake](on, off)


def test_the_device_does_what_cuda_does(device):
    network, images = torch.nn.Linear(2, 2), torch.rand(3, 2)
    expected = network(images)
    weight = network.weight
    network.to(DEVICE)
    assert network.weight is weight and weight.device == DEVICE and images.to(DEVICE).device == DEVICE
    result = network(images.to(DEVICE)) * torch.tensor(1.0)  # a number may be on the CPU
    assert result.device == result.sum().device == torch.zeros(2, device=DEVICE).device == DEVICE
    assert torch.equal(result.cpu(), expected) and result.cpu().device.type == "cpu"
    result.sum().backward()
    assert weight.grad.device == DEVICE and result.detach()[torch.tensor([0])].device == DEVICE
    images.copy_(images.to(DEVICE, non_blocking=True))
    assert images.device.type == "cpu"
    network.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    assert network.weight.device == DEVICE and network.cpu().weight.device.type == "cpu"


class Interrupt(Callback):
    """Ends the fit by Ctrl-C in an epoch of a phase, as a second Ctrl-C does."""

    def __init__(self, phase: int, epoch: int):
        self.at, self.phase = (phase, epoch), 0

    def before_fit(self):
        self.phase += 1

    def after_pred(self):
        if (self.phase, self.epoch) == self.at:
            raise KeyboardInterrupt


class RunOut(Callback):
    """Runs out of memory in the first batch."""

    done = False

    def after_pred(self):
        if not self.done:
            self.done = True
            raise torch.OutOfMemoryError("no memory, for a test")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with images, weights, and the export of a fit of both phases on the CPU and on the device."""
    root = tmp_path_factory.mktemp("devices")
    counts = {
        "train/NORMAL": 8,
        "train/PNEUMONIA": 16,
        "val/NORMAL": 5,
        "val/PNEUMONIA": 5,
        "test/NORMAL": 3,
        "test/PNEUMONIA": 3,
    }
    draw_collection(root / "data", counts)
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(SMALL).state_dict(), root / "weights.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "MIN_IMAGES", 8)
        patch.setattr(calibration, "MIN_OF_A_CLASS", 4)
        train(root, "cpu", "cpu")
        with second_device():
            train(root, "lazy", "lazy")
    yield root
    shutil.rmtree(root)


def train(root: Path, name: str, device: str, callbacks=(), **settings):
    """Fit both phases with class weights, which differ, as the numbers of images do."""
    return fit(callbacks=callbacks, **{
        "data": str(root / "data"), "weights": str(root / "weights.pth"), "valid": "folder", "arch": SMALL,
        "size": 32, "batch_size": 12, "workers": 0, "device": device, "freeze_epochs": 2, "epochs": 2,
        "exports": str(root), "name": name, "class_weights": "balanced", "cache": False, **settings,
    })  # fmt: skip


def same_result(a: Path, b: Path) -> None:
    assert (a / "history.csv").read_bytes() == (b / "history.csv").read_bytes()
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    for key in ("best", "temperature", "threshold", "calibration", "calibrated"):
        assert settings_of(a)[key] == settings_of(b)[key], key


@pytest.mark.slow
def test_a_fit_of_both_phases_gives_the_cpus_result_bit_for_bit(root):
    same_result(root / "cpu", root / "lazy")
    settings = settings_of(root / "lazy")
    assert settings["class_weights"] == pytest.approx([1.5, 0.75]) and settings["training"]["device"] == "lazy"
    assert "too few" not in settings["calibration"]
    learn = load_pickled(root / "lazy" / "learner.pkl")
    assert learn.predict(next((root / "data" / "test" / "NORMAL").iterdir()))[2].shape == (2,)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True], ids=["mapped", "kept on the device"])
def test_a_fit_on_the_array_of_decoded_images_gives_the_same(kept, root, device, monkeypatch):
    """The default on a GPU, which keeps a small array itself."""
    monkeypatch.setattr(decoded, "fits_on", lambda device, size: kept)
    name = f"cached-{kept}"
    train(root, name, "lazy", cache=True)
    for file in ("history.csv", "model.safetensors"):
        assert (root / name / file).read_bytes() == (root / "cpu" / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize("resumed_on", ["lazy", "cpu"])
def test_an_interrupted_fit_resumes_on_either_device(resumed_on, root, device):
    name = f"resumed-{resumed_on}"
    with pytest.raises(KeyboardInterrupt):
        train(root, name, "lazy", callbacks=[Interrupt(2, 1)])
    fit(resume=name, exports=str(root), device=resumed_on)
    assert (root / name / "history.csv").read_bytes() == (root / "cpu" / "history.csv").read_bytes()
    assert (root / name / "model.safetensors").read_bytes() == (root / "cpu" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_smaller_batches_after_memory_ran_out_and_features_in_a_file(root, device, monkeypatch, capsys):
    monkeypatch.setattr(frozen_features, "IN_MEMORY", 0)
    result = train(root, "small", "lazy", freeze_epochs=1, epochs=1, callbacks=[RunOut()])
    assert result.status == "complete" and len(result.history) == 2
    assert "batches of 6 instead of 12 images" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_interpretation_and_prediction_agree_with_the_cpus(root, device):
    export, data = root / "lazy", root / "data"
    images = sorted((data / "test").rglob("*.jpeg"))
    for tta in (False, True):
        on_cpu, here = (evaluate(export, data, tta=tta, device=name).predictions for name in ("cpu", "lazy"))
        np.testing.assert_allclose(here.p_NORMAL, on_cpu.p_NORMAL, atol=1e-5)
        on_cpu, here = (predict(images, export, tta=tta, device=name) for name in ("cpu", "lazy"))
        np.testing.assert_allclose(here.p_NORMAL, on_cpu.p_NORMAL, atol=1e-5)
    interpreted = interpret(export, data, split="test", device="lazy")
    assert (interpreted.path / "top_losses.png").is_file()
    interpreted.interpretation.plot_top_losses(2)  # fastai's own methods
    models = [open_model(export, name) for name in ("cpu", "lazy")]
    batch = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8)
    np.testing.assert_allclose(*(grad_cam(model, batch, [0, 1, 1]) for model in models), atol=1e-4)
    decoder = Decoder()
    answers = [
        predict_file(RowBuilder(model, PredictConfig()), decoder, "a.jpeg", images[0].read_bytes()) for model in models
    ]
    decoder.close()
    assert answers[0].probabilities == pytest.approx(answers[1].probabilities, abs=1e-5)
