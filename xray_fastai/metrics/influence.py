"""What a metric's variance is made of: shares of images, and the influence of each image on the area under a curve.

The influence of an image is the derivative of a metric with respect to the image's weight, as in the infinitesimal
jackknife (Efron, The Jackknife, the Bootstrap and Other Resampling Plans, SIAM 1982, chapter 6). The images of a
patient are summed, so the variance is right however they depend on each other.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from xray_fastai.metrics.scored import Scored


class Shares(NamedTuple):
    """K shares, each the weighted share of the images that `hits` among those with a weight."""

    hits: np.ndarray  # (N, K)
    weights: np.ndarray  # (N, K), 0 where an image does not count

    @property
    def values(self) -> np.ndarray:  # (K,); NaN where no image counts
        with np.errstate(invalid="ignore"):
            return (self.weights * self.hits).sum(axis=0) / self.weights.sum(axis=0)

    @property
    def influence(self) -> np.ndarray:  # (N, K)
        with np.errstate(invalid="ignore"):
            return self.weights * (self.hits - self.values) / self.weights.sum(axis=0)


def placements(scored: Scored, label: int) -> np.ndarray:
    """Return DeLong's structural components (N,) of the ROC AUC of a class.

    Of an image with the class it is the share of the others that score lower, of these the share of images with the
    class that score higher; a tie counts half. They follow from ranks (Sun & Xu, Fast implementation of DeLong's
    algorithm, IEEE Signal Processing Letters 2014).
    """
    positive, score = scored.y_true == label, scored.y_prob[:, label]
    rank, placement = rankdata(score), np.empty(len(score))
    placement[positive] = (rank[positive] - rankdata(score[positive])) / (~positive).sum()
    placement[~positive] = 1 - (rank[~positive] - rankdata(score[~positive])) / positive.sum()
    return placement


def of_roc_auc(scored: Scored, label: int) -> np.ndarray:
    """Return each image's influence (N,) on the ROC AUC of a class.

    It is DeLong's structural component less the AUC. Summed by patient, it gives Obuchowski's variance (Nonparametric
    analysis of clustered ROC curve data, Biometrics 1997).
    """
    positive, placement = scored.y_true == label, placements(scored, label)
    auc = placement[positive].mean()
    return (placement - auc) / np.where(positive, positive.sum(), (~positive).sum())


def of_average_precision(scored: Scored, label: int) -> np.ndarray:
    """Return each image's influence (N,) on the average precision of a class.

    Average precision is the mean over positive images of the precision P = T / n at their score. An image adds to n of
    all images that score as much or less; a positive one adds to T too, and to the mean.
    """
    positive, score = scored.y_true == label, scored.y_prob[:, label]
    _, group = np.unique(-score, return_inverse=True)  # (N,): 0 is the highest score
    positives = np.bincount(group, positive)  # (groups,)
    predicted, true = np.bincount(group).cumsum(), positives.cumsum()
    precision, total = true / predicted, positive.sum()
    below = [
        np.cumsum((positives * change)[::-1])[::-1][group] / total
        for change in ((predicted - true) / predicted**2, -true / predicted**2)
    ]
    average = (positives * precision).sum() / total
    return np.where(positive, (precision[group] - average) / total + below[0], below[1])
