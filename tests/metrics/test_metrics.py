"""Metrics are scikit-learn's, their intervals a bootstrap over patients, and each stands once in the table."""

import doctest
import time

import numpy as np
import pytest
from sklearn import metrics as sk

from xray_fastai.metrics import intervals, table
from xray_fastai.metrics import scored as scored_module
from xray_fastai.metrics.intervals import measure, patient_weights, resample
from xray_fastai.metrics.scored import BINS, Scored, calibration_error, losses
from xray_fastai.metrics.table import FALSE_POSITIVE_RATES, METRICS, curve_values, title_of, values


def draw(classes, images=60, patients=40, seed=0):
    """Draw images of several patients, predicted better than chance, some with equal probabilities."""
    rng = np.random.default_rng(seed)
    y_true = rng.integers(classes, size=images)
    y_prob = rng.dirichlet(np.ones(classes), images) + np.eye(classes)[y_true] * 0.4
    y_prob = np.round(y_prob / y_prob.sum(axis=1, keepdims=True), 1)
    y_prob[:, -1] = 1 - y_prob[:, :-1].sum(axis=1)
    patients = np.unique(rng.integers(patients, size=images), return_inverse=True)[1]
    return Scored(y_true, y_prob, patients, 1 if classes == 2 else None)


@pytest.mark.parametrize("module", [intervals, table, scored_module])
def test_the_examples(module):
    failed, tried = doctest.testmod(module, extraglobs={"np": np})
    assert tried and not failed


def test_the_table():
    assert all(name == metric.name and metric.meaning.endswith(".") for name, metric in METRICS.items())
    assert len({metric.title for metric in METRICS.values()}) == len(METRICS)
    assert title_of("f1") == "F1" and title_of("of a newer version") == "of a newer version"


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("classes", [2, 3])
def test_resamples_are_those_of_scikit_learn(classes, name):
    """All resamples at once give what scikit-learn gives with one resample as `sample_weight`."""
    scored, metric = draw(classes), METRICS[name]
    y_pred = scored.y_prob.argmax(axis=1)
    weights = np.concatenate(list(patient_weights(scored.patients, 8, seed=3)))
    resampled = resample(scored, {"x": y_pred}, weights)
    of_metric = resampled.points["x"][name] if metric.needs_threshold else resampled.free[name]
    expected = [metric.value(scored, y_pred, weight) for weight in weights]
    assert of_metric == pytest.approx(np.array(expected), abs=1e-12)


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
    }
    computed = values(scored)
    assert {name: computed[name] for name in free} == pytest.approx(free)


def test_the_curves_of_each_class():
    scored = draw(3)
    weights = next(patient_weights(scored.patients, 3, seed=0))
    resampled = resample(scored, {}, weights)
    for i, weight in enumerate(weights):
        assert resampled.auc[i] == pytest.approx(np.array(curve_values(sk.roc_auc_score, scored, weight)))
        expected = curve_values(sk.average_precision_score, scored, weight)
        assert resampled.average_precision[i] == pytest.approx(np.array(expected))
    auc = [curve.auc.value for curve in measure(scored, {}, 10).curves]
    assert auc == curve_values(sk.roc_auc_score, scored)


def test_the_band_holds_the_curve_of_a_resample():
    scored = draw(2)
    weights = next(patient_weights(scored.patients, 3, seed=0))
    bands = resample(scored, {}, weights).bands
    for weight, (band,) in zip(weights, bands, strict=True):
        false_positive_rate, sensitivity, _ = sk.roc_curve(scored.y_true, scored.y_prob[:, 1], sample_weight=weight)
        inner = np.interp(FALSE_POSITIVE_RATES + 1e-9, false_positive_rate, sensitivity)
        assert band[:-1] == pytest.approx(inner[:-1], abs=1e-6)


def test_images_of_a_patient_are_drawn_together():
    patients = draw(2).patients
    weights = np.concatenate(list(patient_weights(patients, 8, seed=3)))
    for patient in range(patients.max() + 1):
        of_patient = weights[:, patients == patient]
        assert (of_patient == of_patient[:, :1]).all()
    drawn = [weights[:, patients == patient][:, 0] for patient in range(patients.max() + 1)]
    assert (np.sum(drawn, axis=0) == patients.max() + 1).all()


