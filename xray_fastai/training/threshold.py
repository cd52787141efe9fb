"""Chooses the decision threshold on the validation images: by Youden's J, or by the sensitivity to reach.

All errors are by patient: images of one patient are alike, so they count as fewer.
"""

import numpy as np
from scipy.stats import beta

CONFIDENCE = 0.95
"""The probability with which new images of the same kind reach the sensitivity that was asked for."""
Z = 1.96
"""Agresti and Coull add Z**2 / 2 images to each side: with 95 %, two and two."""


def standard_error(values: np.ndarray, patients: np.ndarray) -> float:
    """Return the standard error of the mean of values (N,) by patient.

    It is the cluster-robust one, sqrt(P / (P - 1) * sum over patients of (sum of value - mean)**2) / N.
    """
    sums = np.bincount(np.unique(patients, return_inverse=True)[1], values - values.mean())
    return float(np.sqrt((sums**2).sum() * len(sums) / max(1, len(sums) - 1)) / len(values))


def effective_number(hits: np.ndarray, patients: np.ndarray) -> float:
    """Return how many independent images would tell the share of `hits` (N,) as exactly.

    Where all are hits, or none, the variance says nothing, and each patient counts as one image.
    """
    share = hits.mean()
    if share in (0, 1):
        return float(len(np.unique(patients)))
    return min(float(len(hits)), share * (1 - share) / standard_error(hits, patients) ** 2)


def _variance(hits: np.ndarray, patients: np.ndarray) -> float:
    """Return the variance of a share after Agresti and Coull (Approximate is better than "exact" for interval
    estimation of binomial proportions, The American Statistician 1998). It is above 0 also without errors."""
    number = effective_number(hits, patients)
    share = (hits.mean() * number + Z**2 / 2) / (number + Z**2)
    return share * (1 - share) / (number + Z**2)


def by_youden(scores: np.ndarray, positives: np.ndarray, patients: np.ndarray, centre: float = 0.5) -> float:
    """Choose the lowest probability at which an image is predicted positive, by Youden's J.

    J is sensitivity + specificity - 1 (Index for rating diagnostic tests, Cancer 1950). Of the thresholds whose J is
    within one standard error of the highest, this takes the one nearest to the probability of an image that says
    nothing about its class: where probabilities are right, J is highest there. The threshold with the highest J depends
    on single images if a model makes few errors.

    Args:
        scores: (N,), probability of the positive class.
        positives: (N,), true where the image is of that class.
        patients: (N,), equal for images of one patient.
        centre: that probability (`calibration.prior_of`).

    Returns:
        `centre`, or a value halfway between two scores.
    """
    values = np.unique(scores)
    if len(values) == 1:
        return centre
    low, high = values[:-1], values[1:]  # all thresholds of a gap, low < t <= high, decide the same
    candidates = np.where((low < centre) & (centre <= high), centre, (low + high) / 2)
    sensitivity = 1 - np.searchsorted(np.sort(scores[positives]), high) / positives.sum()
    specificity = np.searchsorted(np.sort(scores[~positives]), high) / (~positives).sum()
    j = sensitivity + specificity - 1
    best = j.argmax()
    right = (scores >= high[best]) == positives
    variance = sum(_variance(right[kind], patients[kind]) for kind in (positives, ~positives))
    good = candidates[j >= j[best] - np.sqrt(variance) - 1e-9]
    return float(good[np.abs(good - centre).argmin()])


def by_sensitivity(
    scores: np.ndarray, positives: np.ndarray, patients: np.ndarray, target: float
) -> tuple[float, float]:
    """Choose the highest threshold whose sensitivity is `target` or more with a probability of `CONFIDENCE`.

    The threshold that m of n positive images miss has, on new images, a sensitivity distributed as Beta(n - m, m + 1),
    whatever the distribution of the scores (Wilks, Determination of sample sizes for setting tolerance limits, Annals
    of Mathematical Statistics 1941). n is the effective number of images, and m is reduced in proportion.

    Args:
        scores: (N,), probability of the positive class.
        positives: (N,), true where the image is of that class.
        patients: (N,), equal for images of one patient.
        target: the sensitivity to reach.

    Returns:
        A value halfway between two scores, or the lowest positive score if no score is lower; and the probability of
        reaching `target`, which is below `CONFIDENCE` where even a threshold that no positive image misses is unsure.
    """
    values, ours, of = np.unique(scores), np.sort(scores[positives]), patients[positives]
    chosen = None
    for score in np.unique(ours):
        missed = int((ours < score).sum())
        if missed and missed / len(ours) > 1 - target:
            break
        number = effective_number(scores[positives] >= score, of)
        found = number * (1 - missed / len(ours))
        probability = float(beta.sf(target, found, number - found + 1))
        if chosen is None or probability >= CONFIDENCE:
            chosen = score, probability
    score, probability = chosen
    lower = values[values < score]
    return float((score + lower[-1]) / 2 if len(lower) else score), probability
