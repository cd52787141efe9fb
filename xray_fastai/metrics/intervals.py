"""Metrics with 95 % intervals that respect that images of one patient are not independent.

A share of images gets Wilson's interval with the effective number of images (Rao & Scott, A simple method for the
analysis of clustered binary data, Biometrics 1992; with Student's t, as Dean & Pagano, Evaluating confidence interval
methods for binomial proportions in clustered surveys, J Surv Stat Methodol 2015). A mean of shares combines theirs
(Zou, Huang & Zhang, A note on confidence interval estimation for a linear function of binomial proportions, CSDA 2009).

Any other metric gets Student's t interval, on a scale on which it has no limits. Few patients may cause most of the
variance, which makes its estimate uncertain; the degrees of freedom follow from the kurtosis of the patients' influence
(Shoemaker, Fixing the F test for equal variances, The American Statistician 2003).

`tests/benchmarks/coverage.py` measures how often the intervals hold the truth.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import expit, logit
from scipy.stats import t

from xray_fastai.metrics.calibration import reliability_bins
from xray_fastai.metrics.influence import Shares
from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import FALSE_POSITIVE_RATE, METRICS, Metric, values

FALSE_POSITIVE_RATES = np.linspace(0, 1, 101)
"""Where the interval of a ROC curve is computed."""
AT_SPECIFICITY = int(np.searchsorted(FALSE_POSITIVE_RATES, FALSE_POSITIVE_RATE))
"""The place among them of the metric "sensitivity at a specificity of 0.90"."""
RESAMPLES = 2000
SEED = 0
_ELEMENTS = 100_000
"""Weights computed at once: of 1e5, 4e5, 1e6 and 4e6 the fastest at 624 and at 5,856 images (0.2 and 0.6 s)."""
_ZERO = 1e-12
"""What rounding leaves of a variance that is 0."""
_NONE = (np.nan, np.nan)


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
    band: np.ndarray  # (2, 101): lowest and highest sensitivity at each of `FALSE_POSITIVE_RATES`


class ReliabilityBin(NamedTuple):
    """A bin of `calibration.reliability_bins`."""

    images: int
    probability: float  # the mean
    share: Interval  # of the images whose class is the true one


@dataclass(frozen=True)
class Measured:
    """Metrics by name: `free` needs no threshold, `points` has those of each operating point."""

    free: dict[str, Interval]
    points: dict[str, dict[str, Interval]]
    curves: list[Curve]
    reliability: list[ReliabilityBin]


def measure(scored: Scored, y_pred: dict[str, np.ndarray], resamples: int = RESAMPLES) -> Measured:
    """Compute all metrics with 95 % intervals.

    Where nothing can be said there is no interval: images of a single patient, or the same error in all images.

    Args:
        scored: N images.
        y_pred: by operating point, the predicted class of each image (N,).
        resamples: how often patients are drawn for the intervals of the ROC curve.

    Examples:
        >>> y_true = np.arange(400) % 2
        >>> y_pred = np.where(np.arange(400) % 10 < 2, 1 - y_true, y_true)  # 80 % correct
        >>> scored = Scored(y_true, np.eye(2)[y_pred], np.arange(400), positive=1)
        >>> measured = measure(scored, {"0.5": y_pred})
        >>> " ".join(f"{number:.2f}" for number in measured.points["0.5"]["accuracy"])
        '0.80 0.76 0.84'
    """
    curves = [
        Curve(
            label,
            one.y_true == 1,
            one.y_prob[:, 1],
            interval_of("roc_auc", one),
            interval_of("average_precision", one),
            _band(one, resamples),
        )
        for label in scored.measured
        for one in [scored.against_the_rest(label)]
    ]
    free = _intervals(scored, None)
    if scored.positive is not None:
        name = "sensitivity_at_90_specificity"
        free[name] = Interval(free[name].value, *curves[0].band[:, AT_SPECIFICITY].tolist())
    return Measured(
        free,
        {point: _intervals(scored, classes) for point, classes in y_pred.items()},
        curves,
        _reliability(scored),
    )


def interval_of(name: str, scored: Scored, level: float = 0.95, y_pred: np.ndarray | None = None) -> Interval:
    """Compute a metric with its interval of the given level; `y_pred` (N,) is for those that need a threshold."""
    return _interval(METRICS[name], float(METRICS[name].value(scored, y_pred)), scored, y_pred, level)


def share_interval(shares: Shares, patients: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of the mean of K shares; NaN where the images of a share are of one patient.

    The effective number of images is the one whose binomial variance is the variance between patients. It is at most
    the number of images. Without an error, or without a hit, it is the number of patients.

    Args:
        shares: of N images.
        patients: (N,), the number of each image's patient, from 0 on.
        level: the share of intervals that hold the truth.
    """
    of_patient = sums_by_patient(shares.influence, patients)  # (patients, K)
    counts = (sums_by_patient(shares.weights, patients) > 0).sum(axis=0)  # (K,): patients with images that count
    if counts.min() < 2:
        return _NONE
    p, quantile = shares.values, t.ppf((1 + level) / 2, counts - 1)
    covariance = of_patient.T @ of_patient  # (K, K)
    error = np.sqrt(np.diag(covariance) * counts / (counts - 1))
    low, high = _wilson(p, _effective_number(p, error, counts, shares.weights.sum(axis=0)), quantile)
    scale = np.sqrt(np.diag(covariance))
    with np.errstate(invalid="ignore"):
        correlation = np.where(scale * scale[:, None] > 0, covariance / (scale * scale[:, None]), np.eye(len(p)))
    below, above = p - low, high - p
    return (
        float(p.mean() - np.sqrt(below @ correlation @ below) / len(p)),
        float(p.mean() + np.sqrt(above @ correlation @ above) / len(p)),
    )


