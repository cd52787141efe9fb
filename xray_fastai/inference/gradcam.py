"""Grad-CAM: shows which parts of an image raise the score of a class (Selvaraju et al. 2017, arXiv:1610.02391).

It is usual to take the last block, which has 2 x 2 cells at 64 pixels and 7 x 7 at 224. At 64 pixels it met the
opacities of drawn X-rays no more often than chance: in 0.13 of the images. So the layer is an earlier one, the last
with up to `FINER` times as many cells a side: 8 x 8 at 64 pixels, 28 x 28 at 224. It met 0.69 and 0.78 with two
networks, at twice the cost, on the whole the best of 16 ways (`tests/benchmarks/heatmaps.py`). The score is the
log-odds of the class.

In an ensemble each member is mapped at this layer, and their evidence for the mean of the outputs is added up.

A map reaches the probability of its class. (Scaled to its own maximum, as pytorch-grad-cam does, a map of weak evidence
is as red as one of strong evidence.)
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from xray_fastai.inference.model import Model, full_precision
from xray_fastai.model.architectures import backbones_of
from xray_fastai.system.memory import out_of_memory_means
from xray_fastai.system.text import count_of

FINER = 4
"""Cells a side of the layer that is mapped, at most, over those of the last block."""
OPACITY = 0.55
"""Opacity of the colour where a map is 1; where it is 0 the X-ray stays unchanged."""
_CHUNK = 8
"""Images whose gradients are computed at once: a backward pass of more would need more memory than their prediction."""


def grad_cam(model: Model, images: torch.Tensor, targets: Sequence[int] | None = None) -> np.ndarray:
    """Compute where in each image a model sees evidence for a class.

    Gradients are taken from the mapped layer on, with respect to its activations. So this works with a frozen backbone,
    and gives no weight a gradient.

    Args:
        model: from `open_model`.
        images: (B, 1, size, size), 8-bit, as `open_image(path, model.size)` gives them.
        targets: the index of a class for each image; None takes the predicted class (`Model.decide`).

    Returns:
        Maps (B, h, w) from 0 to the probability of each image's class. A map of zeros means that no part of the image
        raises the score.

    Raises:
        UserError: the images do not fit into the device's memory.
    """
    maps = count_of(len(images), "heat map")
    explain = f'not enough memory on {model.device} for {maps} at once; try device="cpu"'
    with out_of_memory_means(explain):
        return _maps(model, images, targets)


def mapped_classes(model: Model, called: int) -> list[int]:
    """Return the classes to map for an image: the one that is called, and behind it the one to detect if it is another.

    An image that is called NORMAL then shows what speaks for PNEUMONIA, too.
    """
    positive = None if model.positive is None else model.classes.index(model.positive)
    return [called] if positive in (None, called) else [called, positive]


def describe(cam: np.ndarray) -> str:
    """Return in words what a map (h, w) is and how coarse, for the edge of a picture."""
    height, width = cam.shape
    return f"Grad-CAM, {height} x {width} cells; no colour is 0, red 1: the strongest cell has the class's probability"


def _maps(model: Model, images: torch.Tensor, targets: Sequence[int] | None) -> np.ndarray:
    members = [_Mapped(backbone) for backbone in backbones_of(model.network)]
    try:
        logits = model.logits(images)  # (B, classes)
    finally:
        for member in members:
            member.remove_hooks()
    probabilities = model.probabilities(logits.numpy())
    chosen = np.asarray(model.decide(probabilities) if targets is None else targets)  # (B,)
    outputs, rests = zip(*(member.layer() for member in members), strict=True)
    parts = []
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        parts.append(_evidence(rests, model.network[1], [output[part] for output in outputs], chosen[part]))
    return probabilities[np.arange(len(chosen)), chosen][:, None, None] * _scaled(np.concatenate(parts))


class _Mapped:
    """Keeps, during a forward pass, the output of the layer of a backbone that is mapped."""

    def __init__(self, backbone: nn.Module):
        self.layers = _layers(backbone)
        # by cells a side: the last layer with so many, and its output
        self.last: dict[int, tuple[int, torch.Tensor]] = {}
        self.hooks = [
            layer.register_forward_hook(lambda _module, _inputs, output, number=number: self._keep(number, output))
            for number, layer in enumerate(self.layers)
        ]

    def _keep(self, number: int, output: torch.Tensor) -> None:
        self.last[output.shape[-1]] = number, output
        for side in [side for side in self.last if side > FINER * output.shape[-1]]:
            del self.last[side]

    def remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def layer(self) -> tuple[torch.Tensor, nn.Module]:
        """Return the layer's output (B, channels, h, w), and the rest of the backbone."""
        number, output = self.last[max(self.last)]
        return output, nn.Sequential(*self.layers[number + 1 :])


def _layers(backbone: nn.Module) -> list[nn.Module]:
    """Return the layers of a backbone in order: those of its `features`, if it has them, and what follows."""
    if not isinstance(backbone, nn.Sequential):
        return [backbone]
    first, *others = backbone
    return [*(first if isinstance(first, nn.Sequential) else [first]), *others]


def _evidence(
    rests: Sequence[nn.Module], head: nn.Module, outputs: Sequence[torch.Tensor], targets: np.ndarray
) -> np.ndarray:
    """Return how much the cells of a layer raise the log-odds of a class, (B, h, w).

    Args:
        rests: by member, its backbone behind the layer.
        head: the network's.
        outputs: by member, the layer's output (B, channels, h, w).
        targets: (B,), indices of classes.
    """
    with torch.inference_mode(False), full_precision():  # inference mode's tensors cannot have gradients
        activations = [output.clone().requires_grad_() for output in outputs]
        maps = [rest(output) for rest, output in zip(rests, activations, strict=True)]  # (B, F, h, w) each
        logits = head(torch.cat(maps, dim=1))  # (B, classes)
        target = torch.as_tensor(targets, device=logits.device)[:, None]
        others = logits.scatter(1, target, -torch.inf).logsumexp(1)
        log_odds = logits.gather(1, target)[:, 0] - others
        gradients = torch.autograd.grad(log_odds.sum(), activations)
    with torch.no_grad():
        weights = [gradient.mean((2, 3), keepdim=True) for gradient in gradients]  # (B, channels, 1, 1) each
        evidence = [(weight * output).sum(1) for weight, output in zip(weights, activations, strict=True)]
        return sum(evidence).relu().float().cpu().numpy()


def upsample(cam: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Stretch a map (h, w) over an image.

    The network got the whole image squeezed to a square, so a stretched map fits the image.

    Args:
        cam: from 0 to 1.
        size: width and height of the image, as PIL gives them.

    Returns:
        The map (height, width), interpolated bilinearly.
    """
    grid = torch.from_numpy(np.ascontiguousarray(cam, dtype=np.float32))[None, None]
    fine = torch.nn.functional.interpolate(grid, size=size[::-1], mode="bilinear", align_corners=False)
    return fine[0, 0].numpy()


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
    """Divide each map (B, h, w) by its maximum; a map of zeros stays."""
    highest = maps.max(axis=(1, 2), keepdims=True)
    return np.divide(maps, highest, out=np.zeros_like(maps), where=highest > 0)
