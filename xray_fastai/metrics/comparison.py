"""Paired differences of metrics between two models on the same images, with 95 % intervals by patient.

The influence of an image on the difference is the difference of its influences on both metrics, so what the models have
in common cancels. The patients' sums give the variance that a bootstrap over patients estimates, without drawing
(`influence`). `scipy.stats.bootstrap` draws images, not patients, so it would take the images of a patient for
independent.

A share's interval combines the two of `intervals.share_interval` with their correlation (Newcombe, Improved confidence
intervals for the difference between binomial proportions based on paired data, Statistics in Medicine 1998, method 10;
Zou & Donner, Construction of confidence limits about effect measures, Statistics in Medicine 2008). Other metrics get
Student's t. The standard error of the difference of two AUCs is that of DeLong, DeLong & Clarke-Pearson (Comparing the
areas under two or more correlated receiver operating characteristic curves, Biometrics 1988), with sums by patient
that of Obuchowski (Biometrics 1997). `tests/benchmarks/paired.py` measures how often the intervals hold the truth.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, t

from xray_fastai.metrics.influence import Shares
from xray_fastai.metrics.intervals import (
    AT_SPECIFICITY,
    RESAMPLES,
    Interval,
    patient_weights,
    sensitivities,
    share_interval,
    student_error,
    student_interval,
    sums_by_patient,
)
from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import METRICS, Metric

_ZERO = 1e-12


class Difference(NamedTuple):
    """A metric of both models, and b less a with its 95 % interval; NaN where undefined."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float = np.nan  # that the difference is 0; NaN where `test` is ""
    test: str = ""


class Called(NamedTuple):
    """A model's predictions of N images."""

    scored: Scored
    y_pred: np.ndarray  # (N,), at the model's own threshold


def compare_metrics(a: Called, b: Called, resamples: int = RESAMPLES) -> dict[str, Difference]:
    """Compute every metric of two models on the same images, and the paired difference.

    With one image a patient, the AUC has DeLong's test, and accuracy, sensitivity and specificity McNemar's exact one:
    both take images for independent. With more images of a patient these have tests that sum by patient (Obuchowski,
    Biometrics 1997; On the comparison of correlated proportions for clustered data, Statistics in Medicine 1998). With
    more than two classes only the accuracy is tested.

    The test of the AUC has the standard error and Student's t of its interval: p is below 0.05 where the interval
    leaves out 0, also with few images. (DeLong et al. take the normal law, which is for many images.) McNemar's test
    and Newcombe's interval are made of other figures, and may differ near 0.05.

    Args:
        a: the predictions of the first model.
        b: those of the second, of the same images in the same order, with the same classes.
        resamples: how often patients are drawn for the interval of the sensitivity at a given specificity.

    Examples:
        The second model finds 20 positive images that the first overlooks.

        >>> y_true = np.repeat([1, 0], 100)
        >>> calls = [np.where(np.arange(200) < found, 1, 0) for found in (70, 90)]
        >>> a, b = (Called(Scored(y_true, np.eye(2)[y], np.arange(200), positive=1), y) for y in calls)
        >>> found = compare_metrics(a, b)["sensitivity"]
        >>> f"{found.difference:.2f} ({found.low:.2f} to {found.high:.2f}), p = {found.p:.1e} by {found.test}"
        "0.20 (0.12 to 0.28), p = 1.9e-06 by McNemar's exact test"
    """
    found = {}
    for name, metric in METRICS.items():
        values = [float(metric.value(*one)) for one in (a, b)]
        difference = values[1] - values[0]
        low, high = (np.nan, np.nan) if np.isnan(difference) else _interval(metric, a, b, difference, resamples)
        p, test = (np.nan, "") if np.isnan(difference) else _test(name, a, b, difference)
        found[name] = Difference(*values, difference, low, high, p, test)
    return found


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> float:
    """Return the p-value of McNemar's exact test: whether two models are right equally often.

    Only the images that one alone has right count: are they each model's with a probability of 0.5? (McNemar, Note on
    the sampling error of the difference between correlated proportions or percentages, Psychometrika 1947.)

    Args:
        right_a: (N,), which of N independent images the first model has right.
        right_b: (N,), the same of the second.
    """
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _interval(metric: Metric, a: Called, b: Called, difference: float, resamples: int) -> tuple[float, float]:
    if metric.scale is None:
        return np.nan, np.nan
    if metric.scale == "curve":
        return _interval_at_specificity(a.scored, b.scored, difference, resamples)
    spreads = [metric.spread(*one) for one in (a, b)]
    if metric.scale == "share":
        return _share_interval(*spreads, a.scored.patients)
    return student_interval(difference, spreads[1] - spreads[0], a.scored.patients, "real")