def student_interval(
    value: float,
    influence: np.ndarray,
    patients: np.ndarray,
    scale: Literal["unit", "positive", "real"],
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the interval of a metric; NaN with images of one patient, or where all patients agree.

    Args:
        value: the metric.
        influence: (N,), that of each image.
        patients: (N,), the number of each image's patient, from 0 on.
        scale: the logit of a metric from 0 to 1, the logarithm of a positive one, or the metric itself.
        level: the share of intervals that hold the truth.
    """
    error, freedom = student_error(influence, patients)
    if np.isnan(error):
        return _NONE
    half = t.ppf((1 + level) / 2, freedom) * error
    if scale == "unit":
        center, half = logit(value), half / (value * (1 - value))
        return float(expit(center - half)), float(expit(center + half))
    if scale == "positive":
        return float(value * np.exp(-half / value)), float(value * np.exp(half / value))
    return float(value - half), float(value + half)


def student_error(influence: np.ndarray, patients: np.ndarray) -> tuple[float, float]:
    """Return a metric's standard error and its degrees of freedom; NaN with one patient, or where all patients agree.

    Args:
        influence: (N,), that of each image.
        patients: (N,), the number of each image's patient, from 0 on.
    """
    of_patient = sums_by_patient(influence, patients)
    m, squares = len(of_patient), (of_patient**2).sum()
    if m < 2 or np.sqrt(squares) < _ZERO:
        return _NONE
    kurtosis = m * (of_patient**4).sum() / squares**2
    return float(np.sqrt(m / (m - 1) * squares)), min(m - 1, 2 * m / (kurtosis - (m - 3) / (m - 1)))


def patient_weights(patients: np.ndarray, resamples: int, seed: int = SEED) -> Iterator[np.ndarray]:
    """Draw patients with replacement, and count how often each of their images is drawn.

    Args:
        patients: (N,), the number of each image's patient, from 0 on.
        resamples: how often to draw.
        seed: of the random numbers.

    Yields:
        (some of the resamples, N).

    Examples:
        The images of a patient are drawn together, so the first two columns are equal.

        >>> next(patient_weights(np.array([0, 0, 1]), resamples=3)).tolist()
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


def sensitivities(scored: Scored, weights: np.ndarray) -> np.ndarray:
    """Return the sensitivity at `FALSE_POSITIVE_RATES` (R, 101) of R weightings (R, N) of images of two classes.

    NaN where a weighting has images of one class only.
    """
    scores = scored.y_prob[:, 1]
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))  # of groups with the same score, highest first
    weights = weights[:, order]
    zero = np.zeros((len(weights), 1))
    rates = []
    for of_class in (0, 1):
        counted = np.add.reduceat(weights * (scored.y_true == of_class)[order], starts, axis=1).cumsum(axis=1)
        with np.errstate(invalid="ignore"):
            rates.append(np.hstack([zero, counted / counted[:, -1:]]))  # (R, groups + 1)
    found = np.stack([np.interp(FALSE_POSITIVE_RATES, *pair) for pair in zip(*rates, strict=True)])
    found[np.isnan(rates[0][:, -1]) | np.isnan(rates[1][:, -1])] = np.nan
    return found


