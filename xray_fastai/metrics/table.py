"""The table of metrics: what each is called, what it means, and how it is computed.

To add a metric, add it to `METRICS`. `metrics.json`, the tables on the terminal and in the report, the report's
explanations and the tests follow from it.

Of two classes the positive one is measured. Of more, a metric is the plain mean over the classes that the images have,
each against the rest (macro average). The Brier score is an exception: it is the sum over all classes, as Brier
defined it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from xray_fastai.metrics.scored import Scored, calibration_error

FALSE_POSITIVE_RATES = np.linspace(0, 1, 101)
"""Where the interval of a ROC curve is computed."""

Weights = np.ndarray | None
"""(N,), how often each image counts; None: once."""


@dataclass(frozen=True)
class Counts:
    """Confusion matrices of R weightings of the images, and what follows from them for each class.

    Args:
        scored: N images.
        confusion: (R, true class, predicted class).
    """

    scored: Scored
    confusion: np.ndarray

    @classmethod
    def of(cls, scored: Scored, y_pred: np.ndarray, weights: np.ndarray) -> "Counts":
        """Count the predicted classes (N,) with weights (R, N)."""
        cells = np.eye(scored.classes**2)[scored.y_true * scored.classes + y_pred]  # (N, true x predicted)
        return cls(scored, (weights @ cells).reshape(-1, scored.classes, scored.classes))

    @property
    def total(self) -> np.ndarray:  # (R, 1)
        return self.confusion.sum(axis=(1, 2))[:, None]

    @property
    def positives(self) -> np.ndarray:  # (R, classes): images of each class
        return self.confusion.sum(axis=2)

    @property
    def predicted(self) -> np.ndarray:  # (R, classes): images predicted as each class
        return self.confusion.sum(axis=1)

    @property
    def true_positives(self) -> np.ndarray:  # (R, classes)
        return np.diagonal(self.confusion, axis1=1, axis2=2)

    @property
    def true_negatives(self) -> np.ndarray:  # (R, classes)
        return self.total - self.positives - self.predicted + self.true_positives

    def mean(self, by_class: np.ndarray) -> np.ndarray:
        """Return the mean (R,) over the measured classes of values (R, classes)."""
        return by_class[:, self.scored.measured].mean(axis=1)


@dataclass(frozen=True)
class Rankings:
    """What R weightings (R, N) of the images say about the order of the probabilities."""

    scored: Scored
    weights: np.ndarray

    @cached_property
    def curves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ROC AUC and average precision (R, measured), and sensitivity at `FALSE_POSITIVE_RATES` (R, measured, 101)."""
        ranked = [_rank(self.scored, label, self.weights) for label in self.scored.measured]
        auc, average_precision, bands = (np.stack(part, axis=1) for part in zip(*ranked, strict=True))
        return auc, average_precision, bands


@dataclass(frozen=True)
class Metric:
    """One metric. `value` is scikit-learn's; `resampled` gives the same for many weightings at once."""

    name: str  # in `metrics.json`
    title: str  # for people
    meaning: str  # in the report
    needs_threshold: bool
    value: Callable[[Scored, np.ndarray, Weights], float]  # of images, predicted classes (N,), weights; NaN: undefined
    resampled: Callable[[Counts], np.ndarray] | Callable[[Rankings], np.ndarray]  # (R,); NaN where undefined


def _accuracy(scored: Scored, y_pred: np.ndarray, weights: Weights) -> float:
    return accuracy_score(scored.y_true, y_pred, sample_weight=weights)


def _balanced_accuracy(scored: Scored, y_pred: np.ndarray, weights: Weights) -> float:
    options = {"labels": scored.recalled, "average": None, "zero_division": np.nan}
    return recall_score(scored.y_true, y_pred, sample_weight=weights, **options).mean()


def _mean_of(score: Callable, negative: bool = False) -> Callable[[Scored, np.ndarray, Weights], float]:
    """Make a metric from a score of two classes: its mean over the measured classes.

    Args:
        score: a function of scikit-learn.
        negative: measure how the rest is found, instead of the class.
    """

    def mean(scored: Scored, y_pred: np.ndarray, weights: Weights) -> float:
        options = {"sample_weight": weights, "zero_division": np.nan}
        return np.mean(
            [score((scored.y_true == k) != negative, (y_pred == k) != negative, **options) for k in scored.measured]
        )

    return mean


def _f1(scored: Scored, y_pred: np.ndarray, weights: Weights) -> float:
    """Return scikit-learn's F1, but NaN where a measured class has no image."""
    sensitivity = _mean_of(recall_score)(scored, y_pred, weights)
    return np.nan if np.isnan(sensitivity) else _mean_of(f1_score)(scored, y_pred, weights)


def curve_values(score: Callable, scored: Scored, weights: Weights = None) -> list[float]:
    """Return `roc_auc_score` or `average_precision_score` of each measured class; NaN with images of one class only."""
    if len(scored.present) < 2:
        return [np.nan] * len(scored.measured)
    return [score(scored.y_true == k, scored.y_prob[:, k], sample_weight=weights) for k in scored.measured]


def _brier_score(scored: Scored, _: np.ndarray, weights: Weights) -> float:
    labels = range(scored.classes) if scored.positive is None else [scored.positive]
    return sum(
        brier_score_loss((scored.y_true == k).astype(int), scored.y_prob[:, k], sample_weight=weights, pos_label=1)
        for k in labels
    )


