"""Metrics are scikit-learn's, and what their intervals are made of is the derivative of scikit-learn's metrics."""

import doctest

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from tests.metrics.drawn import draw
from xray_fastai.metrics import calibration, influence, intervals, predictive_values, table
from xray_fastai.metrics.calibration import MAX_BINS, calibration_error, reliability_bins
from xray_fastai.metrics.scored import Scored, losses
from xray_fastai.metrics.table import METRICS, title_of, values

SHARES = [name for name, metric in METRICS.items() if metric.scale == "share"]


@pytest.mark.parametrize("module", [intervals, table, calibration, predictive_values])
def test_the_examples(module):
    failed, tried = doctest.testmod(module, extraglobs={"np": np})
    assert tried and not failed


def test_the_table():
    assert all(name == metric.name and metric.meaning.endswith(".") for name, metric in METRICS.items())
    assert len({metric.title for metric in METRICS.values()}) == len(METRICS)
    assert title_of("f1") == "F1" and title_of("of a newer version") == "of a newer version"


@pytest.mark.parametrize("classes", [2, 3])
def test_the_values_are_those_of_scikit_learn(classes):
    """The names in the table mean what scikit-learn means by them."""
    scored = draw(classes)
    y_true, y_pred = scored.y_true, scored.y_prob.argmax(axis=1)
    average = {"average": "binary" if classes == 2 else "macro"}
    expected = {
        "accuracy": sk.accuracy_score(y_true, y_pred),
        "balanced_accuracy": sk.balanced_accuracy_score(y_true, y_pred),
        "sensitivity": sk.recall_score(y_true, y_pred, **average),
        "ppv": sk.precision_score(y_true, y_pred, **average),
        "f1": sk.f1_score(y_true, y_pred, **average),
    }
    if classes == 2:
        expected |= {"specificity": sk.recall_score(1 - y_true, 1 - y_pred)}
        expected |= {"npv": sk.precision_score(1 - y_true, 1 - y_pred)}
    computed = values(scored, y_pred)
    assert {name: computed[name] for name in expected} == pytest.approx(expected)
    one_hot = np.eye(classes)[y_true]
    y_score = scored.y_prob[:, 1] if classes == 2 else scored.y_prob
    labels = y_true if classes == 2 else one_hot
    free = {
        "roc_auc": sk.roc_auc_score(labels, y_score),
        "average_precision": sk.average_precision_score(labels, y_score),
        "brier_score": np.mean(((scored.y_prob - one_hot) ** 2).sum(axis=1)) / (2 if classes == 2 else 1),
        "nll": sk.log_loss(y_true, scored.y_prob),
    }
    computed = values(scored)
    assert {name: computed[name] for name in free} == pytest.approx(free)


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("classes", [2, 3])
def test_the_shares_are_the_metric(classes, name):
    scored, metric = draw(classes), METRICS[name]
    y_pred = scored.y_prob.argmax(axis=1)
    shares = metric.spread(scored, y_pred)
    assert shares.values.mean() == pytest.approx(metric.value(scored, y_pred), abs=1e-12)
    weights, k = shares.weights.astype(float), 0

    def share(image, change):
        changed = weights[:, k].copy()
        changed[image] *= 1 + change  # how often the image counts
        return np.average(shares.hits[:, k], weights=changed)

    slopes = [(share(i, 1e-6) - share(i, -1e-6)) / 2e-6 for i in range(len(y_pred))]
    assert shares.influence[:, k] == pytest.approx(np.array(slopes), abs=1e-8)


def of_slope(scored, weights):
    _, logit, outcome = scored.confidence
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12)
    return model.fit(logit[:, None], outcome, sample_weight=weights).coef_[0, 0]


