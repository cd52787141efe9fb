"""Backbone, dropout + linear head, weighted loss: the fastai `Learner`."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from fastai.vision.all import (
    CrossEntropyLossFlat,
    DataLoaders,
    Learner,
    RocAuc,
    RocAucBinary,
    accuracy,
    vision_learner,
)
from torch import nn

from xray_fastai.config import FitConfig
from xray_fastai.model.architectures import build_backbone, build_head, split_parameters
from xray_fastai.model.optimizer import FusedAdam


class CalibratedCrossEntropy(CrossEntropyLossFlat):
    "fastai's cross-entropy, whose probabilities are softmax(logits / temperature); the loss itself is not scaled."

    temperature = 1.0

    def activation(self, x):
        return super().activation(x / self.temperature)

    def total_weight(self, targets: torch.Tensor) -> torch.Tensor:
        "What the loss of a batch divides by: the sum of its images' weights."
        weight = self.func.weight
        return targets.new_tensor(len(targets), dtype=torch.float32) if weight is None else weight[targets.long()].sum()


def settle_batch_norm(model: nn.Module, steps: int) -> None:
    """Have batch norm's running statistics follow within half an epoch.

    torch's momentum of 0.1 looks back some ten steps. Where an epoch has fewer, and the weights move fast, validation
    judges a network by the statistics of one that is long gone: of 12 epochs of 5 steps (ResNet50, 64 px, from scratch)
    the validation losses were 0.7 to 29, that of the first, a coin flip, the lowest; so they are 0.5 to 119, and the
    ninth is the lowest, with AUC 0.87.

    Args:
        model: changed in place.
        steps: optimiser steps an epoch.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = max(module.momentum, min(0.5, 2 / steps))


def set_temperature(learn: Learner, temperature: float) -> None:
    """Have `learn.predict` and `learn.get_preds` give calibrated probabilities."""
    learn.loss_func.temperature = temperature


def build_learner(
    dls: DataLoaders,
    arch: str,
    *,
    dropout: float = FitConfig.dropout,
    class_weights: Sequence[float] | None = None,
    pretrained: tuple[dict[str, torch.Tensor], str] | None = None,
) -> Learner:
    """A `vision_learner` of torchvision's `arch` with the head pooling, dropout, linear.

    Args:
        dls: its vocabulary gives the classes.
        arch: a name in `ARCHITECTURES`.
        dropout: before the linear layer.
        class_weights: of the cross-entropy, in the order of the classes; None weighs all alike.
        pretrained: tensors under torchvision's names, and their origin (`weights.pretrained_state`); None is random.

    Returns:
        A learner with three parameter groups (earlier layers, later layers, head), nothing frozen. The network maps
        (B, 3, H, W) to logits (B, classes).

    Raises:
        UserError: the tensors are not those of `arch`.
    """
    classes = len(dls.vocab)
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32, device=dls.device)
    learn = vision_learner(
        dls,
        partial(build_backbone, arch, pretrained),
        normalize=False,  # the `DataBlock` does it
        pretrained=False,  # `build_backbone` loads the weights
        custom_head=build_head(arch, classes, dropout),
        splitter=partial(split_parameters, arch=arch),
        loss_func=CalibratedCrossEntropy(weight=weight),
        opt_func=FusedAdam,
        metrics=[accuracy, RocAucBinary() if classes == 2 else RocAuc()],
        train_bn=False,
    )
    learn.arch = arch  # in place of the partial, which holds the pretrained tensors
    return learn


def parameter_counts(learn: Learner) -> tuple[int, int]:
    """All parameters, and those that train as the learner is frozen now."""
    sizes = [(p.numel(), p.requires_grad) for p in learn.model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def class_weight_values(config: FitConfig, labels: Sequence[str], classes: Sequence[str]) -> list[float] | None:
    """The cross-entropy's weights, in the order of `classes`; None where all weigh alike.

    Args:
        config: its `class_weights`, checked against the classes.
        labels: of the training images; `balanced` is n / (classes x images of the class), scikit-learn's formula.
        classes: in the order of the network's outputs.
    """
    from sklearn.utils.class_weight import compute_class_weight

    if config.class_weights == "balanced":
        return compute_class_weight("balanced", classes=np.array(classes), y=np.array(labels)).tolist()
    return config.class_weight_list()
