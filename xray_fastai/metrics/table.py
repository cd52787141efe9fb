"""The table of metrics: what each is called, what it means, how it is computed, and what its interval is made of.

To add a metric, add it to `METRICS`. `metrics.json`, the tables on the terminal and in the report, the report's
explanations and the tests follow from it.

Of two classes the positive one is measured. Of more, a metric is the plain mean over the classes that the images have,
each against the rest (macro average). The Brier score is an exception: it is the sum over all classes, as Brier
defined it.

With images of one class only, a metric that compares classes is undefined: a PPV would be 1, whatever the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from xray_fastai.metrics import calibration, influence
from xray_fastai.metrics.influence import Shares
from xray_fastai.metrics.scored import Scored, losses
from xray_fastai.system.text import percent

Scale = Literal["share", "unit", "positive", "real", "curve"]
"""What values a metric can have: a mean of shares of images, from 0 to 1, from 0 on, any, or read off the ROC curve."""
FALSE_POSITIVE_RATE = 0.1
"""Where `sensitivity_at_90_specificity` is read off; 1 - 0.9 is another number, to a computer."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        name: in `metrics.json`.
        title: for people.
        meaning: in the report.
        needs_threshold: whether it depends on the predicted classes.
        scale: which interval it gets; None: no interval.
        value: of images and their predicted classes (N,): the metric; NaN where undefined.
        spread: of the same: the `Shares` whose mean is the metric, or the influence of each image (N,); None with the
            scale None, and with the scale `curve`, whose interval is that of the curve.
    """

    name: str
    title: str
    meaning: str
    needs_threshold: bool
    scale: Scale | None
    value: Callable[[Scored, np.ndarray], float]
    spread: Callable[[Scored, np.ndarray], Shares | np.ndarray | None]


def _balanced_accuracy(scored: Scored, y_pred: np.ndarray) -> float:
    return recall_score(scored.y_true, y_pred, labels=scored.recalled, average=None, zero_division=np.nan).mean()


def _mean_of(score: Callable, negative: bool = False) -> Callable[[Scored, np.ndarray], float]:
    """Make a metric from a score of two classes: its mean over the measured classes.

    Args:
        score: a function of scikit-learn.
        negative: measure how the rest is found, instead of the class.
    """

    def mean(scored: Scored, y_pred: np.ndarray) -> float:
        pairs = [((scored.y_true == k) != negative, (y_pred == k) != negative) for k in scored.measured]
        return np.mean([score(*pair, zero_division=np.nan) for pair in pairs])

    return mean


def _compared(value: Callable[[Scored, np.ndarray], float]) -> Callable[[Scored, np.ndarray], float]:
    """Make a metric undefined with images of one class only."""
    return lambda scored, y_pred: value(scored, y_pred) if len(scored.present) > 1 else np.nan


def curve_values(score: Callable, scored: Scored) -> list[float]:
    """Return a score like `roc_auc_score` of each measured class; NaN with images of one class only."""
    if len(scored.present) < 2:
        return [np.nan] * len(scored.measured)
    return [score(scored.y_true == k, scored.y_prob[:, k]) for k in scored.measured]


def _brier_score(scored: Scored, _: np.ndarray) -> float:
    labels = range(scored.classes) if scored.positive is None else [scored.positive]
    return sum(brier_score_loss((scored.y_true == k).astype(int), scored.y_prob[:, k], pos_label=1) for k in labels)


def _by_class(scored: Scored, y_pred: np.ndarray, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return which images are, and which are predicted as, each of some classes: (N, K) each."""
    return scored.y_true[:, None] == labels, y_pred[:, None] == labels


def _right(scored: Scored, y_pred: np.ndarray) -> Shares:
    return Shares((scored.y_true == y_pred)[:, None], np.ones((len(y_pred), 1)))


def _recalls(scored: Scored, y_pred: np.ndarray) -> Shares:
    true, predicted = _by_class(scored, y_pred, scored.recalled)
    return Shares(predicted, true)


def _sensitivities(scored: Scored, y_pred: np.ndarray) -> Shares:
    true, predicted = _by_class(scored, y_pred, scored.measured)
    return Shares(predicted, true)


