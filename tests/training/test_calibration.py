"""How outputs become probabilities, chosen on validation: one temperature, slope and intercepts, or nothing."""

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from xray_fastai.inference.scaling import Scaling
from xray_fastai.training.calibration import (
    Validated,
    calibrate,
    choose_temperature,
    fit_slope_and_intercepts,
    fit_temperature,
    losses,
    prior_of,
)


@pytest.fixture
def outputs():
    """Logits of two classes whose softmax is right, and their targets."""
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 4000)
    targets = (rng.random(4000) < 1 / (1 + np.exp(-margin))).astype(int)
    return np.stack([np.zeros(4000), margin], axis=1), targets


def validated(logits, targets, patients=None, weights=None, trained=None) -> Validated:
    """Return validation outputs; by default an image a patient, equal weights and equal training counts."""
    ones = np.ones(logits.shape[1])
    patients = np.arange(len(targets)) if patients is None else patients
    return Validated(
        logits, targets, patients, ones if weights is None else weights, ones if trained is None else trained
    )


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_the_temperature_undoes_a_scale(outputs, scale):
    logits, targets = outputs
    assert fit_temperature(logits * scale, targets) == pytest.approx(scale, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("images_of_a_patient", [1, 4])
def test_the_temperature_is_the_highest_within_a_standard_error_of_the_best(outputs, images_of_a_patient):
    """The error is that of the difference of the losses on the same images, summed by patient."""
    for few in (100, 1000, 4000):
        logits, targets = (part[:few] for part in outputs)
        patients = np.arange(few) // images_of_a_patient
        best, chosen = fit_temperature(logits, targets), choose_temperature(validated(logits, targets, patients))
        more = losses(logits, targets, chosen) - losses(logits, targets, best)
        sums = np.array([(more - more.mean())[patients == p].sum() for p in range(patients.max() + 1)])
        error = np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / few
        assert best < chosen < 2 * best and more.mean() == pytest.approx(error, rel=0.05)


@pytest.mark.slow
def test_the_warmest_temperature_approaches_the_best_with_more_images(outputs):
    """With unpaired errors it stayed 1.4 times as high at 2,000 images."""
    logits, targets = outputs
    ratios = [
        choose_temperature(validated(logits[:few], targets[:few])) / fit_temperature(logits[:few], targets[:few])
        for few in (100, 1000, 4000)
    ]
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] < 1.1


def test_slope_and_intercept_are_those_of_platt_scaling(outputs):
    """scikit-learn's logistic regression on the log odds, without a penalty, is an independent implementation."""
    logits, targets = outputs
    logits = logits[:300] * 2 + [0, 1]
    temperature, intercepts = fit_slope_and_intercepts(validated(logits, targets[:300]), spread=1e3)
    margin = (logits[:, 1] - logits[:, 0])[:, None]
    platt = LogisticRegression(C=np.inf, tol=1e-8).fit(margin, targets[:300])
    assert 1 / temperature == pytest.approx(platt.coef_[0, 0], rel=1e-3)
    assert intercepts[1] - intercepts[0] == pytest.approx(platt.intercept_[0], abs=1e-3)


def test_several_classes_get_one_slope_and_an_intercept_each():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 3))
    targets = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # softmax(logits) is right
    shifted = (logits - [1.0, 0.0, -1.0]) * 3
    temperature, intercepts = fit_slope_and_intercepts(validated(shifted, targets), spread=1e3)
    assert temperature == pytest.approx(3, rel=0.05)
    assert intercepts - intercepts.mean() == pytest.approx(np.array([1, 0, -1]), abs=0.07)


def test_the_log_prior_of_the_loss_weights_is_added_back(outputs):
    """Weights w make a network's posterior proportional to w p: with few images that alone is undone."""
    logits, targets = outputs
    weights = np.array([3.0, 0.5])
    trained = logits + np.log(weights)
    for few, spread in ((60, 1e-3), (4000, 1.0)):
        temperature, intercepts = fit_slope_and_intercepts(
            validated(trained[:few], targets[:few], None, weights), spread
        )
        assert temperature == pytest.approx(1, abs=0.1)
        assert intercepts[1] - intercepts[0] == pytest.approx(np.log(6), abs=0.15)


def test_the_fewer_the_images_the_less_is_changed(outputs):
    """The same images once, five times and fifty times."""
    temperatures, shifts = [], []
    for times in (1, 5, 50):
        logits, targets = np.tile(outputs[0][:60] * 4 + [0, 2], (times, 1)), np.tile(outputs[1][:60], times)
        temperature, intercepts = fit_slope_and_intercepts(validated(logits, targets), 0.2)
        temperatures.append(temperature)
        shifts.append(intercepts[0] - intercepts[1])
    assert 1 < temperatures[0] < temperatures[1] < temperatures[2] < 6
    assert shifts == sorted(shifts)


