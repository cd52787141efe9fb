"""Builds torchvision's networks as backbone and head, and splits them into parameter groups (`config.ARCHITECTURES`).

Plain torch: training gives these parts to fastai's `vision_learner`, prediction takes `build_network` and no fastai.
Everything that a pickled learner refers to is a function of this module, so that `learner.pkl` holds names
and no bytecode.
"""

from itertools import chain
from typing import Any

import torch
import torchvision
from torch import nn

from xray_fastai.config.choices import ARCHITECTURES, TIMM
from xray_fastai.model.timm_networks import TimmBackbone, bare, build_timm, layout_of, shapes_of


def build_whole(arch: str) -> nn.Module:
    """Build torchvision's network with its own classifier, or timm's without, and random weights."""
    return bare(arch) if arch.startswith(TIMM) else torchvision.models.get_model(arch, weights=None)


class Parallel(nn.ModuleList):
    """Gives images (B, 3, S, S) to the backbones of all members, and joins their maps: (B, members * F, h, w)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([member(images) for member in self], dim=1)


def build_backbone(
    arch: str, weights: dict[str, torch.Tensor] | None = None, size: int | None = None, members: int = 1, **_
) -> nn.Sequential:
    """Build a network up to its last convolutional block, with a pooling layer behind it, where fastai cuts it off.

    Args:
        arch: a name in `ARCHITECTURES`, or timm/NAME.
        weights: all tensors of the backbone under torchvision's names (`pretrained.pretrained_state`); those of the
            classifier are ignored. None leaves random weights.
        size: side of the images, which timm's networks need.
        members: of an ensemble; each gets `weights`, or random weights of its own.
        **_: what fastai's `vision_learner` passes to every architecture.

    Raises:
        UserError: timm is not installed, does not know the network, or it does not take images of this size.
    """
    if members > 1:
        backbones = Parallel(build_backbone(arch, weights, size)[:-1] for _ in range(members))
        return nn.Sequential(backbones, nn.AdaptiveAvgPool2d(1))
    if arch.startswith(TIMM):
        return nn.Sequential(build_timm(arch, size, weights), nn.AdaptiveAvgPool2d(1))
    network = build_whole(arch)
    if weights is not None:
        network.load_state_dict(network.state_dict() | weights)
    if not hasattr(network, "features"):  # a resnet: all but its pooling and classifier
        layers = list(network.children())[:-2]
    else:
        layers = [network.features]
        if isinstance(network, torchvision.models.DenseNet):
            layers.append(nn.ReLU(inplace=True))  # torchvision applies it in forward(), outside of any module
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))


def features_of(arch: str, size: int | None = None, members: int = 1) -> int:
    """Return the channels of a backbone's last feature maps; those of all members of an ensemble."""
    return members * (layout_of(arch, size).features if arch.startswith(TIMM) else ARCHITECTURES[arch].features)


def build_head(features: int, classes: int, dropout: float) -> nn.Sequential:
    """Build pooling, dropout and one linear layer: (B, features, h, w) -> (B, classes)."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),  # (B, features, 1, 1)
        nn.Flatten(),  # (B, features)
        nn.Dropout(dropout),
        nn.Linear(features, classes),  # (B, classes)
    )


def build_network(arch: str, classes: int, dropout: float, size: int | None = None, members: int = 1) -> nn.Sequential:
    """Build backbone and head, as `vision_learner` joins them: (B, 3, S, S) -> (B, classes).

    The weights are random, or on the device "meta" none. Those of an ensemble are joined by `ensemble.join`.
    """
    # without the layer that tells fastai where to cut
    backbone = build_backbone(arch, size=size, members=members)[:-1]
    return nn.Sequential(backbone, build_head(features_of(arch, size, members), classes, dropout))


def described(arch: str, size: int) -> dict[str, Any] | None:
    """Return what `model.json` holds of a backbone that `export/backbones.json` does not list; None for the others."""
    if not arch.startswith(TIMM):
        return None
    return {"features": features_of(arch, size), "tensors": shapes_of(arch, size)}


def on_start(arch: str) -> torch.device:
    """Return the device to build a network on whose weights are loaded next.

    "meta" takes no memory and makes no random weights: ResNet50 loads in 0.2 s instead of 0.3 s. Some of timm's
    networks hold tensors that are computed when they are built, and are not among the weights.
    """
    return torch.device("cpu" if arch.startswith(TIMM) else "meta")


def backbones_of(network: nn.Sequential) -> list[nn.Sequential]:
    """Return the backbones of an ensemble's members; of another network its own alone."""
    backbone = network[0]
    first = next(backbone.children(), None)
    return list(first) if isinstance(first, Parallel) else [backbone]


def split_parameters(model: nn.Sequential, arch: str) -> list[list[nn.Parameter]]:
    """Split backbone and head into three parameter groups: early layers (of all members), late layers, head."""
    early, late = zip(*(_halves(backbone, arch) for backbone in backbones_of(model)), strict=True)
    return [list(chain(*early)), list(chain(*late)), list(model[1].parameters())]


def _halves(backbone: nn.Sequential, arch: str) -> list[list[nn.Parameter]]:
    if isinstance(backbone[0], TimmBackbone):
        return backbone[0].split()
    layers = backbone[0] if isinstance(backbone[0], nn.Sequential) else backbone  # a resnet has no `features`
    early = ARCHITECTURES[arch].early_layers
    return [list(part.parameters()) for part in (layers[:early], layers[early:])]