def _intervals(scored: Scored, y_pred: np.ndarray | None) -> dict[str, Interval]:
    return {name: _interval(METRICS[name], value, scored, y_pred) for name, value in values(scored, y_pred).items()}


def _interval(metric: Metric, value: float, scored: Scored, y_pred: np.ndarray | None, level: float = 0.95) -> Interval:
    if metric.scale in (None, "curve") or np.isnan(value):
        return Interval(value, *_NONE)
    spread = metric.spread(scored, y_pred)
    if isinstance(spread, Shares):
        return Interval(value, *share_interval(spread, scored.patients, level))
    if metric.scale == "unit" and value in (0, 1):
        return Interval(value, *_of_perfect_order(value, scored, level))
    return Interval(value, *student_interval(value, spread, scored.patients, metric.scale, level))


def _reliability(scored: Scored) -> list[ReliabilityBin]:
    """Return the reliability bins with the intervals of their shares."""
    bins, outcome = reliability_bins(scored), scored.confidence[2][:, None]
    intervals = [
        share_interval(Shares(outcome, (bins.of_image == i)[:, None].astype(float)), scored.patients)
        for i in range(len(bins.images))
    ]
    return [
        ReliabilityBin(int(images), float(probability), Interval(float(share), *limits))
        for images, probability, share, limits in zip(bins.images, bins.probability, bins.share, intervals, strict=True)
    ]


def _of_perfect_order(value: float, scored: Scored, level: float) -> tuple[float, float]:
    """Return the interval of an area of 1 or 0: Wilson's of as many hits, or errors, as the rarest class has patients.

    A perfect order has no variance that could be estimated.
    """
    patients = [
        np.unique(scored.patients[(scored.y_true == k) == side]).size for k in scored.measured for side in (True, False)
    ]
    count = min(patients)
    if count < 2:
        return _NONE
    low, high = _wilson(value, count, t.ppf((1 + level) / 2, count - 1))
    return float(low), float(high)


def _band(scored: Scored, resamples: int) -> np.ndarray:
    """Return the limits (2, 101) of the sensitivity at `FALSE_POSITIVE_RATES`, pointwise.

    They are Wilson's, with the effective number of images of a bootstrap over patients (Field & Welsh, Bootstrapping
    clustered data, JRSS B 2007). It follows from the mean and the standard error of the drawn sensitivities: with the
    sensitivity itself, which has steps, the number would fall at each step, and the lower limit with it. The curve
    never falls, so a lower limit holds for all higher rates of false positives too, and an upper one for all lower.
    """
    positive = scored.y_true == 1
    count = np.unique(scored.patients[positive]).size
    if count < 2 or positive.all():
        return np.full((2, len(FALSE_POSITIVE_RATES)), np.nan)
    drawn = np.concatenate([sensitivities(scored, w) for w in patient_weights(scored.patients, resamples)])
    (value,) = sensitivities(scored, np.ones((1, len(positive))))
    number = _effective_number(np.nanmean(drawn, axis=0), np.nanstd(drawn, axis=0), count, positive.sum())
    low, high = _wilson(value, number, t.ppf(0.975, count - 1))
    return np.stack([np.maximum.accumulate(low), np.minimum.accumulate(high[::-1])[::-1]])


def _effective_number(p: np.ndarray, error: np.ndarray, fewest: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Return the number of independent images (K,) whose shares p have these standard errors.

    Args:
        p: the shares.
        error: their standard errors.
        fewest: the number where p is 0 or 1.
        most: the largest number.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p * (1 - p) > _ZERO, np.minimum(p * (1 - p) / np.square(error), most), fewest)


def _wilson(p: np.ndarray, n: np.ndarray, quantile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's limits of shares p of n images, each (K,).

    Args:
        p: the shares.
        n: the effective number of images.
        quantile: of the distribution of the standardised error.
    """
    center = (p + quantile**2 / (2 * n)) / (1 + quantile**2 / n)
    half = quantile / (1 + quantile**2 / n) * np.sqrt(p * (1 - p) / n + quantile**2 / (4 * n**2))
    return np.minimum(center - half, p), np.maximum(center + half, p)


def sums_by_patient(values: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Return the sums (patients, ...) of values (N, ...) over the images of each patient."""
    sums = np.zeros((patients.max() + 1, *values.shape[1:]))
    np.add.at(sums, patients, values)
    return sums