def _specificities(scored: Scored, y_pred: np.ndarray) -> Shares:
    true, predicted = _by_class(scored, y_pred, scored.measured)
    return Shares(~predicted, ~true)


def _ppvs(scored: Scored, y_pred: np.ndarray) -> Shares:
    true, predicted = _by_class(scored, y_pred, scored.measured)
    return Shares(true, predicted)


def _npvs(scored: Scored, y_pred: np.ndarray) -> Shares:
    true, predicted = _by_class(scored, y_pred, scored.measured)
    return Shares(~true, ~predicted)


def _f1s(scored: Scored, y_pred: np.ndarray) -> Shares:
    """F1 is 2 TP / (2 TP + FP + FN): a share in which a true positive counts twice."""
    true, predicted = _by_class(scored, y_pred, scored.measured)
    return Shares(true & predicted, true.astype(float) + predicted)


def _mean_influence(of_class: Callable[[Scored, int], np.ndarray]) -> Callable[[Scored, np.ndarray], np.ndarray]:
    return lambda scored, _: np.mean([of_class(scored, k) for k in scored.measured], axis=0)


def _of_mean(values: np.ndarray) -> np.ndarray:
    """Return the influence (N,) on the mean of values (N,)."""
    return (values - values.mean()) / len(values)


def _excess(scored: Scored) -> np.ndarray:
    probability, _, outcome = scored.confidence
    return outcome - probability


def _observed_expected(scored: Scored) -> float:
    """Return O:E; undefined where no image has the class, since then the ratio has no interval."""
    probability, _, outcome = scored.confidence
    return outcome.mean() / probability.mean() if outcome.any() else np.nan


def _of_observed_expected(scored: Scored) -> np.ndarray:
    probability, _, outcome = scored.confidence
    return (
        outcome.mean()
        / probability.mean()
        * (_of_mean(outcome) / outcome.mean() - _of_mean(probability) / probability.mean())
    )


