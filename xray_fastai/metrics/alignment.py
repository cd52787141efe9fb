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

LEVELS = np.linspace(0.01, 0.99, 99)
"""Shares of images at whose quantiles a move of all scores is looked for."""
LEVEL = 0.05
"""A distance that chance exceeds less often than this counts as a difference."""


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

    def quantiles(self, levels: np.ndarray, prevalence: float) -> np.ndarray:
        """Return the scores (L,) below which these shares (L,) of images are, if this share were positive."""
        scores = np.sort(np.concatenate([self.negatives, self.positives]))
        return np.interp(levels, self.below(scores, prevalence), scores)

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


@dataclass(frozen=True)
class Alignment:
    """Holds the operating point on local images that stands for one of validation's, and what the scores say of it.

    Each p is the probability of scores as far from a distribution as these are, if they came from it.
    """

    threshold: float  # the score from which a local image is called positive
    unmoved: float  # p of validation's distribution at the prevalence that was given
    moved: float  # p of the same, after the move of all scores by which they fit best
    mixed: float  # p of validation's distribution at the prevalence that fits best, without a move
    prevalence: float  # that prevalence

    @property
    def kind(self) -> str:
        """What explains the scores best: none (nothing moved them), prevalence (another one alone), images (they are
        taken otherwise, which moved all scores), or unknown (neither)."""
        if self.unmoved >= LEVEL:
            return "none"
        if max(self.mixed, self.moved) < LEVEL:
            return "unknown"
        return "prevalence" if self.mixed >= self.moved else "images"


def align(
    scores: np.ndarray, independent: float, reference: Reference, threshold: float, prevalence: float
) -> Alignment:
    """Move a threshold so that the share called positive is validation's at the prevalence of the local images.

    That share is P * sensitivity + (1 - P) * (1 - specificity), of the sensitivity and the specificity on validation.
    The prevalence P has to be known: an estimate of it from the same scores supposes that nothing else moved them, and
    then nothing is left to move. Where the scores fit validation's at P as they are, the threshold stays.

    Whether another prevalence explains the scores is tested against the mixture of validation's classes that fits best,
    which corrects for the label shift. That the best is taken makes the test cautious.

    Args:
        scores: (N,), of local images.
        independent: see `p_value`.
        reference: validation's scores.
        threshold: the score from which an image of validation's kind is called positive.
        prevalence: the share of positive local images.
    """
    mixed, best = min((distance(scores, reference, percent / 100), percent / 100) for percent in range(101))
    moves = np.quantile(scores, LEVELS) - reference.quantiles(LEVELS, prevalence)
    moved = min(distance(scores - move, reference, prevalence) for move in moves)
    distances = distance(scores, reference, prevalence), moved, mixed
    p_unmoved, p_moved, p_mixed = (p_value(largest, independent, reference) for largest in distances)
    if p_unmoved < LEVEL:
        threshold = matched(scores, reference.share_called(threshold, prevalence))
    return Alignment(threshold, p_unmoved, p_moved, p_mixed, best)