@pytest.mark.parametrize(
    ("name", "weighted"),
    [
        ("roc_auc", lambda s, w: sk.roc_auc_score(s.y_true, s.y_prob[:, 1], sample_weight=w)),
        ("average_precision", lambda s, w: sk.average_precision_score(s.y_true, s.y_prob[:, 1], sample_weight=w)),
        ("brier_score", lambda s, w: sk.brier_score_loss(s.y_true, s.y_prob[:, 1], sample_weight=w)),
        ("nll", lambda s, w: sk.log_loss(s.y_true, s.y_prob, sample_weight=w)),
        ("calibration_slope", of_slope),
        (
            "observed_expected",
            lambda s, w: np.average(s.y_true == 1, weights=w) / np.average(s.y_prob[:, 1], weights=w),
        ),
    ],
)
def test_the_influence_is_the_derivative_of_scikit_learns_metric(name, weighted):
    scored = draw(2)

    def change(image, step):
        weights = np.ones(len(scored.y_true))
        weights[image] += step
        return weighted(scored, weights)

    slopes = [(change(i, 1e-5) - change(i, -1e-5)) / 2e-5 for i in range(len(scored.y_true))]
    assert METRICS[name].spread(scored, None) == pytest.approx(np.array(slopes), abs=1e-7)


def test_slope_and_intercept_are_those_of_the_likelihood():
    """Against a minimiser of scipy: both parameters free for the slope, the slope fixed at 1 for the intercept."""
    scored = draw(2)
    _, logit, outcome = scored.confidence

    def loss(parameters, slope=None):
        z = parameters[0] + logit * (parameters[1] if slope is None else slope)
        return np.logaddexp(0, np.where(outcome, -z, z)).mean()

    computed = values(scored)
    assert computed["calibration_slope"] == pytest.approx(minimize(loss, [0, 1]).x[1], abs=1e-4)
    assert computed["calibration_intercept"] == pytest.approx(minimize(loss, [0], args=(1,)).x[0], abs=1e-4)
    shifted = expit(logit + computed["calibration_intercept"])
    assert shifted.mean() == pytest.approx(outcome.mean())
    assert computed["calibration_in_the_large"] == pytest.approx(outcome.mean() - scored.y_prob[:, 1].mean())


def test_the_sensitivity_at_a_specificity_is_read_off_the_curve():
    """From 0.4 on, one of ten negative images is called positive, and each positive one."""
    positive = np.array([0.1] * 9 + [0.5] + [0.4] + [0.6, 0.7, 0.8, 0.9])
    scored = Scored(np.repeat([0, 1], [10, 5]), np.stack([1 - positive, positive], axis=1), np.arange(15), 1)
    measured = intervals.measure(scored, {}, 50)
    value, low, high = measured.free["sensitivity_at_90_specificity"]
    assert value == 1 and (low, high) == tuple(measured.curves[0].band[:, 10])


def test_the_ratio_is_undefined_without_an_image_of_the_class():
    scored = Scored(np.zeros(4, int), np.full((4, 2), 0.5), np.arange(4), 1)
    assert np.isnan(intervals.measure(scored, {}, 10).free["observed_expected"]).all()


def test_the_intercept_has_the_influence_of_a_mean():
    """Of images that all have a logit of 0, the intercept is the logit of the share: its variance is 1 / (n p q)."""
    y_true = np.repeat([1, 0], [30, 70])
    scored = Scored(y_true, np.full((100, 2), 0.5), np.arange(100), 1)
    value, of_image = calibration.intercept(scored)
    assert value == pytest.approx(np.log(3 / 7)) and (of_image**2).sum() == pytest.approx(1 / (100 * 0.3 * 0.7))


def test_separated_classes_have_no_slope():
    positive = np.array([0.1, 0.2, 0.3, 0.4])
    for y_true in ([0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]):
        scored = Scored(np.array(y_true), np.stack([1 - positive, positive], axis=1), np.arange(4), 1)
        assert np.isnan(values(scored)["calibration_slope"])


def test_the_calibration_error_of_a_textbook_case():
    """Two bins: 10 images at 0.9 of which 6 are positive, 30 at 0.1 of which 3 are. Equal probabilities share a bin."""
    y_true = np.repeat([1, 0, 1, 0], [6, 4, 3, 27])
    positive = np.repeat([0.9, 0.1], [10, 30])
    scored = Scored(y_true, np.stack([1 - positive, positive], axis=1), np.arange(40), 1)
    assert calibration_error(scored) == pytest.approx(10 / 40 * 0.3)
    assert reliability_bins(scored).images.tolist() == [30, 10]


