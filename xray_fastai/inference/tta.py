"""Test-time augmentation: the logits of an image are the mean over views of it, each turned or scaled a little."""

import math
import time
from collections.abc import Callable

import torch
from torch.nn.functional import affine_grid, grid_sample

VIEWS = ((0, 1.0), (5, 1.05), (-5, 1.05), (0, 1.1), (0, 0.95))
"""Degrees, and how much larger. Of what training varies images by, about a third."""


def view(images: torch.Tensor, degrees: float, zoom: float) -> torch.Tensor:
    """Eight-bit images (B, 1, S, S), turned about their centre and scaled; what lies outside is mirrored."""
    cosine, sine = (f(math.radians(degrees)) / zoom for f in (math.cos, math.sin))
    matrix = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]], device=images.device)
    grid = affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    seen = grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    return seen.round().to(torch.uint8)


class Views:
    """The mean of a network's outputs over `VIEWS`; as text, what that costs."""

    def __init__(self):
        self.one = self.all = 0.0  # seconds in the network: the image as it is, and all views

    def mean(self, outputs: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        """Of eight-bit images (B, 1, S, S); `outputs` gives logits (B, classes), on the CPU."""
        if not self.all:
            outputs(images[:1])  # what a first time costs is not the price
        start = time.perf_counter()
        total = outputs(images)
        self.one += time.perf_counter() - start
        for degrees, zoom in VIEWS[1:]:
            total = total + outputs(view(images, degrees, zoom))
        self.all += time.perf_counter() - start
        return total / len(VIEWS)

    def __str__(self) -> str:
        price = f"{self.all:.1f} s instead of {self.one:.1f} s in the network" if self.all else "nothing predicted"
        return f"mean of {len(VIEWS)} views an image; {price}"
