"""Images with their true class, their predicted probabilities and their patient."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


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
        return self.present if self.positive is None else list(range(self.classes))

    def against_the_rest(self, label: int) -> "Scored":
        """Return the same images with two classes: 1 is the class `label`, 0 the rest."""
        score = self.y_prob[:, label]
        return Scored((self.y_true == label).astype(int), np.stack([1 - score, score], axis=1), self.patients, 1)

    @cached_property
    def squared_errors(self) -> np.ndarray:
        """(N,): the Brier score of each image."""
        if self.positive is not None:
            return (self.y_prob[:, self.positive] - (self.y_true == self.positive)) ** 2
        return ((self.y_prob - np.eye(self.classes)[self.y_true]) ** 2).sum(axis=1)

    @cached_property
    def confidence(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What calibration is measured on, each (N,): a probability, its logit, whether its class is the true one.

        Of two classes it is the probability of the positive class; of more, the probability of the most probable class,
        as in Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
        """
        y_pred = self.y_prob.argmax(axis=1) if self.positive is None else np.full(len(self.y_true), self.positive)
        probability = np.take_along_axis(self.y_prob, y_pred[:, None], axis=1)[:, 0].astype(np.float64)
        others = np.where(np.arange(self.classes) == y_pred[:, None], 0, self.y_prob).sum(axis=1)
        logit = _log(probability, np.finfo(np.float64).eps) - _log(others, np.finfo(np.float64).eps)
        return probability, logit, self.y_true == y_pred


def losses(y_prob: np.ndarray, y_true: np.ndarray) -> np.ndarray:
    """Return each image's loss (N,): -log of the probability of its true class, of `y_prob` (N, classes)."""
    return -_log(y_prob[np.arange(len(y_true)), y_true])


def _log(probability: np.ndarray, least: float = np.finfo(np.float64).tiny) -> np.ndarray:
    return np.log(np.maximum(probability.astype(np.float64), least))