def test_without_errors_slope_and_intercept_stay_finite():
    targets = np.arange(100) % 2
    logits = 3 * np.where(targets[:, None] == [0, 1], 1.0, -1.0)
    temperature, intercepts = fit_slope_and_intercepts(validated(logits, targets))
    assert 0.2 < temperature < 1 and intercepts == pytest.approx(np.zeros(2), abs=1e-3)


def test_with_too_few_images_nothing_is_chosen(outputs):
    logits, targets = outputs
    for method in ("cautious", "validation", "none"):
        few = calibrate(validated(logits[:40], targets[:40]), method, 1)
        assert (few.scaling, few.threshold) == (Scaling(), 0.5)
        assert few.note.startswith("not calibrated: 40 validation images")
    rare = np.flatnonzero(targets == 1)[:9]
    lopsided = np.concatenate([np.flatnonzero(targets == 0)[:100], rare])
    few = validated(logits[lopsided], targets[lopsided])
    assert "9 of the rarest class" in calibrate(few, "cautious", 1).note
    assert "too few, also for a sensitivity of 0.9" in calibrate(few, "cautious", 1, 0.9).note


def test_each_method_says_what_it_did(outputs):
    logits, targets = outputs[0][:200] * 3 + [0, 1], outputs[1][:200]
    images = validated(logits, targets)
    cautious, validation, none = (calibrate(images, method, 1) for method in ("cautious", "validation", "none"))
    assert cautious.scaling.kind == "cautious" and cautious.scaling.intercepts is None
    assert cautious.note == "cautious temperature from 200 validation images; threshold by Youden's J"
    assert validation.scaling.kind == "validation" and len(validation.scaling.intercepts) == 2
    assert validation.note == "slope and intercept fitted to 200 validation images; threshold by Youden's J"
    assert none.scaling == Scaling() and none.note.startswith("not calibrated, as --calibration none says")
    nll = [
        -log_softmax(chosen.scaling(logits), axis=1)[np.arange(200), targets].mean()
        for chosen in (validation, cautious, none)
    ]
    assert nll == sorted(nll)
    assert calibrate(images, "cautious", None).threshold is None


@pytest.mark.parametrize("margin", [0.3, 1, 8])
def test_without_errors_the_cautious_temperature_stays_one(margin):
    """The likelihood grows as the temperature falls to zero, which would make an unsure network sure."""
    targets = np.arange(100) % 2
    logits = margin * np.where(targets[:, None] == [0, 1], 1.0, -1.0)
    result = calibrate(validated(logits, targets), "cautious", 1)
    assert (result.scaling, result.threshold) == (Scaling(), 0.5)
    assert result.note.startswith("not calibrated: without errors on 100 validation images the temperature cannot be")
    assert calibrate(validated(logits, targets), "cautious", None).scaling == Scaling()


@pytest.mark.slow
def test_a_temperature_at_its_limit_is_reported(outputs):
    logits, targets = outputs
    notes = [calibrate(validated(part, targets), "cautious", 1).note for part in (logits / 1000, -logits, logits)]
    assert ["at its limit" in note for note in notes] == [True, True, False]  # -logits: no better than chance


def test_the_prior_is_that_of_the_loss_weights():
    """Balanced weights train for equal classes; none for the shares of the training images."""
    logits, targets, trained = np.zeros((4, 2)), np.array([0, 1, 1, 1]), np.array([260, 740])
    images = validated(logits, targets, trained=trained)
    assert prior_of(images, Scaling()) == pytest.approx([0.26, 0.74])
    warm = prior_of(images, Scaling("cautious", 2.0))
    assert warm[1] / warm[0] == pytest.approx(np.sqrt(0.74 / 0.26))
    assert prior_of(images, Scaling("validation", 1.0, (0.5, -0.5))) == pytest.approx([0.25, 0.75])
    balanced = validated(logits, targets, weights=500 / trained, trained=trained)
    assert prior_of(balanced, Scaling("cautious", 2.0)) == pytest.approx([0.5, 0.5])


def test_the_threshold_of_an_unweighted_network_is_pulled_to_the_prevalence(outputs):
    logits, targets = outputs
    keep = (targets == 1) | (np.random.default_rng(1).random(4000) < 0.35)
    logits, targets = (logits + np.array([0, -np.log(0.35)]))[keep][:400], targets[keep][:400]
    share = targets.mean()
    trained = 1000 * np.array([1 - share, share])
    result = calibrate(validated(logits, targets, trained=trained), "none", 1)
    assert result.threshold == pytest.approx(share, abs=0.03) and share > 0.7


@pytest.mark.slow
def test_a_target_sensitivity_says_its_probability(outputs):
    logits, targets = outputs
    result = calibrate(validated(logits, targets), "cautious", 1, 0.9)
    assert "sensitivity 0.9, on images like these reached with a probability of at least 0.95" in result.note
    few = calibrate(validated(logits[:60] * 9, targets[:60]), "cautious", 1, 0.99)
    assert "reached with a probability of 0." in few.note and "positive images show no more" in few.note
