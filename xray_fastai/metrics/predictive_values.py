"""PPV and NPV where the class to detect has another share than in the images that were evaluated.

By Bayes' theorem the odds of a PPV are the odds of the prevalence times the positive likelihood ratio, sensitivity / (1
- specificity); those of an NPV are the odds of its absence times specificity / (1 - sensitivity). Both ratios come from
the evaluated images, and the prevalence is taken for known (Mercaldo, Lau & Zhou, Confidence intervals for predictive
values with an emphasis to case-control studies, Statistics in Medicine 2007). They hold where the images of a class are
like those that were evaluated.

A ratio's interval combines the intervals of its two shares (MOVER: Donner & Zou, Closed-form confidence intervals for
functions of the normal mean and standard deviation, Statistical Methods in Medical Research 2012, here with the
correlation of the shares). These are Wilson's, by patient (`intervals.share_interval`). So there is an interval, too,
where no image is called wrongly.

Measured (`python -m tests.benchmarks.predictive_values`): see `tests/benchmarks/README.md`.
"""

from typing import NamedTuple

import numpy as np

from xray_fastai.metrics.influence import Shares
from xray_fastai.metrics.intervals import Interval, share_interval, sums_by_patient
from xray_fastai.metrics.scored import Scored


class PredictiveValues(NamedTuple):
    """PPV and NPV, each with its 95 % interval: numbers, or arrays (P,) where P prevalences were given. NaN where
    undefined."""

    ppv: Interval
    npv: Interval


def predictive_values(scored: Scored, y_pred: np.ndarray, prevalence: float | np.ndarray) -> PredictiveValues:
    """Compute PPV and NPV at a prevalence, with 95 % intervals by patient.

    Args:
        scored: N images of two classes, one of which is to be detected.
        y_pred: (N,), the predicted classes.
        prevalence: of the class to detect, above 0 and below 1; a number, or an array (P,).

    Examples:
        A test that finds 90 % and calls 5 % of the others, in a ward of 3 %:

        >>> y_true = np.repeat([1, 0], 200)
        >>> y_pred = np.where(np.arange(400) < 180, 1, np.arange(400) >= 390).astype(int)
        >>> scored = Scored(y_true, np.eye(2)[y_pred], np.arange(400), positive=1)
        >>> ppv, npv = predictive_values(scored, y_pred, 0.03)
        >>> " ".join(f"{number:.3f}" for number in [*ppv, *npv])
        '0.358 0.236 0.506 0.997 0.995 0.998'
    """
    present, called = scored.y_true == scored.positive, y_pred == scored.positive
    odds = np.asarray(prevalence) / (1 - np.asarray(prevalence))
    return PredictiveValues(
        _of_odds(odds, _ratio(called, present, scored.patients)),
        _of_odds(1 / odds, _ratio(~called, ~present, scored.patients)),
    )


def _of_odds(prior: np.ndarray, ratio: Interval) -> Interval:
    """Return the probability whose odds are prior * ratio; 1 of an infinite ratio."""
    with np.errstate(divide="ignore"):
        return Interval(*(prior / (prior + np.divide(1.0, number)) for number in ratio))


def _ratio(hits: np.ndarray, members: np.ndarray, patients: np.ndarray) -> Interval:
    """Return the share of `hits` (N,) among the `members` (N,) divided by that among the others, with its interval.

    The limits are the roots of (top - ratio * below)**2 = spread**2, where the spread is that of the difference by
    MOVER. Their form has no 0 in the denominator where the ratio is finite.
    """
    groups = np.stack([members, ~members], axis=1).astype(float)  # (N, 2)
    shares = Shares(np.stack([hits, hits], axis=1), groups)
    if not groups.any(axis=0).all() or not shares.values.any():
        return Interval(np.nan, np.nan, np.nan)
    top, below = shares.values
    (top_low, top_high), (below_low, below_high) = (
        share_interval(Shares(hits[:, None], groups[:, [k]]), patients) for k in (0, 1)
    )
    of_patient = sums_by_patient(shares.influence, patients)  # (patients, 2)
    scale = np.sqrt((of_patient**2).sum(axis=0).prod())
    correlation = of_patient.prod(axis=1).sum() / scale if scale > 0 else 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        low = _root(top, below, (top - top_low, below_high - below), correlation)
        inverse = _root(below, top, (below - below_low, top_high - top), correlation)
        return Interval(np.divide(top, below), low, np.divide(1.0, inverse))


def _root(top: float, below: float, distances: tuple[float, float], correlation: float) -> float:
    """Return the smaller root r of (top - r * below)**2 = a**2 + r**2 * b**2 - 2 * correlation * a * r * b, where a and
    b are the distances of `top` and `below` to their limits."""
    a, b = distances
    middle = top * below - correlation * a * b
    numerator = top**2 - a**2
    if numerator <= 0:
        return 0.0
    return numerator / (middle + np.sqrt(middle**2 - numerator * (below**2 - b**2)))
