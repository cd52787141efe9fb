"""What is settled on the validation split at the end of a fit: the temperature and the decision threshold.

Neither is ever chosen on the data that a model is evaluated on.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

ENOUGH_IMAGES = 50
"""Fewer validation images, or fewer than `ENOUGH_OF_A_CLASS` of one class, settle nothing: both stay as they are."""
ENOUGH_OF_A_CLASS = 10
LIMIT = 20.0
"""The largest temperature; the smallest is one divided by it."""


@dataclass(frozen=True)
class Calibration:
    """What turns a network's outputs into a decision.

    Probabilities are softmax(logits / `temperature`); an image is called positive from `threshold` on. `threshold` is
    None where there is no positive class to decide on.
    """

    temperature: float = 1.0
    threshold: float | None = 0.5
    note: str = "not calibrated"


def calibrate(
    logits: np.ndarray, targets: np.ndarray, positive: int | None, target_sensitivity: float | None = None
) -> Calibration:
    """Choose the temperature, and the threshold on the probabilities that it gives.

    Args:
        logits: (N, classes), of the validation split.
        targets: (N,), indices of classes.
        positive: the index of the class to detect, or None.
        target_sensitivity: see `choose_threshold`.
    """
    counts = np.bincount(targets, minlength=logits.shape[1])
    start = None if positive is None else 0.5
    if len(targets) < ENOUGH_IMAGES or counts.min() < ENOUGH_OF_A_CLASS:
        note = f"not calibrated: {len(targets)} validation images, {counts.min()} of the rarest class, are too few"
        return Calibration(1.0, start, note)
    images = f"{len(targets)} validation images"
    if (logits.argmax(axis=1) == targets).all():  # the surer, the likelier: there is no best temperature
        temperature, note = 1.0, f"not calibrated: {images}, all called rightly, tell no temperature"
        note += "; threshold" if positive is not None else ""
    else:
        temperature = choose_temperature(logits, targets)
        note = f"from {images}," if positive is not None else f"temperature from {images}"
    threshold = None
    if positive is not None:
        scores = softmax(logits / temperature, axis=1)[:, positive]
        threshold = choose_threshold(scores, targets == positive, target_sensitivity)
        note += " by " + ("Youden's J" if target_sensitivity is None else f"sensitivity {target_sensitivity:g}")
    if not 1.05 / LIMIT < temperature < LIMIT / 1.05:
        note += "; the temperature is at its limit, so the probabilities mean little: train longer"
    return Calibration(temperature, threshold, note)


def losses(logits: np.ndarray, targets: np.ndarray, temperature: float) -> np.ndarray:
    """The negative log-likelihood of each image (N,)."""
    return -log_softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)[np.arange(len(targets)), targets]


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The temperature that minimises the negative log-likelihood (Guo et al., On Calibration of Modern Neural Networks,
    ICML 2017), from 1/`LIMIT` to `LIMIT`."""
    bound = np.log(LIMIT)

    def loss(log_temperature: float) -> float:
        return losses(logits, targets, np.exp(log_temperature)).mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6}).x))


def choose_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Of the temperatures from the best to its double, the largest whose negative log-likelihood is within one standard
    error of the best's.

    Validation images are like those trained on, new ones often are not; there the best temperature is too sure. Two
    fits had on images held out for being unlike the others (`tests/benchmarks/shift.py`) a negative log-likelihood of
    0.73 and 0.47 by the best temperature, and of 0.50 and 0.39 by this one; on validation 0.012 and 0.067 became 0.019
    and 0.083.
    """
    best = fit_temperature(logits, targets)
    least = losses(logits, targets, best)
    most = least.mean() + least.std() / np.sqrt(len(targets))
    warmer = np.geomspace(best, min(2 * best, LIMIT), 101)
    return float(max([best, *(value for value in warmer if losses(logits, targets, value).mean() <= most)]))


def choose_threshold(scores: np.ndarray, positives: np.ndarray, target_sensitivity: float | None = None) -> float:
    """The probability from which an image is called positive.

    Args:
        scores: (N,), probability of the positive class.
        positives: (N,), true where the image is of that class.
        target_sensitivity: the sensitivity to reach, at the highest specificity that allows it; None takes Youden's J,
            sensitivity + specificity - 1 (Index for rating diagnostic tests, Cancer 1950): of the thresholds whose J is
            within one standard error of the best, the one nearest 0.5. The best itself depends on single images where a
            model errs rarely: of two fits with different seeds it was 0.14 in one and 0.54 in the other, where this is
            0.44 and 0.53.

    Returns:
        A value halfway between two scores.
    """
    values = np.unique(scores)
    candidates = (values[1:] + values[:-1]) / 2 if len(values) > 1 else np.array([0.5])
    ranked_positive, ranked_negative = np.sort(scores[positives]), np.sort(scores[~positives])
    sensitivity = 1 - np.searchsorted(ranked_positive, candidates) / len(ranked_positive)
    specificity = np.searchsorted(ranked_negative, candidates) / len(ranked_negative)
    if target_sensitivity is None:
        value = sensitivity + specificity
        best = value.argmax()
        variance = sensitivity[best] * (1 - sensitivity[best]) / len(ranked_positive)
        variance += specificity[best] * (1 - specificity[best]) / len(ranked_negative)
        good = candidates[value >= value[best] - np.sqrt(variance) - 1e-9]
        return float(good[np.abs(good - 0.5).argmin()])
    value = np.where(sensitivity >= target_sensitivity, specificity, -1.0)
    if value.max() < 0:  # not reached even at the lowest candidate
        return float(values[0])
    best = np.flatnonzero(np.isclose(value, value.max()))
    return float(candidates[best[len(best) // 2]])