def _share_interval(a: Shares, b: Shares, patients: np.ndarray) -> tuple[float, float]:
    """Return the limits of the mean of b's shares less that of a's."""
    intervals = [Interval(float(shares.values.mean()), *share_interval(shares, patients)) for shares in (a, b)]
    return limits_of_difference(*intervals, *(sums_by_patient(influence_of(shares), patients) for shares in (a, b)))


def limits_of_difference(a: Interval, b: Interval, of_a: np.ndarray, of_b: np.ndarray) -> tuple[float, float]:
    """Return the limits of b less a, from both intervals and their correlation (Zou & Donner 2008).

    Args:
        a: a metric of some images.
        b: the same metric of others, or another of the same.
        of_a: (patients,), the sum of the influences on a of each patient's images; 0 of a patient without any.
        of_b: (patients,), the same on b.
    """
    scale = np.sqrt((of_a**2).sum() * (of_b**2).sum())
    correlation = (of_a * of_b).sum() / scale if scale > _ZERO else 0.0

    def reach(x: float, y: float) -> float:
        return float(np.sqrt(max(x**2 + y**2 - 2 * correlation * x * y, 0.0)))

    difference = b.value - a.value
    return (
        difference - reach(b.value - b.low, a.high - a.value),
        difference + reach(b.high - b.value, a.value - a.low),
    )


def influence_of(spread: Shares | np.ndarray) -> np.ndarray:
    """Return each image's influence (N,) on a metric, from what `Metric.spread` gives."""
    return spread.influence.mean(axis=1) if isinstance(spread, Shares) else spread


def _interval_at_specificity(a: Scored, b: Scored, difference: float, resamples: int) -> tuple[float, float]:
    """Return Student's limits with the standard error of a bootstrap that draws the same patients for both models.

    A height of the ROC curve has no influence function without the scores' density.
    """
    if a.positive is None:
        return np.nan, np.nan
    positive = a.y_true == a.positive
    fewest = min(np.unique(a.patients[side]).size for side in (positive, ~positive))
    if fewest < 2:
        return np.nan, np.nan
    sides = [one.against_the_rest(a.positive) for one in (a, b)]
    drawn = [
        np.subtract(*(sensitivities(one, weights)[:, AT_SPECIFICITY] for one in sides))
        for weights in patient_weights(a.patients, resamples)
    ]
    half = float(t.ppf(0.975, fewest - 1) * np.nanstd(np.concatenate(drawn)))
    return (difference - half, difference + half) if half > _ZERO else (np.nan, np.nan)


def _test(name: str, a: Called, b: Called, difference: float) -> tuple[float, str]:
    """Return a p-value and its test's name, or NaN and nothing."""
    y_true, positive = a.scored.y_true, a.scored.positive
    if name == "accuracy":
        among = np.full(len(y_true), True)
    elif positive is not None and name in ("roc_auc", "sensitivity", "specificity"):
        among = (y_true == positive) != (name == "specificity")
    else:
        return np.nan, ""
    patients = a.scored.patients
    one_each = len(np.unique(patients)) == len(patients)
    if name == "roc_auc" or not one_each:
        spreads = [METRICS[name].spread(*one) for one in (a, b)]
        error, freedom = student_error(influence_of(spreads[1]) - influence_of(spreads[0]), patients)
        return float(2 * t.sf(abs(difference) / error, freedom)), f"{'DeLong' if one_each else 'Obuchowski'}'s test"
    right = [(one.y_pred == y_true)[among] for one in (a, b)]
    return mcnemar(*right), "McNemar's exact test"
