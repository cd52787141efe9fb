"""Chooses what validation images decide at the end of a training: calibration, threshold, worst group, gate."""

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from xray_fastai.data.dataset import Collection
from xray_fastai.evaluation.subgroups import Group, appearance, worst_group
from xray_fastai.export.layout import QUANTILES
from xray_fastai.inference.gate import Gate
from xray_fastai.metrics.alignment import log_odds, quantiles
from xray_fastai.system.errors import ImageError
from xray_fastai.training.calibration import Calibration, Validated, calibrate, prior_of
from xray_fastai.training.gate import settle_gate
from xray_fastai.training.plan import Plan


@dataclass(frozen=True)
class Outputs:
    """Holds the outputs of images that chose epochs, but that the network which gave them was not trained on."""

    images: pd.DataFrame  # N rows, as in `Collection.table`
    logits: np.ndarray  # (N, classes)
    targets: np.ndarray  # (N,), indices of classes


@dataclass(frozen=True)
class Ensemble:
    """Holds what an export records of its several networks (`ensemble_export`)."""

    record: dict[str, Any]  # as in `model.json`: the metrics of all outputs
    members: list[dict[str, Any]]  # as in `model.json`, of each network
    predictions: pd.DataFrame | None  # a row for each image, which one network was not trained on


@dataclass(frozen=True)
class Judgement:
    """Holds what the validation images say of the exported weights."""

    calibration: Calibration
    prior: list[float] | None = None  # by class, the probabilities of an image that says nothing
    worst: Group | None = None  # the group of images with the lowest ROC AUC
    called: dict[str, int] | None = None  # images by the class that is predicted
    scores: dict[str, list[float]] | None = None  # by class, quantiles of the log odds of the class to detect
    gate: Gate | None = None  # settled by the training images, too
    ensemble: Ensemble | None = None


def judge(plan: Plan, outputs: Outputs, gate: Gate | None) -> Judgement:
    """Choose calibration and threshold, and find what the images say of the model.

    Args:
        plan: of the fit; its training images and the weights of its loss are those of the network.
        outputs: of the validation images.
        gate: of the network.
    """
    config, data, classes = plan.config, plan.data, plan.data.classes
    images = Validated(
        logits=outputs.logits,
        targets=outputs.targets,
        patients=pd.factorize(outputs.images.patient)[0],
        weights=np.array(plan.class_weights or [1.0] * len(classes)),
        trained=data.train.label.value_counts().loc[classes].to_numpy(),
        kind="out-of-fold" if data.has_folds else "validation",
    )
    calibration = calibrate(images, config.calibration, positive_of(data), config.target_sensitivity)
    probabilities = calibration.probabilities(outputs.logits)
    counts = np.bincount(called(data, probabilities, calibration.threshold), minlength=len(classes))
    return Judgement(
        calibration,
        prior_of(images, calibration.scaling).tolist(),
        _worst_group(data, outputs.images, probabilities),
        dict(zip(classes, counts.tolist(), strict=True)),
        _scores(data, outputs),
        gate,
    )


def gate_of(model: nn.Sequential, plan: Plan) -> Gate | None:
    """Settle the gate of a network with its own images; None where it cannot be settled.

    Args:
        model: backbone and head.
        plan: its own.
    """
    with contextlib.suppress(ImageError):  # the images may have been deleted; the export is written without them
        return settle_gate(model, plan)
    return None


def positive_of(data: Collection) -> int | None:
    """Return the index of the class to detect; None with more than two classes: the most probable is predicted."""
    return data.classes.index(data.positive) if data.positive and len(data.classes) == 2 else None


def called(data: Collection, probabilities: np.ndarray, threshold: float | None) -> np.ndarray:
    """Return the indices (N,) of the classes that are predicted from probabilities (N, classes)."""
    positive = positive_of(data)
    if positive is None:
        return probabilities.argmax(axis=1)
    return np.where(probabilities[:, positive] >= threshold, positive, 1 - positive)


def _scores(data: Collection, outputs: Outputs) -> dict[str, list[float]] | None:
    """Return the quantiles of the log odds of the class to detect, by the class of the images.

    `recalibrate --match-scores` compares the images of another place with them. They are not known of one class alone.
    """
    positive, targets = positive_of(data), outputs.targets
    if positive is None or len(np.unique(targets)) < 2:
        return None
    odds = log_odds(outputs.logits, positive)
    return {name: quantiles(odds[targets == index], QUANTILES) for index, name in enumerate(data.classes)}


def _worst_group(data: Collection, images: pd.DataFrame, probabilities: np.ndarray) -> Group | None:
    """Return the group of images with the lowest ROC AUC, or None where it cannot be determined."""
    positive = positive_of(data)
    if positive is None:
        return None
    with contextlib.suppress(ImageError):  # as in `gate_of`
        looks = appearance(list(images.path), list(images.width / images.height))
        positives = (images.label == data.positive).to_numpy()
        return worst_group(looks, positives, images.patient.to_numpy(), probabilities[:, positive])
    return None
