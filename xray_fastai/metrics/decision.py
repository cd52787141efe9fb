"""Net benefit: what decisions by a model are worth, counted in true positives.

The source is Vickers & Elkin, Decision curve analysis, Medical Decision Making 2006.

Who acts from a probability of p on takes one false positive for p / (1 - p) true positives. The curve over p compares
the model with acting on all images and on none.
"""

from dataclasses import dataclass

import numpy as np

from xray_fastai.metrics.intervals import Interval, student_interval
from xray_fastai.metrics.scored import Scored

THRESHOLDS = np.arange(1, 100) / 100


@dataclass(frozen=True)
class DecisionCurve:
    """The net benefit at `THRESHOLDS`; that of acting on none is 0."""

    model: list[Interval]
    all: np.ndarray  # (99,): that of acting on all images


def net_benefits(scored: Scored, label: int, threshold: float) -> np.ndarray:
    """Return what each image adds (N,): 1 for a true positive, less the odds of the threshold for a false one.

    Their mean is the net benefit of acting on the images whose probability of a class is the threshold or more.

    Examples:
        Of ten images three are true positives at 0.2 and four are false ones: 3/10 - 4/10 · 0.2/0.8.

        >>> y_true, positive = np.repeat([1, 0], [3, 7]), np.repeat([0.9, 0.6, 0.1], [3, 4, 3])
        >>> scored = Scored(y_true, np.stack([1 - positive, positive], axis=1), np.arange(10), positive=1)
        >>> round(float(net_benefits(scored, 1, 0.2).mean()), 3)
        0.2
    """
    worth = np.where(scored.y_true == label, 1.0, -threshold / (1 - threshold))
    return np.where(scored.y_prob[:, label] >= threshold, worth, 0.0)


def decision_curve(scored: Scored, label: int) -> DecisionCurve:
    """Compute the decision curve of a class, with pointwise 95 % intervals by patient.

    Args:
        scored: N images.
        label: the class to act on.
    """
    of_images = [net_benefits(scored, label, threshold) for threshold in THRESHOLDS]
    model = [
        Interval(
            float(each.mean()),
            *student_interval(each.mean(), (each - each.mean()) / len(each), scored.patients, "real"),
        )
        for each in of_images
    ]
    share = (scored.y_true == label).mean()
    return DecisionCurve(model, share - (1 - share) * THRESHOLDS / (1 - THRESHOLDS))
