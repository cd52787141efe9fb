"""Grad-CAM: shows which parts of an image raise the score of a class (Selvaraju et al. 2017, arXiv:1610.02391).

The layer is the last convolutional block as the head receives it, the output of `model.network[0]`. In the package
pytorch-grad-cam the same target is `layer4` for a resnet, and `features` for convnext_tiny and efficientnet_b0. For
densenet121 it is the output of the ReLU behind `features`. (The batch norm before that ReLU, `features.norm5`, is a
wrong target: the ReLU overwrites its output in place, so activations and gradients would belong to different layers.)
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from xray_fastai.inference.model import Model
from xray_fastai.system.memory import out_of_memory_means
from xray_fastai.system.text import count_of

OPACITY = 0.55
"""Opacity of the colour where a map is 1; where it is 0 the X-ray stays unchanged."""


def grad_cam(model: Model, images: torch.Tensor, targets: Sequence[int] | None = None) -> np.ndarray:
    """Compute where in each image a model sees evidence for a class.

    Gradients are taken through the head only, with respect to the activations. So this needs the memory of a forward
    pass, works with a frozen backbone, and gives no weight a gradient.

    Args:
        model: from `open_model`.
        images: (B, 1, size, size), 8-bit, as `open_image(path, model.size)` gives them.
        targets: the index of a class for each image; None takes the predicted class (`Model.decide`).

    Returns:
        Maps (B, h, w), h = w = size / 32, each scaled from 0 (its minimum) to 1 (its maximum), as pytorch-grad-cam
        does. A map of zeros means that no part of the image raises the score more than another.

    Raises:
        UserError: the images do not fit into the device's memory.
    """
    maps = count_of(len(images), "heat map")
    explain = f'not enough memory on {model.device} for {maps} at once; try device="cpu"'
    with out_of_memory_means(explain):
        return _scaled(_maps(model, images, targets).float().cpu().numpy())


def _maps(model: Model, images: torch.Tensor, targets: Sequence[int] | None) -> torch.Tensor:
    """Return the maps (B, h, w) on the model's device, not scaled."""
    backbone, head = model.network
    stored: list[torch.Tensor] = []
    hook = backbone.register_forward_hook(lambda _module, _inputs, output: stored.append(output))
    try:
        logits = model.logits(images)  # (B, classes)
    finally:
        hook.remove()
    if targets is None:
        targets = model.decide(model.probabilities(logits.numpy()))
    with torch.inference_mode(False):  # its tensors cannot have gradients; copies made outside it can
        activations = stored[0].clone().requires_grad_()  # (B, channels, h, w)
        scores = head(activations).gather(1, torch.as_tensor(targets, device=activations.device)[:, None])
        (gradients,) = torch.autograd.grad(scores.sum(), activations)
    with torch.no_grad():
        weights = gradients.mean((2, 3), keepdim=True)  # (B, channels, 1, 1)
        return (weights * activations).sum(1).relu()  # (B, h, w)


def upsample(cam: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Stretch a map (h, w) over an image.

    The network got the whole image squeezed to a square, so a stretched map fits the image.

    Args:
        cam: from 0 to 1.
        size: width and height of the image, as PIL gives them.

    Returns:
        The map (height, width), interpolated bilinearly and scaled to 0 to 1 again.
    """
    grid = torch.from_numpy(np.ascontiguousarray(cam, dtype=np.float32))[None, None]
    fine = torch.nn.functional.interpolate(grid, size=size[::-1], mode="bilinear", align_corners=False)
    return _scaled(fine[0].numpy())[0]


def overlay(image: Image.Image, cam: np.ndarray) -> Image.Image:
    """Draw a map (h, w) over an image of any size: blue is weak evidence, red is strong. The result is "RGB"."""
    from matplotlib import colormaps  # takes half a second, and most predictions draw nothing

    heat = upsample(cam, image.size)
    alpha = OPACITY * heat[..., None]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    # the ends of the colour map are as dark as an X-ray's background, so they are left out
    colours = 255 * colormaps["turbo"](0.05 + 0.85 * heat)[..., :3]
    return Image.fromarray(np.rint((1 - alpha) * grey + alpha * colours).astype(np.uint8))


def _scaled(maps: np.ndarray) -> np.ndarray:
    """Scale each map (B, h, w) from its minimum and maximum to 0 and 1, as pytorch-grad-cam's `scale_cam_image`."""
    maps = maps - maps.min(axis=(1, 2), keepdims=True)
    return maps / (1e-7 + maps.max(axis=(1, 2), keepdims=True))
