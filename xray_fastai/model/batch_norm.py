"""Adapts batch norm to images without labels: its statistics become a blend of the trained and the local ones.

Images that were taken elsewhere have other means and variances in each layer than the training images, and batch norm
still subtracts and divides by those of training (Schneider et al., Improving robustness against common corruptions by
covariate shift adaptation, NeurIPS 2020).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def layers_of(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Return the batch norm layers of a network; ConvNeXt has none."""
    return [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]


@contextmanager
def adapting(network: nn.Module, share: float) -> Iterator[None]:
    """Adapt the statistics of batch norm to all images that go through a network in evaluation mode.

    Each statistic is `share` of that of the images so far and 1 - `share` of the trained one. Each layer is adapted
    before its output is computed, so the next layer sees what it will see in use. Nothing is random: the same images in
    the same batches give the same statistics. The first batch alone decides how it is normalised itself, so it should
    have some tens of images.

    Args:
        network: changed in place. Its weights stay as they are.
        share: from 0, which changes nothing, to 1, which leaves nothing of the trained statistics.
    """
    hooks = [layer.register_forward_pre_hook(_Blend(layer, share)) for layer in layers_of(network)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Blend:
    """Sums what goes into one layer, and writes the blend into the layer before each forward pass."""

    def __init__(self, layer: nn.BatchNorm2d, share: float):
        self.share = share
        self.trained = layer.running_mean.cpu().double(), layer.running_var.cpu().double()  # (C,) each
        self.values = 0  # how many of each channel
        self.sums = torch.zeros_like(self.trained[0]), torch.zeros_like(self.trained[0])  # of values, of squares

    def __call__(self, layer: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0]  # (B, C, H, W)
        variance, mean = (part.cpu().double() for part in torch.var_mean(x, dim=(0, 2, 3), correction=0))
        values = x.numel() // x.shape[1]
        self.values += values
        self.sums[0].add_(values * mean)
        self.sums[1].add_(values * (variance + mean**2))
        mean = self.sums[0] / self.values
        variance = (self.sums[1] - self.values * mean**2) / max(1, self.values - 1)  # unbiased, as torch's
        layer.running_mean.copy_(torch.lerp(self.trained[0], mean, self.share))
        layer.running_var.copy_(torch.lerp(self.trained[1], variance, self.share))