def _at_specificity(y_true: np.ndarray, score: np.ndarray) -> float:
    return np.interp(FALSE_POSITIVE_RATE, *roc_curve(y_true, score, drop_intermediate=False)[:2])


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "accuracy", "accuracy", "the share of images whose class is predicted correctly.", True, "share",
            lambda scored, y_pred: accuracy_score(scored.y_true, y_pred), _right,
        ),
        Metric(
            "balanced_accuracy", "balanced accuracy", "the mean of the classes' sensitivities.", True, "share",
            _compared(_balanced_accuracy), _recalls,
        ),
        Metric(
            "sensitivity", "sensitivity (recall)",
            "of the images that show the class to detect, the share that is predicted as this class.", True, "share",
            _mean_of(recall_score), _sensitivities,
        ),
        Metric(
            "specificity", "specificity",
            "of the images that do not show the class, the share that is not predicted as it.", True, "share",
            _mean_of(recall_score, negative=True), _specificities,
        ),
        Metric(
            "ppv", "PPV (precision)",
            "of the images predicted as the class, the share that shows it. It depends on how common the class is.",
            True, "share", _compared(_mean_of(precision_score)), _ppvs,
        ),
        Metric(
            "npv", "NPV",
            "of the images not predicted as the class, the share that does not show it. "
            "It depends on how common the class is.", True, "share",
            _compared(_mean_of(precision_score, negative=True)), _npvs,
        ),
        Metric(
            "f1", "F1", "the harmonic mean of sensitivity and PPV.", True, "share",
            _compared(_mean_of(f1_score)), _f1s,
        ),
        Metric(
            "roc_auc", "ROC AUC",
            "the chance that an image with the class gets a higher probability than one without; guessing gives 0.5.",
            False, "unit", lambda scored, _: np.mean(curve_values(roc_auc_score, scored)),
            _mean_influence(influence.of_roc_auc),
        ),
        Metric(
            "sensitivity_at_90_specificity", "sensitivity at spec. 0.90",
            "the sensitivity of the ROC curve where the specificity is 0.90, whatever the threshold. "
            "With more than two classes it has no interval.",
            False, "curve", lambda scored, _: np.mean(curve_values(_at_specificity, scored)), lambda scored, _: None,
        ),
        Metric(
            "average_precision", "average precision",
            "the area under the precision-recall curve; guessing gives the share of the class.",
            False, "unit", lambda scored, _: np.mean(curve_values(average_precision_score, scored)),
            _mean_influence(influence.of_average_precision),
        ),
        Metric(
            "brier_score", "Brier score", "the mean squared error of the probability; lower is better.",
            False, "positive", _brier_score, lambda scored, _: _of_mean(scored.squared_errors),
        ),
        Metric(
            "nll", "negative log-likelihood",
            "the mean of -log of the probability of the true class; lower is better. A confident error costs much.",
            False, "positive", lambda scored, _: losses(scored.y_prob, scored.y_true).mean(),
            lambda scored, _: _of_mean(losses(scored.y_prob, scored.y_true)),
        ),
        Metric(
            "expected_calibration_error", "expected calibration error",
            "the mean difference between a probability and how often it is right, over bins of equally many images; "
            "lower is better. It has no interval.",
            False, None, lambda scored, _: calibration.calibration_error(scored), lambda scored, _: None,
        ),
        Metric(
            "calibration_in_the_large", "calibration in the large",
            "the share of the class less its mean probability: 0 is right, below 0 the probabilities are too high.",
            False, "real", lambda scored, _: _excess(scored).mean(), lambda scored, _: _of_mean(_excess(scored)),
        ),
        Metric(
            "observed_expected", "O:E ratio",
            "the share of the class over its mean probability: 1 is right, below 1 the probabilities are too high.",
            False, "positive", lambda scored, _: _observed_expected(scored),
            lambda scored, _: _of_observed_expected(scored),
        ),
        Metric(
            "calibration_intercept", "calibration intercept",
            "what each logit lacks for the mean probability to be right: 0 is right.", False, "real",
            lambda scored, _: calibration.intercept(scored)[0], lambda scored, _: calibration.intercept(scored)[1],
        ),
        Metric(
            "calibration_slope", "calibration slope",
            "1 is right; below 1 the probabilities are too extreme, above 1 not extreme enough.", False, "real",
            lambda scored, _: calibration.slope(scored)[0], lambda scored, _: calibration.slope(scored)[1],
        ),
    )
}  # fmt: skip
"""By name, in the order of all tables."""


def title_of(name: str) -> str:
    """Return a metric's title, or the name itself where a newer version wrote a metric that this one does not know."""
    return METRICS[name].title if name in METRICS else name


def title_at_prevalence(name: str, prevalence: float) -> str:
    """Return the title of a predictive value at a prevalence.

    >>> title_at_prevalence("ppv", 0.03)
    'PPV at a prevalence of 3 %'
    """
    return f"{name.upper()} at a prevalence of {percent(prevalence)}"


def values(scored: Scored, y_pred: np.ndarray | None = None) -> dict[str, float]:
    """Compute metrics, with scikit-learn where it has them.

    Args:
        scored: N images.
        y_pred: (N,), the predicted classes; None computes the metrics that need no threshold.

    Returns:
        By name; NaN where undefined.

    Examples:
        Of four positive images three are found, of six negative ones two give a false alarm.

        >>> y_true = np.repeat([1, 0], [4, 6])
        >>> y_pred = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
        >>> scored = Scored(y_true, np.eye(2)[y_pred], np.arange(10), positive=1)
        >>> for name, value in values(scored, y_pred).items():
        ...     print(f"{name:<18}{value:.3f}")
        accuracy          0.700
        balanced_accuracy 0.708
        sensitivity       0.750
        specificity       0.667
        ppv               0.600
        npv               0.800
        f1                0.667
        >>> {name: round(float(value), 3) for name, value in values(scored).items() if name.startswith("r")}
        {'roc_auc': 0.708}
    """
    wanted = [metric for metric in METRICS.values() if metric.needs_threshold == (y_pred is not None)]
    return {metric.name: float(metric.value(scored, y_pred)) for metric in wanted}