def test_the_bins_hold_equally_many_images_and_rise():
    rng = np.random.default_rng(0)
    positive = rng.random(1000)
    y_true = (rng.random(1000) < positive).astype(int)
    scored = Scored(y_true, np.stack([1 - positive, positive], axis=1), np.arange(1000), 1)
    bins = reliability_bins(scored)
    assert len(bins.images) > 5 and np.ptp(bins.images) <= 1 and (np.diff(bins.share) >= 0).all()
    for i in range(len(bins.images)):
        inside = bins.of_image == i
        assert bins.share[i] == pytest.approx(y_true[inside].mean())
        assert bins.probability[i] == pytest.approx(positive[inside].mean())
    assert (np.diff(bins.of_image[np.argsort(positive)]) >= 0).all()
    perfect = Scored(np.repeat([0, 1], 500), np.eye(2)[np.repeat([0, 1], 500)], np.arange(1000), 1)
    assert len(reliability_bins(perfect).images) == 2 and MAX_BINS >= 2


def test_the_calibration_error_of_a_calibrated_model_is_smaller_than_with_bins_of_equal_width():
    """Its truth is 0. Fifteen bins of equal width (Guo et al.) give 0.07 of 150 images, these bins 0.05."""
    rng, found, of_width = np.random.default_rng(0), [], []
    for _ in range(100):
        positive = rng.beta(0.6, 0.6, 150)
        outcome = rng.random(150) < positive
        scored = Scored(outcome.astype(int), np.stack([1 - positive, positive], axis=1), np.arange(150), 1)
        found.append(calibration_error(scored))
        gaps = np.bincount((positive * 15).astype(int).clip(0, 14), outcome - positive, 15)
        of_width.append(np.abs(gaps).sum() / 150)
    assert np.mean(found) < 0.055 < 0.065 < np.mean(of_width)


def test_the_calibration_of_several_classes_is_that_of_the_most_probable():
    scored = Scored(np.array([0, 1]), np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1]]), np.arange(2), None)
    assert calibration_error(scored) == pytest.approx(0.3)
    assert values(scored)["calibration_in_the_large"] == pytest.approx(-0.3)
    assert scored.confidence[1] == pytest.approx(np.log([4, 4]))


def test_losses():
    assert losses(np.array([[0.25, 0.75], [1, 0]]), np.array([1, 0])) == pytest.approx([-np.log(0.75), 0])
    assert np.isfinite(losses(np.array([[0.0, 1.0]], dtype=np.float32), np.array([0]))).all()


@pytest.mark.parametrize("label", [0, 1])
def test_what_is_undefined_with_images_of_one_class_only(label):
    """A PPV would be 0 or 1, whatever the model predicts."""
    scored = Scored(np.full(4, label), np.full((4, 2), 0.5), np.arange(4), 1)
    computed = values(scored, np.array([0, 1, 0, 1])) | values(scored)
    defined = {name for name, value in computed.items() if not np.isnan(value)}
    always = {"accuracy", "brier_score", "nll", "expected_calibration_error", "calibration_in_the_large"}
    assert defined == always | ({"sensitivity", "observed_expected"} if label else {"specificity"})


def test_the_influence_of_images_of_equal_scores():
    """All images have one score: the AUC is 1/2, whatever the weights; average precision is the share of the class."""
    scored = Scored(np.array([1, 0, 0, 1, 0]), np.full((5, 2), 0.5), np.arange(5), 1)
    assert influence.of_roc_auc(scored, 1) == pytest.approx(np.zeros(5))
    assert influence.of_average_precision(scored, 1) == pytest.approx((scored.y_true - 0.4) / 5)


def test_probabilities_of_0_and_1_have_finite_figures():
    y_true, y_pred = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 0])
    scored = Scored(y_true, np.eye(2, dtype=np.float32)[y_pred], np.arange(6), 1)
    assert np.isfinite([*values(scored).values()]).all()
    assert all(
        np.isfinite(of_image).all() for _, of_image in (calibration.slope(scored), calibration.intercept(scored))
    )
