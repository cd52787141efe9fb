"""Temperature and threshold, chosen on validation."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_curve

from xray_fastai.training.calibration import calibrate, choose_temperature, choose_threshold, fit_temperature, losses


@pytest.fixture
def outputs():
    """Calibrated logits of two classes and their targets."""
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 4000)
    targets = (rng.random(4000) < 1 / (1 + np.exp(-margin))).astype(int)
    return np.stack([np.zeros(4000), margin], axis=1), targets


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_the_temperature_undoes_a_scale(outputs, scale):
    logits, targets = outputs
    assert fit_temperature(logits * scale, targets) == pytest.approx(scale, rel=0.1)


def test_the_temperature_is_the_highest_within_a_standard_error_of_the_best(outputs):
    logits, targets = outputs
    for few in (100, 1000, 4000):
        best, chosen = (choose(logits[:few], targets[:few]) for choose in (fit_temperature, choose_temperature))
        lowest, error = (losses(logits[:few], targets[:few], value) for value in (best, chosen))
        limit = lowest.mean() + lowest.std() / np.sqrt(few)
        assert best < chosen and error.mean() <= limit
        assert chosen == pytest.approx(2 * best) or error.mean() == pytest.approx(limit, rel=0.01)
    sure = np.where(targets[:, None] == [0, 1], 5.0, -5.0)
    assert choose_temperature(sure, targets) >= fit_temperature(sure, targets)  # at the smallest


def test_the_j_of_youdens_threshold_is_within_a_standard_error_of_the_highest(outputs):
    logits, targets = outputs
    scores = 1 / (1 + np.exp(-logits[:, 1] - 1))  # the best is at 0.73
    threshold = choose_threshold(scores, targets == 1)
    fpr, tpr, thresholds = roc_curve(targets, scores)
    best = (tpr - fpr).argmax()
    n = np.bincount(targets)
    error = np.sqrt(tpr[best] * (1 - tpr[best]) / n[1] + fpr[best] * (1 - fpr[best]) / n[0])
    j = 2 * balanced_accuracy_score(targets, scores >= threshold) - 1
    assert (tpr - fpr).max() - error <= j + 1e-9
    assert 0.5 < threshold < thresholds[best] - 0.02  # nearer to 0.5 than the threshold with the highest J


def test_youdens_threshold_is_the_one_nearest_a_half_within_a_standard_error(outputs):
    logits, targets = outputs
    positives, scores = targets[:300] == 1, 1 / (1 + np.exp(-logits[:300, 1] - 1))
    values = np.unique(scores)
    candidates = (values[1:] + values[:-1]) / 2
    rates = np.array([[(scores >= t)[positives].mean(), (scores < t)[~positives].mean()] for t in candidates])
    j = rates.sum(axis=1) - 1
    best = j.argmax()
    variance = (rates[best] * (1 - rates[best]) / [positives.sum(), (~positives).sum()]).sum()
    within = candidates[j >= j[best] - np.sqrt(variance)]
    expected = min(within, key=lambda t: abs(t - 0.5))
    assert choose_threshold(scores, positives) == pytest.approx(expected)
    assert abs(expected - 0.5) < abs(candidates[best] - 0.5) - 0.02


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95, 1.0])
def test_a_target_sensitivity_is_reached_at_the_highest_specificity(outputs, target):
    logits, targets = outputs
    scores = logits[:, 1]
    threshold = choose_threshold(scores, targets == 1, target)
    assert recall_score(targets, scores >= threshold) >= target
    fpr, tpr, _ = roc_curve(targets, scores, drop_intermediate=False)
    specificity = recall_score(targets, scores >= threshold, pos_label=0)
    assert specificity == pytest.approx(1 - fpr[tpr >= target].min())


def test_of_thresholds_with_equal_rates_the_middle_one_is_chosen():
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.9])
    positives = np.array([False, True, False, False, True])
    assert choose_threshold(scores, positives, 0.5) == pytest.approx(0.65)
    scores, positives = np.array([0.1, 0.3, 0.5, 0.7, 0.9]), np.array([False, True, True, True, True])
    assert choose_threshold(scores, positives, 0.25) == pytest.approx(0.6)


def test_the_threshold_of_separated_scores_lies_between_them():
    assert choose_threshold(np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])) == pytest.approx(0.5)


def test_with_too_few_images_nothing_is_chosen(outputs):
    logits, targets = outputs
    few = calibrate(logits[:40], targets[:40], 1)
    assert (few.temperature, few.threshold, few.calibrated) == (1.0, 0.5, False)
    assert few.note.startswith("not calibrated: 40 validation images")
    rare = np.flatnonzero(targets == 1)[:9]
    lopsided = np.concatenate([np.flatnonzero(targets == 0)[:100], rare])
    assert "9 of the rarest class" in calibrate(logits[lopsided], targets[lopsided], 1).note
    enough = calibrate(logits, targets, 1)
    assert enough.threshold != 0.5 and enough.calibrated and "not calibrated" not in enough.note
    assert calibrate(logits, targets, None).threshold is None


@pytest.mark.parametrize("margin", [0.3, 1, 8])
def test_without_errors_the_temperature_stays_one(margin):
    """The likelihood grows as the temperature falls to zero, which would make an unsure network sure."""
    targets = np.arange(100) % 2
    logits = margin * np.where(targets[:, None] == [0, 1], 1.0, -1.0)
    result = calibrate(logits, targets, 1)
    assert (result.temperature, result.threshold, result.calibrated) == (1.0, pytest.approx(0.5), False)
    assert result.note.startswith("not calibrated: without errors on 100 validation images the temperature cannot be")
    assert calibrate(logits, targets, None).temperature == 1.0


def test_a_temperature_at_its_limit_is_reported(outputs):
    logits, targets = outputs
    assert "at its limit" in calibrate(logits / 1000, targets, 1).note
    assert "at its limit" in calibrate(-logits, targets, 1).note  # no better than chance
    assert "at its limit" not in calibrate(logits, targets, 1).note
