"""How well probabilities agree with frequencies: reliability bins, calibration error, slope and intercept.

The figures are those that Van Calster et al. recommend (Calibration: the Achilles heel of predictive analytics, BMC
Medicine 2019).
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from xray_fastai.metrics.scored import Scored

MAX_BINS = 100
"""Perfect predictions would get a bin for each image."""


class Bins(NamedTuple):
    """Reliability bins with about equally many images, by rising probability."""

    of_image: np.ndarray  # (N,): the bin of each image
    images: np.ndarray  # (bins,)
    probability: np.ndarray  # (bins,): the mean
    share: np.ndarray  # (bins,): of the images whose class is the true one


def reliability_bins(scored: Scored) -> Bins:
    """Put the images into as many bins of equal mass as keep the share rising with the probability.

    Bins of equal width leave some with few images, whose noise passes for miscalibration (Roelofs et al., Mitigating
    Bias in Calibration Error Estimation, AISTATS 2022, algorithm 1). Images of equal probability share a bin.
    """
    probability, _, outcome = scored.confidence
    ordered = np.sort(probability)
    chosen = None
    for count in range(1, min(MAX_BINS, len(ordered)) + 1):
        edges = ordered[np.arange(1, count) * len(ordered) // count]
        _, of_image = np.unique(np.searchsorted(edges, probability, side="right"), return_inverse=True)
        images = np.bincount(of_image)
        share = np.bincount(of_image, outcome) / images
        if (np.diff(share) < 0).any():
            break
        chosen = Bins(of_image, images, np.bincount(of_image, probability) / images, share)
    return chosen


def calibration_error(scored: Scored) -> float:
    """Return the expected calibration error: the mean gap between probability and share over `reliability_bins`.

    Of a calibrated model it is smaller than with bins of equal width, but not 0. A bootstrap moves it upwards once
    more, so it has no interval.

    Examples:
        Ten images at 0.9, of which six are positive: the gap is 0.3.

        >>> y_true, positive = np.repeat([1, 0], [6, 4]), np.full(10, 0.9)
        >>> scored = Scored(y_true, np.stack([1 - positive, positive], axis=1), np.arange(10), positive=1)
        >>> round(calibration_error(scored), 3)
        0.3
    """
    bins = reliability_bins(scored)
    return float(np.average(np.abs(bins.probability - bins.share), weights=bins.images))


def slope(scored: Scored) -> tuple[float, np.ndarray]:
    """Return the calibration slope, and each image's influence on it (N,).

    It is the slope of a logistic regression of the outcome on the logit (Cox, Two further applications of a model for
    binary regression, Biometrika 1958). The patients' sums of the influence give the sandwich estimate of its variance.
    NaN where the logit separates the outcomes, since then no slope fits best.
    """
    _, logit, outcome = scored.confidence
    if _separated(logit, outcome):
        return np.nan, np.full(len(logit), np.nan)
    fitted = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-8).fit(logit[:, None], outcome)
    x = np.stack([np.ones_like(logit), logit], axis=1)  # (N, 2)
    z = x @ [fitted.intercept_[0], fitted.coef_[0, 0]]
    hessian = (x * (expit(z) * expit(-z))[:, None]).T @ x
    return float(fitted.coef_[0, 0]), (x * (outcome - expit(z))[:, None]) @ np.linalg.inv(hessian)[:, 1]


def intercept(scored: Scored) -> tuple[float, np.ndarray]:
    """Return the calibration intercept, and each image's influence on it (N,).

    It is what added to each logit makes the mean probability right, with a slope of 1 (Van Calster et al. 2019). NaN
    where all outcomes are equal.
    """
    _, logit, outcome = scored.confidence
    if outcome.all() or not outcome.any():
        return np.nan, np.full(len(logit), np.nan)
    limit = np.abs(logit).max() + 50
    fitted = brentq(lambda added: (outcome - expit(logit + added)).mean(), -limit, limit)
    z = logit + fitted
    return float(fitted), (outcome - expit(z)) / (expit(z) * expit(-z)).sum()


def _separated(logit: np.ndarray, outcome: np.ndarray) -> bool:
    """Return whether a threshold, upwards or downwards, tells the outcomes apart, equal logits aside."""
    if outcome.all() or not outcome.any():
        return True
    right, wrong = logit[outcome], logit[~outcome]
    return bool(right.min() >= wrong.max() or wrong.min() >= right.max())
