"""Grad-CAM: which places of an image speak for a class (Selvaraju et al. 2017, arXiv:1610.02391).

The layer is the last convolutional block as the head receives it, the output of `learn.model[0]`: for a resnet what
users of the package pytorch-grad-cam target as `layer4`, for convnext_tiny and efficientnet_b0 `features`. For
densenet121 it is what leaves the ReLU behind `features`. (Its batch norm before that, `features.norm5`, is no good
target: the ReLU overwrites what it gave in place, so activations and gradients would be of two different layers.)
"""

from collections.abc import Sequence

import numpy as np
import torch
from fastai.callback.hook import hook_output
from PIL import Image

from xray_fastai.inference.model import Model

OPACITY = 0.55
"""Of the colour where a map is 1. Where it is 0 the X-ray is seen as it is."""


def grad_cam(model: Model, images: torch.Tensor, targets: Sequence[int] | None = None) -> np.ndarray:
    """Where a model sees evidence for a class.

    Needs memory for a forward pass only: gradients are taken with respect to the activations, through the head, so
    that a frozen backbone is no obstacle and no weight receives a gradient.

    Args:
        model: from `open_model`.
        images: (B, 1, size, size) of eight bits, as `open_image(path, model.size)` gives them.
        targets: the index of a class for each image; None takes the class that the model calls (`Model.decide`).

    Returns:
        Maps (B, h, w), h = w = size / 32, each scaled so that its least value is 0 and its largest 1, as
        pytorch-grad-cam does. A map of zeros: no place speaks for the class more than another.
    """
    body, head = model.learn.model[0], model.learn.model[1]
    with hook_output(body) as hook:
        logits = model.logits(images)  # (B, classes)
    if targets is None:
        targets = model.decide(model.probabilities(logits.numpy()))
    with torch.inference_mode(False):  # its tensors can't have gradients, copies made outside of it can
        activations = hook.stored.as_subclass(torch.Tensor).clone().requires_grad_()  # (B, channels, h, w)
        scores = head(activations).gather(1, torch.as_tensor(targets, device=activations.device)[:, None])
        (gradients,) = torch.autograd.grad(scores.sum(), activations)
    with torch.no_grad():
        weights = gradients.mean((2, 3), keepdim=True)  # (B, channels, 1, 1)
        maps = (weights * activations).sum(1).relu()  # (B, h, w)
    return _scaled(maps.float().cpu().numpy())


def upsample(cam: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (h, w) stretched over an image.

    The network saw the whole image squeezed to a square, so a map that is stretched back lies where it belongs.

    Args:
        cam: from 0 to 1.
        size: width and height of the image, as PIL gives them.

    Returns:
        (height, width), bilinear, scaled again to reach from 0 to 1.
    """
    grid = torch.from_numpy(np.ascontiguousarray(cam, dtype=np.float32))[None, None]
    fine = torch.nn.functional.interpolate(grid, size=size[::-1], mode="bilinear", align_corners=False)
    return _scaled(fine[0].numpy())[0]


def overlay(image: Image.Image, cam: np.ndarray) -> Image.Image:
    """An image, of any size and aspect ratio, with its map (h, w) in colour: blue little, red most. Mode "RGB"."""
    from matplotlib import colormaps

    heat = upsample(cam, image.size)
    alpha = OPACITY * heat[..., None]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    colours = 255 * colormaps["turbo"](0.05 + 0.85 * heat)[..., :3]  # its ends are as dark as an X-ray's background
    return Image.fromarray(np.rint((1 - alpha) * grey + alpha * colours).astype(np.uint8))


def _scaled(maps: np.ndarray) -> np.ndarray:
    """Maps (B, h, w), each from its least to its largest value as 0 to 1, by pytorch-grad-cam's `scale_cam_image`."""
    maps = maps - maps.min(axis=(1, 2), keepdims=True)
    return maps / (1e-7 + maps.max(axis=(1, 2), keepdims=True))
