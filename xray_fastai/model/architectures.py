"""Builds torchvision's networks as backbone and head, and splits them into parameter groups (`config.ARCHITECTURES`).

Plain torch: training gives these parts to fastai's `vision_learner`, prediction takes `build_network` and no fastai.
Everything that a pickled learner refers to is a function of this module, so that `learner.pkl` holds names
and no bytecode.
"""

import torch
import torchvision
from torch import nn

from xray_fastai.config.choices import ARCHITECTURES


def build_whole(arch: str) -> nn.Module:
    """Build torchvision's network, with its own classifier and random weights."""
    return torchvision.models.get_model(arch, weights=None)


def build_backbone(arch: str, weights: dict[str, torch.Tensor] | None = None, **_) -> nn.Sequential:
    """Build a network up to its last convolutional block, with a pooling layer behind it, where fastai cuts it off.

    Args:
        arch: a name in `ARCHITECTURES`.
        weights: all tensors of the backbone under torchvision's names (`pretrained.pretrained_state`); those of the
            classifier are ignored. None leaves random weights.
        **_: what fastai's `vision_learner` passes to every architecture.
    """
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


def build_head(arch: str, classes: int, dropout: float) -> nn.Sequential:
    """Build pooling, dropout and one linear layer: (B, features, h, w) -> (B, classes)."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),  # (B, features, 1, 1)
        nn.Flatten(),  # (B, features)
        nn.Dropout(dropout),
        nn.Linear(ARCHITECTURES[arch].features, classes),  # (B, classes)
    )


def build_network(arch: str, classes: int, dropout: float) -> nn.Sequential:
    """Build backbone and head, as `vision_learner` joins them: (B, 3, S, S) -> (B, classes).

    The weights are random, or on the device "meta" none.
    """
    backbone = build_backbone(arch)[:-1]  # without the layer that tells fastai where to cut
    return nn.Sequential(backbone, build_head(arch, classes, dropout))


def split_parameters(model: nn.Sequential, arch: str) -> list[list[nn.Parameter]]:
    """Split backbone and head into three parameter groups: early layers, late layers, head."""
    backbone, head = model
    layers = backbone[0] if isinstance(backbone[0], nn.Sequential) else backbone  # a resnet has no `features`
    early = ARCHITECTURES[arch].early_layers
    return [list(part.parameters()) for part in (layers[:early], layers[early:], head)]
