"""Fits slope, intercepts and threshold of an export to labelled images of another place (`training.recalibrate`)."""

import math
from dataclasses import dataclass

from scipy.special import softmax

from xray_fastai.inference.scaling import Scaling
from xray_fastai.system.errors import UserError
from xray_fastai.training.calibration import Calibration, Validated, fit_slope_and_intercepts
from xray_fastai.training.threshold import CONFIDENCE, by_sensitivity, by_youden

FEWEST_FOR_SLOPE = 20
"""With fewer the intercepts alone are fitted."""
SPREAD = 1.0
"""Standard deviation that the logarithm of the slope, and each intercept, have before the local images are seen.
Of 0.25 to 4, the negative log-likelihood on other images was lowest with 0.5 or 1 (`tests/benchmarks/README.md`)."""


@dataclass(frozen=True)
class Rule:
    """Says how the threshold is chosen; without anything by Youden's J."""

    target_sensitivity: float | None = None
    cost_ratio: float | None = None  # how many false alarms one missed image of the class to detect is worth

    def __post_init__(self) -> None:
        if self.target_sensitivity is not None and not 0 < self.target_sensitivity < 1:
            message = "give a share above 0 and below 1"
            raise UserError(message, option="target_sensitivity", value=f"{self.target_sensitivity:g}")
        if self.cost_ratio is not None and not 0 < self.cost_ratio < math.inf:
            raise UserError("give a number above 0", option="cost_ratio", value=f"{self.cost_ratio:g}")
        if None not in (self.target_sensitivity, self.cost_ratio):
            raise UserError("target_sensitivity= is given, too; leave one of them out", option="cost_ratio")


def fit_locally(
    images: Validated,
    positive: int | None,
    rule: Rule,
    spread: float = SPREAD,
    fewest_for_slope: int = FEWEST_FOR_SLOPE,
) -> Calibration:
    """Fit slope and intercepts to images, and choose the threshold on the probabilities that they give.

    Args:
        images: whose `logits` are the logarithms of the export's probabilities, up to a constant.
        positive: the index of the class to detect, or None.
        rule: of the threshold.
        spread: see `SPREAD`.
        fewest_for_slope: see `FEWEST_FOR_SLOPE`.
    """
    number = len(images.targets)
    with_slope = number >= fewest_for_slope
    temperature, intercepts = fit_slope_and_intercepts(images, spread, with_slope)
    scaling = Scaling("local", temperature, tuple(intercepts.tolist()))
    note = f"{'slope and intercept' if with_slope else 'intercept'} fitted to {number} local images"
    if positive is None:
        return Calibration(scaling, None, note)
    scores = softmax(scaling(images.logits), axis=1)[:, positive]
    truth = images.targets == positive
    if rule.cost_ratio is not None:
        # at p = c_fp / (c_fp + c_fn) both calls cost the same: Elkan, The foundations of cost-sensitive learning, 2001
        words = f"threshold for {rule.cost_ratio:g} false alarms as bad as one missed"
        return Calibration(scaling, 1 / (1 + rule.cost_ratio), f"{note}; {words}")
    if rule.target_sensitivity is None:
        prior = float(images.counts[positive] / number)
        threshold = by_youden(scores, truth, images.patients, prior)
        return Calibration(scaling, threshold, f"{note}; threshold by Youden's J")
    threshold, probability = by_sensitivity(scores, truth, images.patients, rule.target_sensitivity)
    reached = f"probability of at least {CONFIDENCE:g}"
    if probability < CONFIDENCE:
        reached = f"probability of {probability:.2f} only: {truth.sum()} positive images show no more"
    words = f"threshold by sensitivity {rule.target_sensitivity:g}, on images like these reached with a {reached}"
    return Calibration(scaling, threshold, f"{note}; {words}")
