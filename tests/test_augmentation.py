"""Training images vary in sharpness and grain, and nothing else of them changes."""

import torch
from fastai.vision.all import TensorImageBW

from xray_fastai.augmentation import BlurAndNoise, augmentations


def sharpness(images: torch.Tensor) -> torch.Tensor:
    return images.diff(dim=-1).abs().mean((1, 2, 3))


def test_only_training_images_are_blurred():
    torch.manual_seed(0)
    images = TensorImageBW(torch.rand(200, 1, 32, 32))
    transform = BlurAndNoise(noisy=0)
    assert torch.equal(transform(images, split_idx=1), images)
    softer = sharpness(transform(images, split_idx=0)) / sharpness(images)
    assert 0.25 < (softer < 0.99).float().mean() < 0.55  # a blur of less than a third of a pixel changes nothing
    assert softer.max() <= 1.001 and softer.min() < 0.5


def test_noise_is_grain_around_the_picture():
    torch.manual_seed(0)
    images = TensorImageBW(torch.full((200, 1, 32, 32), 0.5))
    grain = BlurAndNoise()(images, split_idx=0).std((1, 2, 3))
    assert 0.4 < (grain > 1e-4).float().mean() < 0.6 and 0.04 < grain.max() < 0.065
    assert abs(BlurAndNoise()(images, split_idx=0).mean() - 0.5) < 1e-3


def test_the_picture_stays_where_it_is():
    ramp = torch.linspace(0, 1, 64).expand(20, 1, 64, 64)
    shown = BlurAndNoise(blurred=1, noisy=0)(TensorImageBW(ramp), split_idx=0)
    assert abs(shown[..., 10:-10] - ramp[..., 10:-10]).max() < 0.01


def test_options():
    names = {
        name: [type(transform).__name__ for transform in augmentations(name)] for name in ("none", "light", "strong")
    }
    assert not names["none"] and "BlurAndNoise" not in names["light"] and "BlurAndNoise" in names["strong"]