def _calibration_error(scored: Scored, _: np.ndarray, weights: Weights) -> float:
    return calibration_error(scored, np.ones((1, len(scored.y_true))) if weights is None else weights[None])[0]


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "accuracy", "accuracy", "the share of images whose class is predicted correctly.", True,
            _accuracy, lambda c: c.true_positives.sum(axis=1) / c.total[:, 0],
        ),
        Metric(
            "balanced_accuracy", "balanced accuracy", "the mean of the classes' sensitivities.", True,
            _balanced_accuracy, lambda c: (c.true_positives / c.positives)[:, c.scored.recalled].mean(axis=1),
        ),
        Metric(
            "sensitivity", "sensitivity (recall)",
            "of the images that show the class to detect, the share that is predicted as this class.", True,
            _mean_of(recall_score), lambda c: c.mean(c.true_positives / c.positives),
        ),
        Metric(
            "specificity", "specificity",
            "of the images that do not show the class, the share that is not predicted as it.", True,
            _mean_of(recall_score, negative=True), lambda c: c.mean(c.true_negatives / (c.total - c.positives)),
        ),
        Metric(
            "ppv", "PPV (precision)",
            "of the images predicted as the class, the share that shows it. It depends on how common the class is.",
            True,
            _mean_of(precision_score), lambda c: c.mean(c.true_positives / c.predicted),
        ),
        Metric(
            "npv", "NPV",
            "of the images not predicted as the class, the share that does not show it. "
            "It depends on how common the class is.", True,
            _mean_of(precision_score, negative=True), lambda c: c.mean(c.true_negatives / (c.total - c.predicted)),
        ),
        Metric(
            "f1", "F1", "the harmonic mean of sensitivity and PPV.", True, _f1,
            lambda c: c.mean(np.where(c.positives > 0, 2 * c.true_positives / (c.positives + c.predicted), np.nan)),
        ),
        Metric(
            "roc_auc", "ROC AUC",
            "the chance that an image with the class gets a higher probability than one without; guessing gives 0.5.",
            False, lambda scored, _, weights: np.mean(curve_values(roc_auc_score, scored, weights)),
            lambda r: r.curves[0].mean(axis=1),
        ),
        Metric(
            "average_precision", "average precision",
            "the area under the precision-recall curve; guessing gives the share of the class.",
            False, lambda scored, _, weights: np.mean(curve_values(average_precision_score, scored, weights)),
            lambda r: r.curves[1].mean(axis=1),
        ),
        Metric(
            "brier_score", "Brier score", "the mean squared error of the probability; lower is better.",
            False, _brier_score, lambda r: r.weights @ r.scored.squared_errors / r.weights.sum(axis=1),
        ),
        Metric(
            "expected_calibration_error", "expected calibration error",
            "the mean difference between a probability and how often it is right; lower is better.",
            False, _calibration_error, lambda r: calibration_error(r.scored, r.weights),
        ),
    )
}  # fmt: skip
"""By name, in the order of all tables."""


def title_of(name: str) -> str:
    """Return a metric's title, or the name itself where a newer version wrote a metric that this one does not know."""
    return METRICS[name].title if name in METRICS else name


def values(scored: Scored, y_pred: np.ndarray | None = None, weights: Weights = None) -> dict[str, float]:
    """Compute metrics with scikit-learn.

    Args:
        scored: N images.
        y_pred: (N,), the predicted classes; None computes the metrics that need no threshold.
        weights: (N,), how often each image counts.

    Returns:
        By name; NaN where undefined.

    Examples:
        Of four positive images three are found, of six negative ones two give a false alarm.

        >>> y_true = np.repeat([1, 0], [4, 6])
        >>> y_pred = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
        >>> scored = Scored(y_true, np.eye(2)[y_pred], np.arange(10), positive=1)
        >>> for name, value in values(scored, y_pred).items():
        ...     print(f"{name:<18}{value:.3f}")
        accuracy          0.700
        balanced_accuracy 0.708
        sensitivity       0.750
        specificity       0.667
        ppv               0.600
        npv               0.800
        f1                0.667
        >>> {name: round(float(value), 3) for name, value in values(scored).items()}
        {'roc_auc': 0.708, 'average_precision': 0.55, 'brier_score': 0.3, 'expected_calibration_error': 0.3}
    """
    wanted = [metric for metric in METRICS.values() if metric.needs_threshold == (y_pred is not None)]
    return {metric.name: metric.value(scored, y_pred, weights) for metric in wanted}


def _rank(scored: Scored, label: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ROC AUC (R,), average precision (R,), sensitivity at `FALSE_POSITIVE_RATES` (R, 101) of one class."""
    scores = scored.y_prob[:, label]
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))  # of groups with the same score, highest first
    weights = weights[:, order]
    group = np.add.reduceat(weights, starts, axis=1)  # (R, groups)
    positive = np.add.reduceat(weights * (scored.y_true == label)[order], starts, axis=1)
    true_positives, predicted = positive.cumsum(axis=1), group.cumsum(axis=1)
    false_positives = predicted - true_positives
    positives, negatives = true_positives[:, -1], false_positives[:, -1]
    # a positive outranks the negatives in the groups below, and half of those in its own
    below = negatives[:, None] - false_positives + (group - positive) / 2
    auc = (positive * below).sum(axis=1) / (positives * negatives)
    precision = (positive * true_positives / np.maximum(predicted, 1)).sum(axis=1) / positives
    zero = np.zeros((len(weights), 1))
    rates = (
        np.hstack([zero, false_positives / negatives[:, None]]),
        np.hstack([zero, true_positives / positives[:, None]]),
    )
    band = np.stack([np.interp(FALSE_POSITIVE_RATES, *pair) for pair in zip(*rates, strict=True)])
    precision[np.isnan(auc)] = band[np.isnan(auc)] = np.nan  # no image of the class, or no other
    return auc, precision, band
