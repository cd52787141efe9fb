"""Builds the fastai `Learner`: backbone, head with dropout, weighted loss."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from fastai.vision.all import (
    CrossEntropyLossFlat,
    DataLoaders,
    Learner,
    Recorder,
    RocAuc,
    RocAucBinary,
    accuracy,
    create_vision_model,
)
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from xray_fastai.config.fit_config import FitConfig
from xray_fastai.model.architectures import build_backbone, build_head, features_of, split_parameters
from xray_fastai.model.optimizer import FusedAdam
from xray_fastai.model.recorder import EpochAverage, EpochMetric, EpochRecorder
from xray_fastai.model.xray_learner import NeedsImages, XrayLearner
from xray_fastai.system.errors import UserError


class CalibratedCrossEntropy(CrossEntropyLossFlat):
    """fastai's cross-entropy with probabilities softmax(logits / temperature + intercepts).

    The loss itself uses neither.
    """

    temperature = 1.0
    intercepts: Sequence[float] | None = None  # (classes,)

    def activation(self, x):
        scaled = x / self.temperature
        return super().activation(scaled if self.intercepts is None else scaled + x.new_tensor(self.intercepts))

    def total_weight(self, targets: torch.Tensor) -> torch.Tensor:
        "Return the sum of the images' weights, by which the loss of a batch is divided."
        weight = self.func.weight
        return targets.new_tensor(len(targets), dtype=torch.float32) if weight is None else weight[targets.long()].sum()


def settle_batch_norm(model: nn.Module, steps: int) -> None:
    """Raise the momentum of batch norm, so that its running statistics adapt within half an epoch.

    torch's momentum of 0.1 averages over some ten steps. If an epoch has fewer steps and the weights change fast,
    validation uses statistics of much earlier weights. Example: 12 epochs of 5 steps (ResNet50, 64 px, from scratch).
    With 0.1 the validation losses were 0.7 to 29, and the lowest was that of the first epoch, whose predictions are
    random. With this momentum they are 0.5 to 119; the ninth epoch has the lowest, with AUC 0.87.

    Args:
        model: changed in place.
        steps: optimizer steps an epoch.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = max(module.momentum, min(0.5, 2 / steps))


def set_scaling(learn: Learner, temperature: float, intercepts: Sequence[float] | None) -> None:
    """Set what `learn.predict` and `learn.get_preds` scale logits by: softmax(logits / temperature + intercepts)."""
    learn.loss_func.temperature, learn.loss_func.intercepts = temperature, intercepts


def build_learner(
    dls: DataLoaders,
    arch: str,
    *,
    dropout: float = FitConfig.dropout,
    class_weights: Sequence[float] | None = None,
    pretrained: dict[str, torch.Tensor] | None = None,
    start: dict[str, torch.Tensor] | None = None,
    size: int | None = None,
    members: int = 1,
) -> XrayLearner:
    """Build a learner as fastai's `vision_learner` does: torchvision's `arch`, a head of pooling, dropout, one layer.

    Args:
        dls: its vocabulary gives the classes.
        arch: a name in `ARCHITECTURES`.
        dropout: probability before the linear layer.
        class_weights: the cross-entropy's weights, in the order of the classes; None weighs all classes equally.
        pretrained: tensors of the backbone under torchvision's names (`pretrained.pretrained_state`); None leaves
            random weights.
        start: tensors of an export to continue from, under the names of its `model.safetensors`.
        size: side of the images, which timm's networks need.
        members: of an ensemble, whose networks are joined to one (`ensemble.join`).

    Returns:
        A learner with three parameter groups (early layers, late layers, head), none of them frozen. The network maps
        (B, 3, H, W) to logits (B, classes).

    Raises:
        UserError: timm is not installed or does not know the network, or `start` is for another size.
    """
    classes = len(dls.vocab)
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32, device=dls.device)
    model = create_vision_model(
        partial(build_backbone, arch, pretrained, size, members),
        classes,
        pretrained=False,  # `build_backbone` loads the weights
        custom_head=build_head(features_of(arch, size, members), classes, dropout),
    )
    learn = XrayLearner(
        dls,
        model,
        splitter=partial(split_parameters, arch=arch),
        loss_func=CalibratedCrossEntropy(weight=weight),
        opt_func=FusedAdam,
        metrics=[EpochAverage(accuracy), EpochMetric(RocAucBinary() if classes == 2 else RocAuc())],
        train_bn=False,
    )
    if start is not None:
        own = learn.model.state_dict()
        if bent := [name for name, tensor in start.items() if name not in own or own[name].shape != tensor.shape]:
            fault = f"the export's {bent[0]} is of another network, or for another size; leave it out"
            raise UserError(fault, option="size", value=size)
        learn.model.load_state_dict(own | start)
    learn.remove_cb(Recorder)
    learn.add_cbs([EpochRecorder(), NeedsImages()])
    learn.arch = arch
    return learn


def parameter_counts(learn: Learner) -> tuple[int, int]:
    """Return the number of all parameters, and of those that are not frozen."""
    sizes = [(p.numel(), p.requires_grad) for p in learn.model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def class_weight_values(config: FitConfig, labels: Sequence[str], classes: Sequence[str]) -> list[float] | None:
    """Return the cross-entropy's weights in the order of `classes`; None weighs all classes equally.

    Args:
        config: its `class_weights` was checked against the classes.
        labels: the training images' labels; `balanced` is n / (classes x images of the class), scikit-learn's formula.
        classes: in the order of the network's outputs.
    """
    if config.class_weights == "balanced":
        return compute_class_weight("balanced", classes=np.array(classes), y=np.array(labels)).tolist()
    return config.class_weight_list(classes)
