"""What predictions are worth: metrics by scikit-learn, and their intervals from a bootstrap over patients.

Of two classes the positive one is measured. Of more, each metric is the plain mean over the classes that the images
have, each against the rest (the macro average); the Brier score alone is a sum over all classes, as Brier defined it.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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

RESAMPLES = 2000
SEED = 0
BINS = 15
"""Bins of equal width for calibration, as in Guo et al., On Calibration of Modern Neural Networks, ICML 2017."""
FALSE_POSITIVE_RATES = np.linspace(0, 1, 101)
"""Where the band around a ROC curve is taken."""
_ELEMENTS = (
    100_000  # of weights at once: of 1e5, 4e5, 1e6 and 4e6 the fastest at 624 and at 5,856 images (0.2 and 0.6 s)
)


TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity (recall)",
    "specificity": "specificity",
    "ppv": "PPV (precision)",
    "npv": "NPV",
    "f1": "F1",
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "brier_score": "Brier score",
    "expected_calibration_error": "expected calibration error",
}


class Interval(NamedTuple):
    """A metric with its 95 % interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scored:
    """Images with their truth and their predicted probabilities.

    Args:
        truth: (N,), indices of classes.
        probabilities: (N, classes).
        patients: (N,), a number for each patient, from 0 on.
        positive: the index of the class to detect; None measures all classes.
    """

    truth: np.ndarray
    probabilities: np.ndarray
    patients: np.ndarray
    positive: int | None

    @property
    def classes(self) -> int:
        return self.probabilities.shape[1]

    @cached_property
    def present(self) -> list[int]:
        """The classes that the images have."""
        return np.unique(self.truth).tolist()

    @property
    def measured(self) -> list[int]:
        """The classes that metrics are taken of, each against the rest."""
        return self.present if self.positive is None else [self.positive]

    @property
    def recalled(self) -> list[int]:
        """The classes whose recall balanced accuracy is the mean of."""
        return self.present if self.positive is None and len(self.present) > 1 else list(range(self.classes))

    @cached_property
    def squared_errors(self) -> np.ndarray:
        """(N,): the Brier score of each image."""
        if self.positive is not None:
            return (self.probabilities[:, self.positive] - (self.truth == self.positive)) ** 2
        return ((self.probabilities - np.eye(self.classes)[self.truth]) ** 2).sum(axis=1)

    @cached_property
    def confidence(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What calibration is judged by, each (N,): the probability, whether it came true, its bin.

        Of two classes that is the positive one's probability; of more, as Guo et al. do, that of the class most
        probable.
        """
        called = self.probabilities.argmax(axis=1) if self.positive is None else self.positive
        probability = self.probabilities[np.arange(len(self.truth)), called]
        bins = np.clip(np.ceil(probability * BINS).astype(int) - 1, 0, BINS - 1)
        return probability, self.truth == called, bins


@dataclass(frozen=True)
class Curve:
    """One class against the rest."""

    label: int
    positives: np.ndarray  # (N,)
    scores: np.ndarray  # (N,)
    auc: Interval
    average_precision: Interval
    band: np.ndarray  # (2, 101): low and high sensitivity at `FALSE_POSITIVE_RATES`


@dataclass(frozen=True)
class Measured:
    """Metrics by name: `free` of any threshold, and at each operating point."""

    free: dict[str, Interval]
    points: dict[str, dict[str, Interval]]
    curves: list[Curve]


def measure(scored: Scored, called: dict[str, np.ndarray], resamples: int = RESAMPLES, seed: int = SEED) -> Measured:
    """All metrics, with 95 % percentile intervals from a bootstrap over patients.

    Images of one patient are drawn together, since they are not independent (Field & Welsh, Bootstrapping clustered
    data, JRSS B 2007). Resamples in which a metric is undefined are left out for it. One patient alone has no interval.

    Args:
        scored: the images.
        called: by operating point, the class called for each image (N,).
        resamples: how many.
        seed: of what is drawn.
    """
    free, curves = ranking_values(scored)
    points = {name: decision_values(scored, decided) for name, decided in called.items()}
    if scored.patients.max() == 0:
        bounds = None
    else:
        parts = [resampled(scored, called, w) for w in patient_weights(scored.patients, resamples, seed)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # undefined in all resamples
            bounds = {
                key: np.nanpercentile(np.concatenate([part[key] for part in parts]), [2.5, 97.5], axis=0)
                for key in parts[0]
            }

    def interval(value: float, *key, index: tuple = ()) -> Interval:
        if bounds is None or np.isnan(value):
            return Interval(float(value), np.nan, np.nan)
        return Interval(float(value), *(float(bound[index]) for bound in bounds[key]))

    return Measured(
        {name: interval(value, None, name) for name, value in free.items()},
        {p: {name: interval(value, p, name) for name, value in values.items()} for p, values in points.items()},
        [
            Curve(
                label, scored.truth == label, scored.probabilities[:, label],
                interval(auc, None, "auc by class", index=(i,)), interval(ap, None, "precision by class", index=(i,)),
                np.full((2, 101), np.nan) if bounds is None else bounds[None, "band"][:, i],
            )
            for i, (label, (auc, ap)) in enumerate(zip(scored.measured, curves, strict=True))
        ],
    )  # fmt: skip


def decision_values(scored: Scored, called: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """What scikit-learn says of decisions (N,), with a weight for each image (N,); NaN where undefined."""
    truth, options = scored.truth, {"sample_weight": weights, "zero_division": np.nan}

    def mean(metric, negative: bool = False) -> float:
        """Of the measured classes; `negative` takes the rest as what is to be found."""
        return np.mean(
            [metric((truth == k) != negative, (called == k) != negative, **options) for k in scored.measured]
        )

    recalls = recall_score(truth, called, labels=scored.recalled, average=None, **options)
    sensitivity = mean(recall_score)
    return {
        "accuracy": accuracy_score(truth, called, sample_weight=weights),
        "balanced_accuracy": recalls.mean(),
        "sensitivity": sensitivity,
        "specificity": mean(recall_score, negative=True),
        "ppv": mean(precision_score),
        "npv": mean(precision_score, negative=True),
        "f1": np.nan if np.isnan(sensitivity) else mean(f1_score),
    }


def ranking_values(
    scored: Scored, weights: np.ndarray | None = None
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """What scikit-learn says of the probabilities, with a weight for each image (N,); NaN where undefined.

    Returns:
        The metrics, and of each measured class its ROC AUC and its average precision.
    """
    targets = np.eye(scored.classes, dtype=int)[scored.truth]
    columns = range(scored.classes) if scored.positive is None else [scored.positive]

    def of(metric, k: int, **options) -> float:
        return metric(targets[:, k], scored.probabilities[:, k], sample_weight=weights, **options)

    curves = [(np.nan, np.nan)] * len(scored.measured)
    if len(scored.present) > 1:
        curves = [(of(roc_auc_score, k), of(average_precision_score, k)) for k in scored.measured]
    auc, average_precision = np.mean(curves, axis=0)
    error = calibration_error(scored, np.ones((1, len(scored.truth))) if weights is None else weights[None])
    return {
        "roc_auc": auc,
        "average_precision": average_precision,
        "brier_score": sum(of(brier_score_loss, k, pos_label=1) for k in columns),
        "expected_calibration_error": error[0],
    }, curves


def patient_weights(patients: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn when patients are drawn with replacement: (some resamples, N) at a time."""
    rng = np.random.default_rng(seed)
    count = int(patients.max()) + 1
    rows = max(1, _ELEMENTS // len(patients))
    for start in range(0, resamples, rows):
        n = min(rows, resamples - start)
        drawn = rng.integers(count, size=(n, count)) + count * np.arange(n)[:, None]
        times = np.bincount(drawn.ravel(), minlength=n * count).reshape(n, count)
        yield times.astype(np.float64)[:, patients]


def resampled(scored: Scored, called: dict[str, np.ndarray], weights: np.ndarray) -> dict[tuple, np.ndarray]:
    """The metrics of R resamples at once, from image weights (R, N): the same as scikit-learn's with `sample_weight`.

    Returns:
        (R,) by operating point (None: free of any) and name; by class (R, measured); the ROC's band (R, measured, 101).
    """
    found: dict[tuple, np.ndarray] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for point, decided in called.items():
            for name, values in _decisions(scored, decided, weights).items():
                found[point, name] = values
        ranked = [_ranking(scored, label, weights) for label in scored.measured]
        aucs, precisions, bands = (np.stack(part, axis=1) for part in zip(*ranked, strict=True))
        found[None, "auc by class"], found[None, "roc_auc"] = aucs, aucs.mean(axis=1)
        found[None, "precision by class"], found[None, "average_precision"] = precisions, precisions.mean(axis=1)
        found[None, "band"] = bands
        found[None, "brier_score"] = weights @ scored.squared_errors / weights.sum(axis=1)
        found[None, "expected_calibration_error"] = calibration_error(scored, weights)
    return found


def calibration_error(scored: Scored, weights: np.ndarray) -> np.ndarray:
    """The expected calibration error (Guo et al. 2017, equation 3) of R weightings (R, N): the mean gap between
    probability and frequency over `BINS` bins, each weighted by its images. Resampling adds noise to every bin, so the
    interval lies somewhat high."""
    probability, came_true, bins = scored.confidence
    gaps = np.zeros((len(bins), BINS))
    gaps[np.arange(len(bins)), bins] = came_true - probability
    return np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1)


def _decisions(scored: Scored, called: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    cells = np.eye(scored.classes**2)[scored.truth * scored.classes + called]  # (N, truth x called)
    confusion = (weights @ cells).reshape(-1, scored.classes, scored.classes)  # (R, truth, called)
    total = confusion.sum(axis=(1, 2))[:, None]
    support, calls = confusion.sum(axis=2), confusion.sum(axis=1)  # (R, classes)
    right = np.diagonal(confusion, axis1=1, axis2=2)
    true_negative = total - support - calls + right
    recall = right / support
    by_class = {
        "sensitivity": recall,
        "specificity": true_negative / (total - support),
        "ppv": right / calls,
        "npv": true_negative / (total - calls),
        "f1": np.where(support > 0, 2 * right / (support + calls), np.nan),
    }
    return {
        "accuracy": right.sum(axis=1) / total[:, 0],
        "balanced_accuracy": recall[:, scored.recalled].mean(axis=1),
        **{name: values[:, scored.measured].mean(axis=1) for name, values in by_class.items()},
    }


def _ranking(scored: Scored, label: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ROC AUC (R,), average precision (R,) and sensitivity at `FALSE_POSITIVE_RATES` (R, 101) of one class."""
    scores = scored.probabilities[:, label]
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))  # of groups with the same score, highest first
    weights = weights[:, order]
    every = np.add.reduceat(weights, starts, axis=1)  # (R, groups)
    positive = np.add.reduceat(weights * (scored.truth == label)[order], starts, axis=1)
    hits, calls = positive.cumsum(axis=1), every.cumsum(axis=1)
    false = calls - hits
    positives, negatives = hits[:, -1], false[:, -1]
    # a positive outranks the negatives in the groups below, and half of those in its own
    below = negatives[:, None] - false + (every - positive) / 2
    auc = (positive * below).sum(axis=1) / (positives * negatives)
    precision = (positive * hits / np.maximum(calls, 1)).sum(axis=1) / positives
    zero = np.zeros((len(weights), 1))
    rates = np.hstack([zero, false / negatives[:, None]]), np.hstack([zero, hits / positives[:, None]])
    band = np.stack([np.interp(FALSE_POSITIVE_RATES, *pair) for pair in zip(*rates, strict=True)])
    precision[np.isnan(auc)] = band[np.isnan(auc)] = np.nan  # no image of the class, or no other
    return auc, precision, band
