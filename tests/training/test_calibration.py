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


def test_the_temperature_is_the_least_sure_of_those_as_good_as_the_best(outputs):
    logits, targets = outputs
    for few in (100, 1000, 4000):
        best, chosen = (choose(logits[:few], targets[:few]) for choose in (fit_temperature, choose_temperature))
        least, error = (losses(logits[:few], targets[:few], value) for value in (best, chosen))
        most = least.mean() + least.std() / np.sqrt(few)
        assert best < chosen and error.mean() <= most
        assert chosen == pytest.approx(2 * best) or error.mean() == pytest.approx(most, rel=0.01)
    sure = np.where(targets[:, None] == [0, 1], 5.0, -5.0)
    assert choose_temperature(sure, targets) >= fit_temperature(sure, targets)  # at the smallest


def test_youdens_threshold_is_as_good_as_the_best_but_for_chance(outputs):
    logits, targets = outputs
    scores = 1 / (1 + np.exp(-logits[:, 1] - 1))  # the best is at 0.73
    threshold = choose_threshold(scores, targets == 1)
    fpr, tpr, thresholds = roc_curve(targets, scores)
    best = (tpr - fpr).argmax()
    n = np.bincount(targets)
    error = np.sqrt(tpr[best] * (1 - tpr[best]) / n[1] + fpr[best] * (1 - fpr[best]) / n[0])
    j = 2 * balanced_accuracy_score(targets, scores >= threshold) - 1
    assert (tpr - fpr).max() - error <= j + 1e-9
    assert 0.5 < threshold < thresholds[best]  # nearer to 0.5 than the best one


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95, 1.0])
def test_a_target_sensitivity_is_reached_at_the_highest_specificity(outputs, target):
    logits, targets = outputs
    scores = logits[:, 1]
    threshold = choose_threshold(scores, targets == 1, target)
    assert recall_score(targets, scores >= threshold) >= target
    fpr, tpr, _ = roc_curve(targets, scores, drop_intermediate=False)
    specificity = recall_score(targets, scores >= threshold, pos_label=0)
    assert specificity == pytest.approx(1 - fpr[tpr >= target].min())


def test_scores_apart_put_the_threshold_between_them():
    assert choose_threshold(np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])) == pytest.approx(0.5)


def test_too_few_images_settle_nothing(outputs):
    logits, targets = outputs
    few = calibrate(logits[:40], targets[:40], 1)
    assert (few.temperature, few.threshold) == (1.0, 0.5) and "40 validation images" in few.note
    assert calibrate(logits, targets, 1).threshold != 0.5
    assert calibrate(logits, targets, None).threshold is None


@pytest.mark.parametrize("margin", [0.3, 1, 8])
def test_images_all_called_rightly_tell_no_temperature(margin):
    """The surer, the likelier: there is no best one, and a network in doubt is not to be made sure."""
    targets = np.arange(100) % 2
    logits = margin * np.where(targets[:, None] == [0, 1], 1.0, -1.0)
    found = calibrate(logits, targets, 1)
    assert (found.temperature, found.threshold) == (1.0, pytest.approx(0.5))
    assert found.note.startswith("not calibrated: 100 validation images, all called rightly, tell no temperature")
    assert calibrate(logits, targets, None).temperature == 1.0


def test_a_temperature_at_its_limit_is_told(outputs):
    logits, targets = outputs
    assert "at its limit" in calibrate(logits / 1000, targets, 1).note
    assert "at its limit" in calibrate(-logits, targets, 1).note  # as good as a coin
    assert "at its limit" not in calibrate(logits, targets, 1).note
