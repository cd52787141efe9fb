"""Measures what a recalibration gains, by cross-validation on the images that it is fitted to."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from xray_fastai.metrics.influence import Shares
from xray_fastai.metrics.intervals import Interval, measure, student_interval
from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import METRICS
from xray_fastai.training.calibration import Calibration, Validated
from xray_fastai.training.local_fit import Rule, fit_locally

FOLDS = 10
FEW, REPEATS = 200, 10
"""Fewer images are divided so many times: the figures depend on who is in which fold."""
SHOWN = (
    "roc_auc", "balanced_accuracy", "sensitivity", "specificity", "accuracy", "nll", "brier_score",
    "calibration_intercept", "calibration_slope",
)  # fmt: skip
"""The metrics before and after."""
PARTS = ("before", "after", "difference")


class Called(NamedTuple):
    """Holds images with their probabilities, and the class that is predicted of each."""

    scored: Scored
    classes: np.ndarray  # (N,)


def compared(
    before: Called, images: Validated, fitted: Calibration, rule: Rule
) -> dict[str, dict[str, list[float | None]]]:
    """Return each metric before and after, and the difference, each with a 95 % interval by patient.

    After is by cross-validation: each image by a fit to other patients. Where the images are divided `REPEATS` times,
    values and limits are means over these. Nothing is returned where a class has one patient only.

    Args:
        before: the images by the export as it was.
        images: the same, see `fit_locally`.
        fitted: to all of them.
        rule: of the threshold.
    """
    positive = before.scored.positive
    # one scaling keeps the order, and so the AUC; those of the folds mix it
    y_prob = fitted.probabilities(images.logits)
    whole = Called(Scored(images.targets, y_prob, images.patients, positive), before.classes)
    old, whole_new = _measured(before), _measured(whole)
    found = []
    for seed in range(REPEATS if len(images.targets) < FEW else 1):
        after = _cross_validated(images, positive, rule, seed)
        if after is None:
            return {}
        new = _measured(after) | {"roc_auc": whole_new["roc_auc"]}
        pairs = {name: (before, whole if name == "roc_auc" else after) for name in SHOWN}
        found.append([[old[name], new[name], difference(name, *pairs[name])] for name in SHOWN])
    means = np.mean(found, axis=0)  # (metrics, parts, value and limits)
    return {
        name: {part: _plain(numbers) for part, numbers in zip(PARTS, of_metric, strict=True)}
        for name, of_metric in zip(SHOWN, means, strict=True)
    }


def _measured(called: Called) -> dict[str, Interval]:
    measured = measure(called.scored, {"chosen": called.classes}, resamples=1)
    return measured.free | measured.points["chosen"]


def difference(name: str, before: Called, after: Called) -> Interval:
    """Return what a metric gained, with a 95 % interval by patient; NaN for its limits where nothing differs.

    The images are the same, so each image's influence on the difference is the difference of its influences: what both
    have in common falls out.

    Args:
        name: of the metric.
        before: images.
        after: the same images.
    """
    metric = METRICS[name]
    gained = metric.value(*after) - metric.value(*before)
    influence = _influence(name, after) - _influence(name, before)
    return Interval(gained, *student_interval(gained, influence, before.scored.patients, "real"))


def _influence(name: str, called: Called) -> np.ndarray:
    spread = METRICS[name].spread(*called)
    return spread.influence.mean(axis=1) if isinstance(spread, Shares) else spread


def _cross_validated(images: Validated, positive: int | None, rule: Rule, seed: int) -> Called | None:
    """Return the images as fits to other patients predict them; None where a class has one patient only."""
    fewest = min(len(np.unique(images.patients[images.targets == k])) for k in np.unique(images.targets))
    if fewest < 2:
        return None
    folds = StratifiedGroupKFold(min(FOLDS, fewest), shuffle=True, random_state=seed)
    probabilities, called = np.empty(images.logits.shape), np.empty(len(images.targets), int)
    for train, test in folds.split(images.logits, images.targets, images.patients):
        if len(np.unique(images.targets[train])) < images.logits.shape[1]:
            return None
        part = replace(
            images, logits=images.logits[train], targets=images.targets[train], patients=images.patients[train]
        )
        fold = fit_locally(part, positive, rule)
        probabilities[test] = fold.probabilities(images.logits[test])
        called[test] = probabilities[test].argmax(axis=1)
        if positive is not None:
            called[test] = np.where(probabilities[test, positive] >= fold.threshold, positive, 1 - positive)
    return Called(Scored(images.targets, probabilities, images.patients, positive), called)


def _plain(numbers: np.ndarray) -> list[float | None]:
    return [None if math.isnan(number) else float(number) for number in numbers]
