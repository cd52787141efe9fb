"""Grad-CAM shows the evidence for the chosen class; `tests/evaluation` compares it with pytorch-grad-cam."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from xray_fastai.inference.gradcam import grad_cam
from xray_fastai.system.errors import UserError


class Halves(nn.Module):
    """A backbone whose first channel is the left half of an image, and whose second channel is the right half."""

    def forward(self, images):
        left = torch.tensor([1.0, 0.0])
        return torch.cat([images * left, images * (1 - left)], dim=1)  # (B, 2, 2, 2)


def model_of_halves():
    """A network in which only the left half raises the score of class 0, and only the right half that of class 1."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False))
    head[2].weight.data = torch.eye(2)
    network = nn.Sequential(Halves(), head)
    return SimpleNamespace(
        network=network,
        device=torch.device("cpu"),
        logits=lambda images: network(images.float()).detach(),
        probabilities=lambda logits: logits,
        decide=lambda probabilities: probabilities.argmax(axis=-1),
    )


def test_the_map_is_that_of_the_class_asked_for():
    images = torch.full((2, 1, 2, 2), 100, dtype=torch.uint8)
    maps = grad_cam(model_of_halves(), images, targets=[0, 1])
    np.testing.assert_allclose(maps, [[[1, 0], [1, 0]], [[0, 1], [0, 1]]], atol=1e-6)


def test_the_default_is_the_predicted_class():
    images = torch.tensor([[[[200, 10], [200, 10]]], [[[10, 200], [10, 200]]]], dtype=torch.uint8)
    maps = grad_cam(model_of_halves(), images)
    np.testing.assert_allclose(maps, [[[1, 0], [1, 0]], [[0, 1], [0, 1]]], atol=1e-6)


def test_too_little_memory_is_an_error_for_the_user():
    def fails(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = model_of_halves()
    model.logits = fails
    with pytest.raises(UserError, match='not enough memory on cpu for 2 heat maps at once; try device="cpu"'):
        grad_cam(model, torch.zeros(2, 1, 2, 2, dtype=torch.uint8))
