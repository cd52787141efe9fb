"""Varies training images: fastai's transforms, and three that it lacks.

`AUGMENT` is the one table of the values. The transforms are built from it, `model.json` records it, and the benchmarks
read it.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from fastai.vision.all import AffineCoordTfm, TensorImage, Transform, affine_mat, aug_transforms, mask_tensor

AUGMENT: dict[str, dict[str, float]] = {
    "strong": {
        "max_rotate": 15.0,  # degrees, to either side
        "min_zoom": 0.85,
        "max_zoom": 1.2,
        "max_stretch": 1.25,  # ratio of width to height; at least 1 / max_stretch; 1 is no stretch
        "p_affine": 0.75,  # probability of each of the three: rotation, zoom, stretch
        "max_lighting": 0.2,  # change of brightness and of contrast, in fastai's logit scale
        "p_lighting": 0.75,  # probability of each of the two
        "max_blur": 1 / 64,  # standard deviation of the Gaussian, in sides of the image
        "max_noise": 0.08,  # standard deviation of the noise, if white is 1
        "p_quality": 0.5,  # probability of each of the two: blur, noise
    },
    "light": {
        "max_rotate": 10.0,
        "min_zoom": 1.0,
        "max_zoom": 1.15,
        "max_stretch": 1.0,
        "p_affine": 0.75,
        "max_lighting": 0.2,
        "p_lighting": 0.75,
        "max_blur": 0.0,
        "max_noise": 0.0,
        "p_quality": 0.5,
    },
}
"""The values by the option's name; `none` has none.

No flips: the heart lies on one side. On images unlike the training images, flips cost 0.03 of AUC (one seed, ResNet18
at 64 px). No warp: with a stretch of up to 1.2, without blur and noise, it was worse on both groups that
`tests/benchmarks/shift.py` holds out.
"""
FASTAI_VALUES = ("max_rotate", "min_zoom", "max_zoom", "max_lighting", "p_affine", "p_lighting")
"""The values that fastai's `aug_transforms` takes, under its own names."""


def stretch_matrix(images: torch.Tensor, max_ratio: float, p: float) -> torch.Tensor:
    """Draw matrices (B, 3, 3) that make images (B, C, H, W) wider or narrower for their height.

    The ratio of width to height changes by up to `max_ratio`, with probability `p`. The area stays the same. fastai's
    `RandomResizedCropGPU` stretches all images of a batch alike.
    """
    log_ratio = images.new_empty(len(images)).uniform_(-np.log(max_ratio), np.log(max_ratio))
    ratio = mask_tensor(log_ratio, p=p).exp()
    width, zero = ratio.rsqrt(), torch.zeros_like(ratio)
    return affine_mat(width, zero, zero, zero, 1 / width, zero)


class Affine(AffineCoordTfm):
    """Resamples a batch once for all of fastai's affine transforms, and never waits for a GPU.

    fastai's own class reads the largest coordinate from the GPU for each batch. It needs it only where the output is
    smaller than the input; here both have the same size. The result is the same to the last digit.
    """

    def __init__(
        self,
        tfm: AffineCoordTfm,  # composed by `aug_transforms`
    ):
        super().__init__(tfm.aff_fs, mode=tfm.mode, pad_mode=tfm.pad_mode, align_corners=tfm.align_corners)

    def encodes(self, x: TensorImage):
        images = x.as_subclass(torch.Tensor)  # (B, C, H, W)
        grid = F.affine_grid(self.mat.as_subclass(torch.Tensor), images.shape, align_corners=self.align_corners)
        return type(x)(F.grid_sample(images, grid, self.mode, self.pad_mode, self.align_corners))


class Stretch(AffineCoordTfm):
    """Makes images wider or narrower for their height.

    The network gets squares, so an image of another shape is squeezed into one. How much it was squeezed shows how the
    image was taken.
    """

    def __init__(
        self,
        max_ratio: float,  # of width to height; the smallest is 1 / `max_ratio`
        p: float = 0.75,  # probability that an image is stretched
    ):
        super().__init__(partial(stretch_matrix, max_ratio=max_ratio, p=p), align_corners=True)


class Blur(Transform):
    """Blurs each image of a training batch by its own Gaussian; torchvision's `GaussianBlur` blurs all alike.

    Sharpness depends more on the machine, the patient's breath and the JPEG quality than on the disease.
    """

    order = 40  # as fastai's changes of brightness and contrast: after the transforms that move pixels
    split_idx = 0

    def __init__(
        self,
        max_sigma: float,  # standard deviation, in sides of the image
        p: float = 0.5,  # probability that an image is blurred
    ):
        self.max_sigma, self.p = max_sigma, p

    def encodes(self, x: TensorImage):
        images = x.as_subclass(torch.Tensor)  # (B, C, H, W)
        count, channels, height, width = images.shape
        max_sigma = self.max_sigma * max(height, width)  # pixels
        radius = int(np.ceil(3 * max_sigma))
        # 0.05 pixels leave an image as it was
        sigma = mask_tensor(images.new_empty(count).uniform_(0, max_sigma), p=self.p).clamp_min(0.05)
        offset = torch.arange(-radius, radius + 1, device=images.device)
        kernel = torch.exp(-(offset**2) / (2 * sigma[:, None] ** 2))
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]  # (B * C, 1, 2r + 1)
        images = F.pad(images, (radius,) * 4, mode="reflect").view(1, count * channels, 2 * radius + height, -1)
        for one_direction in (kernel[:, :, None], kernel[..., None]):  # along rows, then along columns
            images = F.conv2d(images, one_direction.to(images.dtype), groups=count * channels)
        return type(x)(images.view(count, channels, height, width))


class Noise(Transform):
    """Adds Gaussian noise to a batch of training images, of its own strength for each; torchvision has one for all."""

    order = Blur.order
    split_idx = 0

    def __init__(
        self,
        max_std: float,  # standard deviation, if white is 1
        p: float = 0.5,  # probability that an image gets noise
    ):
        self.max_std, self.p = max_std, p

    def encodes(self, x: TensorImage):
        std = mask_tensor(x.new_empty(len(x)).uniform_(0, self.max_std), p=self.p)[:, None, None, None]
        return (x + std * torch.randn_like(x)).clamp(0, 1)


def augmentation_values(name: str) -> dict[str, float]:
    """Return the values of an augmentation as `model.json` records them; `none` has none."""
    return dict(AUGMENT[name]) if name != "none" else {}


def build_augmentation(name: str) -> list[Transform]:
    """Build the batch transforms of an augmentation: `strong`, `light` or `none`."""
    values = augmentation_values(name)
    if not values:
        return []
    affine = [Stretch(values["max_stretch"], values["p_affine"])] if values["max_stretch"] > 1 else []
    quality = [
        transform(values[largest], values["p_quality"])
        for transform, largest in ((Blur, "max_blur"), (Noise, "max_noise"))
        if values[largest] > 0
    ]
    fastai_values = {key: values[key] for key in FASTAI_VALUES}
    moving, *lighting = aug_transforms(do_flip=False, max_warp=0.0, **fastai_values, xtra_tfms=affine)
    return [Affine(moving), *lighting, *quality]
