"""Grad-CAM shows the evidence for the chosen class on a fixed scale; `tests/evaluation` compares it with a package."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.small_network import NAME, register
from xray_fastai.inference.gradcam import grad_cam, mapped_classes, overlay
from xray_fastai.inference.scaling import softmax
from xray_fastai.model.architectures import build_network
from xray_fastai.model.ensemble import join
from xray_fastai.system.errors import UserError


class Halves(nn.Module):
    """A backbone whose first channel is the left half of an image, and whose second channel is the right half."""

    def forward(self, images):
        left = torch.tensor([1.0, 0.0])
        return torch.cat([images * left, images * (1 - left)], dim=1)  # (B, 2, 2, 2)


def model_of(network, prepared=torch.Tensor.float):
    """A model that predicts by a network alone."""
    return SimpleNamespace(
        network=network,
        device=torch.device("cpu"),
        logits=lambda images: network(prepared(images)).detach(),
        probabilities=softmax,
        decide=lambda probabilities: probabilities.argmax(axis=-1),
    )


def model_of_halves(weight=1.0):
    """A network in which only the left half raises the score of class 0, and only the right half that of class 1."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False))
    head[2].weight.data = weight * torch.eye(2)
    return model_of(nn.Sequential(Halves(), head))


def test_the_map_is_that_of_the_class_asked_for():
    images = torch.full((2, 1, 2, 2), 100, dtype=torch.uint8)
    maps = grad_cam(model_of_halves(), images, targets=[0, 1])
    np.testing.assert_allclose(maps, [[[0.5, 0], [0.5, 0]], [[0, 0.5], [0, 0.5]]], atol=1e-6)


def test_the_default_is_the_predicted_class():
    images = torch.tensor([[[[200, 10], [200, 10]]], [[[10, 200], [10, 200]]]], dtype=torch.uint8)
    maps = grad_cam(model_of_halves(), images)
    np.testing.assert_allclose(maps, [[[1, 0], [1, 0]], [[0, 1], [0, 1]]], atol=1e-6)


def test_a_map_reaches_the_probability_of_its_class_so_weak_evidence_is_weak():
    images = torch.tensor([[[[104, 100], [104, 100]]]], dtype=torch.uint8).repeat(12, 1, 1, 1)  # more than a chunk
    p = 1 / (1 + np.exp(-0.2))  # of class 0: the logits are 5.2 and 5
    maps = grad_cam(model_of_halves(0.1), images, targets=[0, 1] * 6)
    np.testing.assert_allclose(maps.max(axis=(1, 2)), [p, 1 - p] * 6, atol=1e-5)
    faint, strong = (np.asarray(overlay_of(value)).astype(int) for value in (1 - p, 1.0))
    assert np.abs(faint - 100).max() < 0.8 * np.abs(strong - 100).max()


def overlay_of(value):
    return overlay(Image.new("L", (20, 20), 100), np.full((2, 2), value))


@pytest.mark.parametrize("size, cells", [(64, 8), (48, 6), (32, 4), (112, 14)])
def test_the_layer_has_up_to_four_times_the_cells_of_the_last_block(size, cells):
    torch.manual_seed(0)
    blocks = [nn.Conv2d(1 if i == 0 else 4, 4, 3, stride=2, padding=1) for i in range(5)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for backbone in (nn.Sequential(*blocks), nn.Sequential(nn.Sequential(*blocks), nn.ReLU(inplace=True))):
        maps = grad_cam(model_of(nn.Sequential(backbone, head)), torch.zeros(1, 1, size, size, dtype=torch.uint8))
        assert maps.shape == (1, cells, cells)


def model_of_grey(network):
    """A model whose network takes images of three channels."""
    return model_of(network, lambda images: (images.float() / 255).expand(-1, 3, -1, -1))


def pattern_of(maps):
    return maps / maps.max(axis=(1, 2), keepdims=True).clip(1e-9)  # zeros, if nothing speaks for the class


@pytest.mark.parametrize("arch", [NAME, "densenet121", "timm/vit_tiny_patch16_224"])
def test_equal_members_have_the_map_of_one(arch):
    if arch.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed")
    register()
    torch.manual_seed(0)
    network = build_network(arch, 2, 0.5, 64).eval()
    images = torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8)
    expected = grad_cam(model_of_grey(network), images, targets=[0, 1, 0])
    found = grad_cam(model_of_grey(join([copy.deepcopy(network) for _ in range(3)], 0.5)), images, targets=[0, 1, 0])
    assert expected.max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_evidence_of_the_members_adds_up():
    """The outputs of a member whose last layer is zero depend on nothing; the map is then that of the other."""
    register()
    torch.manual_seed(0)
    first, second = (build_network(NAME, 2, 0.5, 64).eval() for _ in range(2))
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    alone = [grad_cam(model_of_grey(network), images, [0, 1]) for network in (first, second)]
    both = grad_cam(model_of_grey(join([first, second], 0.5)), images, [0, 1])
    second[1][-1].weight.data.zero_()
    one = grad_cam(model_of_grey(join([first, second], 0.5)), images, [0, 1])
    alone, both, one = [pattern_of(maps) for maps in alone], pattern_of(both), pattern_of(one)
    np.testing.assert_allclose(one, alone[0], atol=1e-4)
    assert min(np.abs(both - maps).max() for maps in alone) > 0.05


def test_the_class_to_detect_is_mapped_beside_the_one_that_is_called():
    model = SimpleNamespace(classes=["A", "B", "C"], positive="B")
    assert [mapped_classes(model, called) for called in range(3)] == [[0, 1], [1], [2, 1]]
    assert mapped_classes(SimpleNamespace(classes=["A", "B"], positive=None), 0) == [0]


def test_too_little_memory_is_an_error_for_the_user():
    def fails(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = model_of_halves()
    model.logits = fails
    with pytest.raises(UserError, match='not enough memory on cpu for 2 heat maps at once; try device="cpu"'):
        grad_cam(model, torch.zeros(2, 1, 2, 2, dtype=torch.uint8))
