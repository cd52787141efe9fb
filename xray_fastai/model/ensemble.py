"""Joins the networks of an ensemble to one network, whose outputs are the mean of theirs, and splits it again.

So all that takes a backbone and a head takes an ensemble: export, fused inference, ONNX, fastai's `Learner`. The names
of the joined network's tensors are `0.0.K.*` for the backbone of member K, and `1.3.*` for the head of all.
"""

from collections.abc import Sequence

import torch
from torch import nn

from xray_fastai.model.architectures import Parallel, backbones_of, build_head


def join(networks: Sequence[nn.Sequential], dropout: float) -> nn.Sequential:
    """Join networks to one that gives the mean of their outputs: (B, 3, S, S) -> (B, classes).

    Its last layer has their weights beside each other, divided by their number, and the mean of their biases. The mean
    is exact but for rounding, because each output is a sum over the features.

    Args:
        networks: two or more of one architecture, as `build_network` gives them for one member. Their backbones become
            parts of the result, which are not copied.
        dropout: probability before the last layer.
    """
    layers = [network[1][-1] for network in networks]
    weights = torch.cat([layer.weight.detach() for layer in layers], dim=1) / len(layers)  # (classes, members * F)
    bias = torch.stack([layer.bias.detach() for layer in layers]).mean(dim=0)  # (classes,)
    backbone = nn.Sequential(Parallel(network[0] for network in networks))
    return nn.Sequential(backbone, _head(weights, bias, dropout)).train(networks[0].training)


def split(network: nn.Sequential, members: int) -> list[nn.Sequential]:
    """Return the networks that `join` joined, each of which maps (B, 3, S, S) to its own outputs (B, classes).

    Their outputs have the mean that `network` gives. Each gets the mean of their biases: no more is left of these. The
    backbones are parts of `network`, which are not copied.

    Args:
        network: joined from `members` networks; for one member it is returned in a list.
        members: how many.
    """
    if members == 1:
        return [network]
    backbones, (*_, dropout, layer) = backbones_of(network), network[1]
    weights = (members * layer.weight.detach()).chunk(members, dim=1)  # (classes, F) each
    return [
        nn.Sequential(backbone, _head(weight, layer.bias.detach(), dropout.p)).train(network.training)
        for backbone, weight in zip(backbones, weights, strict=True)
    ]


def _head(weight: torch.Tensor, bias: torch.Tensor, dropout: float) -> nn.Sequential:
    """Build a head with copies of the weights (classes, features) and the bias (classes,) of its last layer."""
    classes, features = weight.shape
    head = build_head(features, classes, dropout).to(weight)
    with torch.no_grad():
        head[-1].weight.copy_(weight)
        head[-1].bias.copy_(bias)
    return head