def test_one_patient_with_many_images_widens_the_interval():
    """Half of the images are misclassified: once of as many patients, once of a single one."""
    scored, number = draw(2, images=200), np.arange(200)
    y_pred = np.where(number < 100, 1 - scored.y_true, scored.y_true)
    of_patients = [
        measure(Scored(scored.y_true, scored.y_prob, patients, 1), {"x": y_pred}).points["x"]["accuracy"]
        for patients in (number, np.maximum(number - 99, 0))
    ]
    (value, low, high), (same, lower, higher) = of_patients
    assert value == same == 0.5
    assert higher - lower > 3 * (high - low)


def test_the_interval_is_the_textbook_one():
    """Of a share of 400 independent images, p +- 1.96 sqrt(p (1 - p) / n)."""
    y_true = np.ones(400, dtype=int)
    y_true[::2] = 0
    y_pred = np.where(np.arange(400) % 10 < 2, 1 - y_true, y_true)  # 80 % correct
    scored = Scored(y_true, np.eye(2)[y_pred], np.arange(400), 1)
    value, low, high = measure(scored, {"x": y_pred}).points["x"]["accuracy"]
    half = 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert (value, low, high) == pytest.approx((0.8, 0.8 - half, 0.8 + half), abs=0.006)


def test_the_calibration_error_of_a_textbook_case():
    """Two bins: 10 images at 0.9 of which 6 are positive, 30 at 0.1 of which 3 are."""
    y_true = np.repeat([1, 0, 1, 0], [6, 4, 3, 27])
    positive = np.repeat([0.9, 0.1], [10, 30])
    scored = Scored(y_true, np.stack([1 - positive, positive], axis=1), np.arange(40), 1)
    free = measure(scored, {}).free
    assert free["expected_calibration_error"].value == pytest.approx(10 / 40 * 0.3)


def test_the_bins_of_the_calibration_error():
    """Bins are closed at their upper end: 1/15 is in the first bin, a bit more in the second; 0 and 1 are in a bin."""
    positive = np.array([0, 1 / BINS, 1 / BINS + 1e-9, 0.5, 1])
    scored = Scored(np.zeros(5, dtype=int), np.stack([1 - positive, positive], axis=1), np.arange(5), 1)
    assert BINS == 15 and scored.confidence[2].tolist() == [0, 0, 1, 7, 14]


def test_the_calibration_error_of_several_classes_is_that_of_the_most_probable():
    scored = Scored(np.array([0, 1]), np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1]]), np.arange(2), None)
    assert calibration_error(scored, np.ones((1, 2))) == pytest.approx([0.3])


def test_losses():
    assert losses(np.array([[0.25, 0.75], [1, 0]]), np.array([1, 0])) == pytest.approx([-np.log(0.75), 0])
    assert np.isfinite(losses(np.array([[0.0, 1.0]], dtype=np.float32), np.array([0]))).all()


def test_undefined_resamples_are_left_out():
    """With two positive images of thirty, every eighth resample has none."""
    scored = draw(2, images=30, patients=10**6)
    scored = Scored(np.repeat([1, 0], [2, 28]), scored.y_prob, scored.patients, 1)
    measured = measure(scored, {"x": scored.y_prob.argmax(axis=1)})
    assert all(np.isfinite(interval).all() for interval in measured.free.values())
    assert np.isfinite(measured.points["x"]["sensitivity"]).all() and np.isfinite(measured.curves[0].band).all()
    assert measure(scored, {"x": scored.y_true}).points["x"]["sensitivity"] == (1, 1, 1)


def test_what_is_undefined_without_an_image_of_the_class():
    scored = Scored(np.zeros(4, dtype=int), np.full((4, 2), 0.5), np.arange(4), 1)
    computed = values(scored, np.array([0, 1, 0, 1])) | values(scored)
    undefined = {name for name, value in computed.items() if np.isnan(value)}
    assert undefined == {"balanced_accuracy", "sensitivity", "f1", "roc_auc", "average_precision"}


def test_one_patient_has_no_interval():
    interval = measure(draw(2, patients=1), {}).free["roc_auc"]
    assert np.isfinite(interval.value) and np.isnan([interval.low, interval.high]).all()


def test_2000_resamples_of_624_images_take_seconds():
    scored = draw(2, images=624, patients=400)
    y_pred = scored.y_prob.argmax(axis=1)
    started = time.perf_counter()
    measure(scored, {"0.5": y_pred, "chosen": y_pred})
    assert time.perf_counter() - started < 5
