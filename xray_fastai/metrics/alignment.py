"""Compares scores of images without labels with those of validation, and moves the operating point to fit them.

A score is the log odds of the class to detect. Two things move the scores of another place: its share of positive
images (prevalence shift), and how its images are taken (acquisition shift). Without labels they look alike in the mean,
but not in the shape: a prevalence shift mixes the two classes' distributions anew, and moves neither.

    Roschewitz et al., Automatic correction of performance drift under acquisition shift in medical image
    classification, Nature Communications 2023, doi 10.1038/s41467-023-42396-y (unsupervised prediction alignment)
    Roschewitz et al., Automatic dataset shift identification to support safe deployment of medical imaging AI, 2024,
    arXiv 2411.07940 (two-sample tests after a correction for the label shift)
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import kstwobign


def log_odds(outputs: np.ndarray, positive: int) -> np.ndarray:
    """Return the log odds (N,) of one of two classes, of a network's outputs (N, 2)."""
    outputs = np.asarray(outputs, dtype=np.float64)
    return outputs[:, positive] - outputs[:, 1 - positive]


def quantiles(scores: np.ndarray, number: int) -> list[float]:
    """Return so many quantiles of scores (N,), from the lowest to the highest score, to four decimals."""
    return np.quantile(scores, np.linspace(0, 1, number)).round(4).tolist()


@dataclass(frozen=True)
class Reference:
    """Holds how a model's scores were distributed on its validation images, by class."""

    negatives: np.ndarray  # (Q,), quantiles of the scores of the other class
    positives: np.ndarray  # (Q,), quantiles of the scores of the class to detect
    prevalence: float  # the share of the class to detect
    independent: float  # how many independent images they are worth: that of patients

    def below(self, scores: np.ndarray, prevalence: float) -> np.ndarray:
        """Return the share (N,) of images below each score (N,), if this share of images were positive."""
        levels = np.linspace(0, 1, len(self.negatives))
        low, high = (np.interp(scores, known, levels) for known in (self.negatives, self.positives))
        return (1 - prevalence) * low + prevalence * high

    def share_called(self, threshold: float, prevalence: float) -> float:
        """Return the share of images whose score is at least `threshold`, if this share were positive."""
        return float(1 - self.below(np.array([threshold]), prevalence)[0])


def matched(scores: np.ndarray, share: float) -> float:
    """Return the threshold from which this share of scores (N,) is called positive, halfway between two scores."""
    ordered = np.sort(scores)
    below = round((1 - share) * len(ordered))
    if below in (0, len(ordered)):  # none, or all: beyond the last one
        return float(np.nextafter(ordered[-1], np.inf) if below else ordered[0])
    return float((ordered[below - 1] + ordered[below]) / 2)


def distance(scores: np.ndarray, reference: Reference, prevalence: float) -> float:
    """Return the largest difference between the distributions of scores (N,) and of the reference at a prevalence.

    It is the statistic of Kolmogorov and Smirnov.
    """
    ordered, number = np.sort(scores), len(scores)
    expected = reference.below(ordered, prevalence)
    over, under = np.arange(1, number + 1) / number - expected, expected - np.arange(number) / number
    return float(max(over.max(), under.max()))


def p_value(largest: float, independent: float, reference: Reference) -> float:
    """Return the probability of a `distance` as large as this one by chance, where both have the same distribution.

    Args:
        largest: the distance.
        independent: how many independent images the scores are worth. Images of a patient are alike, so the number of
            patients is the cautious value.
        reference: the other sample.
    """
    number = independent * reference.independent / (independent + reference.independent)
    return float(kstwobign.sf(np.sqrt(number) * largest))
