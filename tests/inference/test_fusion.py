"""The fused network for a CPU gives the outputs of the trained one; compared in fp32, where they differ least.

The plain network takes over wherever torch's operators, which are not documented, fail or give other numbers.
"""

import warnings

import pytest
import torch
import torchvision

from tests.small_network import KINDS, NAME, register
from xray_fastai.inference.cpu_fusion import PART, Convolution, Fused, fused_for_cpu
from xray_fastai.inference.model import open_model
from xray_fastai.model.architectures import build_network

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


def network(arch: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = getattr(torchvision.models, arch)(weights=None, num_classes=2).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # as far from the identity as trained ones
            torch.nn.init.normal_(layer.running_mean, std=0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
            torch.nn.init.normal_(layer.bias, std=0.1)
    return model


def fused_of(model: torch.nn.Module, images: torch.Tensor, exact: torch.Tensor) -> Fused:
    return fused_for_cpu(model, torch.float32, images[:2], exact[:2])


def last_layer(model: torch.nn.Module) -> torch.nn.Linear:
    return [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]


def assert_equal(found: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("arch", KINDS)
@torch.inference_mode()
def test_fused_gives_what_the_network_gives(arch):
    model, images = network(arch), torch.randn(PART + 3, 3, 64, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = model(images)
    with warnings.catch_warnings(action="error"):
        fused = fused_of(model, images, exact)
        assert_equal(fused(images)[0], exact)
        assert_equal(fused(images[:1])[0], exact[:1])
        assert_equal(last_layer(model)(fused(images)[1]), exact)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    within = [layer for layer in fused.fused.modules() if isinstance(layer, Convolution)]
    assert len(within) == sum(isinstance(layer, torch.nn.Conv2d) for layer in model.modules())


class Operators:
    """Stands for `torch.ops.mkldnn._convolution_pointwise` and its `binary`, but breaks them for some batches."""

    real = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)  # None in a build without oneDNN

    def __init__(self, broken, batches=range(1, PART + 1)):
        self.broken, self.batches = broken, batches

    def __call__(self, x, *args):
        return self.broken(self.real(x, *args)) if len(x) in self.batches else self.real(x, *args)

    def binary(self, x, *args):
        return self.broken(self.real.binary(x, *args)) if len(x) in self.batches else self.real.binary(x, *args)


def no_memory(_):
    raise RuntimeError("could not create a memory")  # torch 2.11, where the feature map is 1 x 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operators", "reason"),
    [
        (Operators(no_memory), "raises RuntimeError: could not create a memory"),
        (Operators(no_memory, [1]), "raises RuntimeError: could not create a memory"),
        (Operators(no_memory, [PART]), "raises RuntimeError: could not create a memory"),  # none when it is built
        (Operators(lambda y: 1.01 * y), "gives logits that differ by"),
        (Operators(lambda y: 1.01 * y, [1]), "gives logits that differ by"),
        (Operators(lambda y: torch.full_like(y, torch.nan)), "gives logits that differ by nan"),
        (None, "raises TypeError"),
    ],
    ids=["raises", "raises for one", "raises for many", "wrong", "wrong for one", "not a number", "gone"],
)
@torch.inference_mode()
def test_the_plain_network_takes_over(operators, reason, monkeypatch):
    # at 32 px torch 2.11's own operators raise, whatever `operators` does to their results
    model, images = network("resnet18"), torch.randn(PART + 1, 3, 64, 64)
    exact = model(images)
    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", operators)
    with pytest.warns(UserWarning, match=reason) as told:
        fused = fused_of(model, images, exact)
        for part in (images, images[:PART], images[:1]):
            assert_equal(fused(part)[0], exact[: len(part)])
    assert len(told) == 1


def test_an_export_predicts_where_the_operators_fail(export, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", Operators(no_memory))
    model = open_model(export, "cpu", "fp32")
    images = torch.randint(0, 256, (3, 1, model.size, model.size), dtype=torch.uint8)
    with pytest.warns(UserWarning, match="without fused convolutions"):
        assert_equal(model.outputs(images), model.logits(images))


@pytest.mark.parametrize("arch", [NAME, "resnet18", "densenet121", "efficientnet_b0", "timm/resnet10t"])
@torch.inference_mode()
def test_fused_gives_what_an_ensemble_gives(arch):
    if arch.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed")
    register()
    torch.manual_seed(0)
    model = build_network(arch, 2, 0.5, 32, members=3).eval()
    images = torch.randn(PART + 1, 3, 32, 32)
    exact = model(images)
    assert exact.abs().max() > 1e-2
    with warnings.catch_warnings(action="error"):
        fused = fused_of(model, images, exact)
        logits, features = fused(images)
    assert_equal(logits, exact)
    assert features.shape == (PART + 1, model[1][-1].in_features)
    torch.testing.assert_close(features, model[1][:-1](model[0](images)), rtol=1e-3, atol=1e-4)
    within = [layer for layer in fused.fused.modules() if isinstance(layer, Convolution)]
    assert len(within) == sum(type(layer) is torch.nn.Conv2d for layer in model.modules()) > 0
