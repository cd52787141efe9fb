"""Metrics with 95 % intervals: percentiles of a bootstrap over patients.

Images of one patient are drawn together, since they are not independent (Field & Welsh, Bootstrapping clustered data,
JRSS B 2007).
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import METRICS, Counts, Rankings, curve_values, values

RESAMPLES = 2000
SEED = 0
_ELEMENTS = 100_000
"""Weights computed at once: of 1e5, 4e5, 1e6 and 4e6 the fastest at 624 and at 5,856 images (0.2 and 0.6 s)."""


class Interval(NamedTuple):
    """A metric with its 95 % interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """The ROC and precision-recall curves of one class against the rest."""

    label: int
    positives: np.ndarray  # (N,)
    scores: np.ndarray  # (N,)
    auc: Interval
    average_precision: Interval
    band: np.ndarray  # (2, 101): lowest and highest sensitivity at `FALSE_POSITIVE_RATES`


@dataclass(frozen=True)
class Measured:
    """Metrics by name: `free` needs no threshold, `points` has those of each operating point."""

    free: dict[str, Interval]
    points: dict[str, dict[str, Interval]]
    curves: list[Curve]


@dataclass(frozen=True)
class Resampled:
    """The metrics of R resamples, as in `Measured`."""

    free: dict[str, np.ndarray]  # (R,) each
    points: dict[str, dict[str, np.ndarray]]  # (R,) each
    auc: np.ndarray  # (R, measured)
    average_precision: np.ndarray  # (R, measured)
    bands: np.ndarray  # (R, measured, 101)


def measure(scored: Scored, y_pred: dict[str, np.ndarray], resamples: int = RESAMPLES, seed: int = SEED) -> Measured:
    """Compute all metrics with 95 % intervals.

    A resample in which a metric is undefined is left out for this metric. Images of a single patient give no interval.

    Args:
        scored: N images.
        y_pred: by operating point, the predicted class of each image (N,).
        resamples: how often patients are drawn.
        seed: of the random numbers.

    Examples:
        >>> y_true = np.arange(400) % 2
        >>> y_pred = np.where(np.arange(400) % 10 < 2, 1 - y_true, y_true)  # 80 % correct
        >>> scored = Scored(y_true, np.eye(2)[y_pred], np.arange(400), positive=1)
        >>> measured = measure(scored, {"0.5": y_pred})
        >>> " ".join(f"{number:.2f}" for number in measured.points["0.5"]["accuracy"])
        '0.80 0.76 0.84'
    """
    blocks: list[Resampled] = []
    if scored.patients.max() > 0:
        blocks = [resample(scored, y_pred, weights) for weights in patient_weights(scored.patients, resamples, seed)]

    by_class = [curve_values(score, scored) for score in (roc_auc_score, average_precision_score)]
    return Measured(
        {name: _interval(value, [block.free[name] for block in blocks]) for name, value in values(scored).items()},
        {
            point: {
                name: _interval(value, [block.points[point][name] for block in blocks])
                for name, value in values(scored, classes).items()
            }
            for point, classes in y_pred.items()
        },
        [
            Curve(
                label,
                scored.y_true == label,
                scored.y_prob[:, label],
                _interval(auc, [block.auc[:, i] for block in blocks]),
                _interval(average_precision, [block.average_precision[:, i] for block in blocks]),
                _percentiles([block.bands[:, i] for block in blocks]) if blocks else np.full((2, 101), np.nan),
            )
            for i, (label, auc, average_precision) in enumerate(zip(scored.measured, *by_class, strict=True))
        ],
    )


def resample(scored: Scored, y_pred: dict[str, np.ndarray], weights: np.ndarray) -> Resampled:
    """Compute the metrics of R resamples at once; they equal scikit-learn's with `sample_weight`.

    Args:
        scored: N images.
        y_pred: by operating point, the predicted class of each image (N,).
        weights: (R, N), how often each image is drawn.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # an undefined metric is NaN
        rankings = Rankings(scored, weights)
        counts = {point: Counts.of(scored, classes, weights) for point, classes in y_pred.items()}
        return Resampled(
            {m.name: m.resampled(rankings) for m in METRICS.values() if not m.needs_threshold},
            {
                point: {m.name: m.resampled(of_point) for m in METRICS.values() if m.needs_threshold}
                for point, of_point in counts.items()
            },
            *rankings.curves,
        )


def patient_weights(patients: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draw patients with replacement, and count how often each of their images is drawn.

    Args:
        patients: (N,), the number of each image's patient, from 0 on.
        resamples: how often to draw.
        seed: of the random numbers.

    Yields:
        (some of the resamples, N).

    Examples:
        The images of a patient are drawn together, so the first two columns are equal.

        >>> next(patient_weights(np.array([0, 0, 1]), resamples=3, seed=0)).tolist()
        [[0.0, 0.0, 2.0], [1.0, 1.0, 1.0], [2.0, 2.0, 0.0]]
    """
    rng = np.random.default_rng(seed)
    count = int(patients.max()) + 1
    rows = max(1, _ELEMENTS // len(patients))
    for start in range(0, resamples, rows):
        n = min(rows, resamples - start)
        drawn = rng.integers(count, size=(n, count)) + count * np.arange(n)[:, None]
        times = np.bincount(drawn.ravel(), minlength=n * count).reshape(n, count)
        yield times.astype(np.float64)[:, patients]


def _interval(value: float, blocks: list[np.ndarray]) -> Interval:
    """Return a metric with its interval from resamples (R,) in blocks; without blocks, or undefined, it has none."""
    if not blocks or np.isnan(value):
        return Interval(float(value), np.nan, np.nan)
    low, high = _percentiles(blocks)
    return Interval(float(value), float(low), float(high))


def _percentiles(blocks: list[np.ndarray]) -> np.ndarray:
    """Return the 2.5th and 97.5th percentile (2, ...) of values (R, ...) in blocks, without the undefined ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # undefined in all resamples
        return np.nanpercentile(np.concatenate(blocks), [2.5, 97.5], axis=0)
