"""Chooses the temperature and the decision threshold on the validation split at the end of a fit.

Neither is ever chosen on the data that a model is evaluated on.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

MIN_IMAGES = 50
"""With fewer validation images, or fewer than `MIN_OF_A_CLASS` of one class, nothing is chosen."""
MIN_OF_A_CLASS = 10
MAX_TEMPERATURE = 20.0
"""The smallest temperature is 1 / `MAX_TEMPERATURE`."""


@dataclass(frozen=True)
class Calibration:
    """Turns a network's outputs into probabilities and a decision.

    Probabilities are softmax(logits / `temperature`). An image is predicted positive if its probability is at least
    `threshold`, which is None where there is no positive class to decide on.
    """

    temperature: float = 1.0
    threshold: float | None = 0.5
    note: str = "not calibrated"  # how they were chosen, for people
    calibrated: bool = False  # whether the temperature was estimated on validation images


def calibrate(
    logits: np.ndarray, targets: np.ndarray, positive: int | None, target_sensitivity: float | None = None
) -> Calibration:
    """Choose the temperature, and the threshold on the probabilities that it gives.

    With no validation errors the temperature cannot be estimated: the likelihood grows as it falls to zero.

    Args:
        logits: (N, classes), of the validation split.
        targets: (N,), indices of classes.
        positive: the index of the class to detect, or None.
        target_sensitivity: see `choose_threshold`.
    """
    counts = np.bincount(targets, minlength=logits.shape[1])
    uncalibrated_threshold = None if positive is None else 0.5
    if len(targets) < MIN_IMAGES or counts.min() < MIN_OF_A_CLASS:
        note = f"not calibrated: {len(targets)} validation images, {counts.min()} of the rarest class, are too few"
        return Calibration(1.0, uncalibrated_threshold, note)
    images = f"{len(targets)} validation images"
    calibrated = bool((logits.argmax(axis=1) != targets).any())
    if calibrated:
        temperature = choose_temperature(logits, targets)
        note = f"from {images}," if positive is not None else f"temperature from {images}"
    else:
        temperature = 1.0
        note = f"not calibrated: without errors on {images} the temperature cannot be estimated"
        note += "; threshold" if positive is not None else ""
    threshold = None
    if positive is not None:
        scores = softmax(logits / temperature, axis=1)[:, positive]
        threshold = choose_threshold(scores, targets == positive, target_sensitivity)
        note += " by " + ("Youden's J" if target_sensitivity is None else f"sensitivity {target_sensitivity:g}")
    if not 1.05 / MAX_TEMPERATURE < temperature < MAX_TEMPERATURE / 1.05:
        note += "; the temperature is at its limit, so the probabilities are unreliable: train longer"
    return Calibration(temperature, threshold, note, calibrated)


def losses(logits: np.ndarray, targets: np.ndarray, temperature: float) -> np.ndarray:
    """Return the negative log-likelihood of each image (N,)."""
    return -log_softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)[np.arange(len(targets)), targets]


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the temperature with the lowest negative log-likelihood, from 1 / `MAX_TEMPERATURE` to `MAX_TEMPERATURE`
    (Guo et al., On Calibration of Modern Neural Networks, ICML 2017)."""
    bound = np.log(MAX_TEMPERATURE)

    def loss(log_temperature: float) -> float:
        return losses(logits, targets, np.exp(log_temperature)).mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6}).x))


def choose_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the largest temperature whose negative log-likelihood is within one standard error of the lowest.

    It is at most twice the temperature of the lowest. Validation images are like the training images, new images often
    are not; on these, the best temperature of the validation images is overconfident. In two fits, on images held out
    because they differ from the others (`tests/benchmarks/shift.py`), the negative log-likelihood was 0.73 and 0.47
    with the best temperature, and 0.50 and 0.39 with this one. On validation images it rose from 0.012 to 0.019 and
    from 0.067 to 0.083.
    """
    best = fit_temperature(logits, targets)
    lowest = losses(logits, targets, best)
    max_loss = lowest.mean() + lowest.std() / np.sqrt(len(targets))
    warmer = np.geomspace(best, min(2 * best, MAX_TEMPERATURE), 101)
    return float(max([best, *(value for value in warmer if losses(logits, targets, value).mean() <= max_loss)]))


def choose_threshold(scores: np.ndarray, positives: np.ndarray, target_sensitivity: float | None = None) -> float:
    """Choose the lowest probability at which an image is predicted positive.

    By default this uses Youden's J, sensitivity + specificity - 1 (Index for rating diagnostic tests, Cancer 1950): of
    the thresholds whose J is within one standard error of the highest, it takes the one nearest 0.5. The threshold with
    the highest J depends on single images if a model makes few errors: in two fits with different seeds it was 0.14 and
    0.54, where this rule gave 0.44 and 0.53.

    Args:
        scores: (N,), probability of the positive class.
        positives: (N,), true where the image is of that class.
        target_sensitivity: the sensitivity to reach, with the highest specificity that allows it; None uses J.

    Returns:
        A value halfway between two scores.
    """
    values = np.unique(scores)
    candidates = (values[1:] + values[:-1]) / 2 if len(values) > 1 else np.array([0.5])
    sorted_positive, sorted_negative = np.sort(scores[positives]), np.sort(scores[~positives])
    sensitivity = 1 - np.searchsorted(sorted_positive, candidates) / len(sorted_positive)
    specificity = np.searchsorted(sorted_negative, candidates) / len(sorted_negative)
    if target_sensitivity is None:
        j = sensitivity + specificity - 1
        best = j.argmax()
        variance = sensitivity[best] * (1 - sensitivity[best]) / len(sorted_positive)
        variance += specificity[best] * (1 - specificity[best]) / len(sorted_negative)
        good = candidates[j >= j[best] - np.sqrt(variance) - 1e-9]
        return float(good[np.abs(good - 0.5).argmin()])
    allowed = np.where(sensitivity >= target_sensitivity, specificity, -1.0)
    if allowed.max() < 0:  # not reached even at the lowest candidate
        return float(values[0])
    best = np.flatnonzero(np.isclose(allowed, allowed.max()))
    return float(candidates[best[len(best) // 2]])
