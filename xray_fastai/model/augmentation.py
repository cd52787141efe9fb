"""How training images are varied: fastai's transforms, and three that it lacks."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from fastai.vision.all import AffineCoordTfm, TensorImage, Transform, affine_mat, aug_transforms, mask_tensor


def stretch_matrix(images: torch.Tensor, most: float, p: float) -> torch.Tensor:
    """Matrices (B, 3, 3) that make an image (B, C, H, W) up to `most` times wider for its height, or narrower, with
    probability `p`; its area stays. fastai's `RandomResizedCropGPU` does so to all images of a batch alike."""
    ratio = mask_tensor(images.new_empty(len(images)).uniform_(-np.log(most), np.log(most)), p=p).exp()
    width, none = ratio.rsqrt(), torch.zeros_like(ratio)
    return affine_mat(width, none, none, none, 1 / width, none)


class Stretch(AffineCoordTfm):
    """Make images wider or narrower for their height.

    The network gets squares, so an image of another shape is squeezed into one, and how much tells of how it was taken.
    """

    def __init__(
        self,
        most: float,  # the ratio of width to height at the most; at the least, 1 / `most`
        p: float = 0.75,  # the probability that an image is stretched
    ):
        super().__init__(partial(stretch_matrix, most=most, p=p), align_corners=True)


class Blur(Transform):
    """Blur images of a training batch by a Gaussian, each by its own; torchvision's `GaussianBlur` takes all alike.

    How sharp an image is tells more of the machine, the patient's breath and the JPEG quality than of the disease.
    """

    order = 40  # as fastai's changes of brightness and contrast: after what moves pixels
    split_idx = 0

    def __init__(
        self,
        most: float,  # the standard deviation at the most, in sides of the image
        p: float = 0.5,  # the probability that an image is blurred
    ):
        self.most, self.p = most, p

    def encodes(self, x: TensorImage):
        images = x.as_subclass(torch.Tensor)  # (B, C, H, W)
        count, channels, height, width = images.shape
        most = self.most * max(height, width)  # pixels
        radius = int(np.ceil(3 * most))
        sigma = mask_tensor(images.new_empty(count).uniform_(0, most), p=self.p).clamp_min(0.05)  # 0.05: as it was
        away = torch.arange(-radius, radius + 1, device=images.device)
        kernel = torch.exp(-(away**2) / (2 * sigma[:, None] ** 2))
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]  # (B * C, 1, 2r + 1)
        images = F.pad(images, (radius,) * 4, mode="reflect").view(1, count * channels, 2 * radius + height, -1)
        for each in (kernel[:, :, None], kernel[..., None]):  # along rows, then along columns
            images = F.conv2d(images, each.to(images.dtype), groups=count * channels)
        return type(x)(images.view(count, channels, height, width))


class Noise(Transform):
    "Add Gaussian noise to images of a training batch, each of its own strength; torchvision's takes all alike."

    order = Blur.order
    split_idx = 0

    def __init__(
        self,
        most: float,  # the standard deviation at the most, where white is 1
        p: float = 0.5,  # the probability that an image gets noise
    ):
        self.most, self.p = most, p

    def encodes(self, x: TensorImage):
        strength = mask_tensor(x.new_empty(len(x)).uniform_(0, self.most), p=self.p)[:, None, None, None]
        return (x + strength * torch.randn_like(x)).clamp(0, 1)


AUGMENT: dict[str, dict] = {
    "light": {"max_rotate": 10.0, "max_zoom": 1.15},
    "strong": {"max_rotate": 15.0, "min_zoom": 0.85, "max_zoom": 1.2, "stretch": 1.25, "blur": 1 / 64, "noise": 0.08},
}
"""By option, what training images vary by besides brightness and contrast (README: what stretch, blur and noise won).

No flips: the heart has its side, and on images unlike those trained on they cost 0.03 of AUC (one seed, ResNet18 at
64 px). No warp: with a stretch of up to 1.2, without blur and noise, it did worse on both groups that
`tests/benchmarks/shift.py` takes out."""


def augmenting(stretch: float = 1.0, blur: float = 0.0, noise: float = 0.0, **others) -> list[Transform]:
    """fastai's `aug_transforms` without flips and warp, with `Stretch`, `Blur` and `Noise` of at most what is given."""
    moved = [Stretch(stretch)] if stretch > 1 else []
    worse = [kind(most) for kind, most in ((Blur, blur), (Noise, noise)) if most]
    return [*aug_transforms(do_flip=False, max_warp=0.0, **others, xtra_tfms=moved), *worse]
