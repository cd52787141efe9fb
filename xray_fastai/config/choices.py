"""Holds what options may be chosen from: backbones, devices, recipes, sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Describes how `model.architectures` divides one of torchvision's networks."""

    features: int  # channels of the last convolutional block
    classifier: str  # prefix of the classifier's tensors
    early_layers: int  # layers of the backbone that form the first parameter group


ARCHITECTURES: dict[str, Architecture] = {
    # stem, layer1, layer2 | layer3, layer4: fastai's own split of a resnet
    "resnet18": Architecture(512, "fc", early_layers=6),
    "resnet34": Architecture(512, "fc", early_layers=6),
    "resnet50": Architecture(2048, "fc", early_layers=6),
    "resnet101": Architecture(2048, "fc", early_layers=6),
    "densenet121": Architecture(1024, "classifier", early_layers=7),
    "convnext_tiny": Architecture(768, "classifier", early_layers=4),
    "efficientnet_b0": Architecture(1280, "classifier", early_layers=5),
}
"""The backbones, by torchvision's names. To add one, add it to this table."""
TIMM = "timm/"
"""How the names of timm's networks begin here."""
TIMM_PATTERN = r"timm/[a-z0-9_]+(\.[a-z0-9_]+)?"
"""timm's name of a network, and of its weights. It holds no address, so opening an export downloads nothing."""
PUBLISHED_WEIGHTS = ("imagenet", "xrv")
"""The weights that `fit` downloads: torchvision's or timm's, and torchxrayvision's ResNet50."""
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
INFERENCE_PRECISIONS = ("auto", "fp32", "bf16")
CONTRASTS = ("equalize", "none")
AUGMENTATIONS = ("strong", "light", "none")
SCHEDULES = ("adaptive", "constant")
TOOLS = ("tensorboard", "mlflow", "wandb")
"""The tools that can record a fit; each is the name of its package, and of an extra."""
FIND = "find"
"""The value of `lr` that searches the learning rate of each phase."""
CALIBRATIONS = ("cautious", "validation", "none")
RECIPES: dict[str, dict[str, str]] = {
    "default": {
        "contrast": "equalize",
        "augment": "strong",
        "schedule": "adaptive",
        "class_weights": "balanced",
    },
    "plain": {"contrast": "none", "augment": "none", "schedule": "constant", "class_weights": "3:1"},
}
"""The values that a recipe gives to options that the user left out. `plain` is the earlier work that this project
follows: ResNet50, Adam at a constant 2e-3, batch size 80, class weights 3:1 for 1341 normal and 3875 pneumonia images
(the class to detect has 1), frozen and then unfrozen."""
MIN_SIZE, MAX_SIZE = 32, 4096
"""Limits of the side, in pixels, of a network's input."""
MAX_MEMBERS = 20
"""The largest number of networks in one export."""


def members_of(record: Mapping[str, Any]) -> int:
    """Return how many networks a model has whose outputs are averaged: 1, or those of an ensemble.

    Args:
        record: the content of `model.json`, or what else has its keys; that of an earlier version lacks `members`.
    """
    return record.get("members") or 1


def network_of(record: Mapping[str, Any]) -> str:
    """Return the name of a model's network for people, such as resnet18, or 3 x resnet18 of an ensemble.

    Args:
        record: see `members_of`.
    """
    members = members_of(record)
    return record["architecture"] if members == 1 else f"{members} x {record['architecture']}"
