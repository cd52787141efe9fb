"""Test-time augmentation: the logits of an image are the mean over views of it, each rotated or scaled a little."""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import affine_grid, grid_sample

VIEWS = ((0, 1.0), (5, 1.05), (-5, 1.05), (0, 1.1), (0, 0.95))
"""Rotation in degrees, and zoom, of each view; the first is the unchanged image. The range is about a third of the
training augmentation's."""


def view(images: torch.Tensor, degrees: float, zoom: float) -> torch.Tensor:
    """Rotate 8-bit images (B, 1, S, S) about their centre and scale them; what lies outside is mirrored."""
    cosine, sine = (f(math.radians(degrees)) / zoom for f in (math.cos, math.sin))
    matrix = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]], device=images.device)
    grid = affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    moved = grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    return moved.round().to(torch.uint8)


def mean_over_views(
    outputs: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, unchanged: torch.Tensor | None = None
) -> torch.Tensor:
    """Average a network's outputs over `VIEWS`.

    Args:
        outputs: gives the logits (B, classes) of 8-bit images, on the CPU.
        images: (B, 1, S, S), 8-bit.
        unchanged: their outputs; None computes them.
    """
    total = outputs(images) if unchanged is None else unchanged
    for degrees, zoom in VIEWS[1:]:
        total = total + outputs(view(images, degrees, zoom))
    return total / len(VIEWS)


def describe(seconds: float) -> str:
    """Return the line that says what test-time augmentation did and took."""
    return f"mean of {len(VIEWS)} views an image; {seconds:.1f} s, {len(VIEWS)} passes through the network instead of 1"
