"""Images with their true class and predicted probabilities, and how well these are calibrated."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

BINS = 15
"""Bins of equal width for calibration, as in Guo et al., On Calibration of Modern Neural Networks, ICML 2017."""


@dataclass(frozen=True)
class Scored:
    """Images with their true class and predicted probabilities.

    Args:
        y_true: (N,), the index of each image's class.
        y_prob: (N, classes), the predicted probabilities.
        patients: (N,), the number of each image's patient, from 0 on.
        positive: the index of the class to detect; None measures all classes, each against the rest.
    """

    y_true: np.ndarray
    y_prob: np.ndarray
    patients: np.ndarray
    positive: int | None

    @property
    def classes(self) -> int:
        return self.y_prob.shape[1]

    @cached_property
    def present(self) -> list[int]:
        """The classes of which there are images."""
        return np.unique(self.y_true).tolist()

    @property
    def measured(self) -> list[int]:
        """The classes that a metric is averaged over, each against the rest."""
        return self.present if self.positive is None else [self.positive]

    @property
    def recalled(self) -> list[int]:
        """The classes whose recalls balanced accuracy averages."""
        return self.present if self.positive is None and len(self.present) > 1 else list(range(self.classes))

    @cached_property
    def squared_errors(self) -> np.ndarray:
        """(N,): the Brier score of each image."""
        if self.positive is not None:
            return (self.y_prob[:, self.positive] - (self.y_true == self.positive)) ** 2
        return ((self.y_prob - np.eye(self.classes)[self.y_true]) ** 2).sum(axis=1)

    @cached_property
    def confidence(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What calibration is measured on, each (N,): a probability, whether its class is the true one, its bin.

        Of two classes it is the probability of the positive class; of more, the probability of the most probable class,
        as in Guo et al.
        """
        y_pred = self.y_prob.argmax(axis=1) if self.positive is None else self.positive
        probability = self.y_prob[np.arange(len(self.y_true)), y_pred]
        bins = np.clip(np.ceil(probability * BINS).astype(int) - 1, 0, BINS - 1)
        return probability, self.y_true == y_pred, bins


def losses(y_prob: np.ndarray, y_true: np.ndarray) -> np.ndarray:
    """Return each image's loss (N,): -log of the probability of its true class, of `y_prob` (N, classes)."""
    of_truth = y_prob[np.arange(len(y_true)), y_true].astype(np.float64)
    return -np.log(np.maximum(of_truth, np.finfo(np.float64).tiny))


def calibration_error(scored: Scored, weights: np.ndarray) -> np.ndarray:
    """Return the expected calibration error (Guo et al. 2017, equation 3) of R weightings of the images.

    It is the mean gap between probability and frequency over `BINS` bins, each weighted by its images. Resampling adds
    noise to every bin, so a bootstrap interval lies somewhat too high.

    Args:
        scored: N images.
        weights: (R, N).

    Returns:
        (R,), from 0 to 1.

    Examples:
        Ten images at 0.9, of which six are positive: the gap is 0.3.

        >>> y_true, positive = np.repeat([1, 0], [6, 4]), np.full(10, 0.9)
        >>> scored = Scored(y_true, np.stack([1 - positive, positive], axis=1), np.arange(10), positive=1)
        >>> calibration_error(scored, np.ones((1, 10))).round(3).tolist()
        [0.3]
    """
    probability, outcome, bins = scored.confidence
    gaps = np.zeros((len(bins), BINS))
    gaps[np.arange(len(bins)), bins] = outcome - probability
    return np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1)
