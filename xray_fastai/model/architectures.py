"""How each of torchvision's networks is taken apart: its features, its classifier, its earlier and later layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """How one of torchvision's networks is taken apart."""

    features: int  # channels that leave the last convolutional block
    classifier: str  # the name its classifier's tensors begin with
    layers: Callable[[nn.Module], Sequence[nn.Module]]  # network -> what comes before the pooling
    early: Callable[[nn.Sequential], tuple[nn.Module, nn.Module]]  # body -> its earlier and later part


def _resnet(features: int) -> Architecture:
    # stem, layer1, layer2 | layer3, layer4: fastai's own split of a resnet
    return Architecture(features, "fc", lambda net: list(net.children())[:-2], lambda body: (body[:6], body[6:]))


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": _resnet(512),
    "resnet34": _resnet(512),
    "resnet50": _resnet(2048),
    "resnet101": _resnet(2048),
    # torchvision applies this ReLU in forward(), outside of any module
    "densenet121": Architecture(
        1024,
        "classifier",
        lambda net: [net.features, nn.ReLU(inplace=True)],
        lambda body: (body[0][:7], body[0][7:]),
    ),
    "convnext_tiny": Architecture(
        768, "classifier", lambda net: [net.features], lambda body: (body[0][:4], body[0][4:])
    ),
    "efficientnet_b0": Architecture(
        1280, "classifier", lambda net: [net.features], lambda body: (body[0][:5], body[0][5:])
    ),
}
