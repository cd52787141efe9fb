"""How training images vary: what another patient, position, camera or exposure would have changed."""

import math

import torch
from fastai.vision.all import RandTransform, TensorImage, Transform, aug_transforms
from torch.nn.functional import conv2d, pad

GEOMETRY: dict[str, dict] = {
    "light": {"max_rotate": 10.0, "max_zoom": 1.15},
    "strong": {"max_rotate": 15.0, "min_zoom": 0.85, "max_zoom": 1.2},
}
"""By option, rotation in degrees and zoom, besides fastai's brightness and contrast. No flips: the heart has its side,
and on images unlike those trained on they cost 0.03 of AUC (one seed, ResNet18 at 64 px)."""


class BlurAndNoise(RandTransform):
    "Each image less sharp, or grainier, by a share of its own: how sharp an image is tells of its camera."

    order, split_idx = 60, 0  # after geometry and lighting, before the normalisation; of training images alone

    def __init__(
        self,
        blur: float = 1.2 / 64,  # the largest standard deviation of the Gaussian, as a share of the image's side
        blurred: float = 0.6,  # the share of images that are blurred
        noise: float = 0.06,  # the largest standard deviation of the noise, where black is 0 and white 1
        noisy: float = 0.5,  # the share of images that get noise
    ):
        super().__init__(p=1.0)
        self.blur, self.blurred, self.noise, self.noisy = blur, blurred, noise, noisy

    def encodes(self, x: TensorImage):
        images = x.as_subclass(torch.Tensor)  # (B, C, S, S)
        count, channels, side, _ = images.shape
        chance = torch.rand(4, count, device=images.device)
        sigma = chance[0] * self.blur * side * (chance[1] < self.blurred) + 1e-3
        reach = min(math.ceil(3 * self.blur * side), side - 1)
        steps = torch.arange(-reach, reach + 1, device=images.device)
        kernels = torch.exp(-(steps**2) / (2 * sigma[:, None] ** 2))  # (B, taps)
        kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0)
        rows = pad(images.reshape(1, count * channels, side, side), (reach,) * 4, mode="reflect")
        rows = conv2d(rows, kernels[:, None, None, :], groups=len(kernels))
        blurred = conv2d(rows, kernels[:, None, :, None], groups=len(kernels)).view_as(images)
        spread = chance[2] * self.noise * (chance[3] < self.noisy)
        noisy = blurred + torch.randn_like(blurred) * spread[:, None, None, None]
        return type(x)(noisy.clamp(0, 1))


def augmentations(name: str) -> list[Transform]:
    """The batch transforms of `--augment` light or strong; none of none."""
    if name == "none":
        return []
    transforms = aug_transforms(do_flip=False, max_warp=0.0, **GEOMETRY[name])
    return [*transforms, BlurAndNoise()] if name == "strong" else transforms
