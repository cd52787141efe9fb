"""The decision threshold: Youden's J near the prior, a sensitivity that new images reach, errors by patient."""

import numpy as np
import pytest
from scipy.stats import binom, norm
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_curve

from xray_fastai.training.threshold import CONFIDENCE, by_sensitivity, by_youden, effective_number, standard_error

EACH = np.arange(4000)  # an image a patient


@pytest.fixture
def outputs():
    """Scores that are right probabilities, and whether each image is positive."""
    rng = np.random.default_rng(0)
    scores = 1 / (1 + np.exp(-rng.normal(0, 2, 4000)))
    return scores, rng.random(4000) < scores


def test_a_standard_error_by_patient():
    """By hand: three patients with sums of deviations of 2, -1 and -1."""
    values, patients = np.array([2.0, 2.0, 0.0, 0.0]), np.array([7, 7, 3, 1])
    assert standard_error(values, patients) == pytest.approx(np.sqrt(3 / 2 * (4 + 1 + 1)) / 4)
    alone = np.random.default_rng(0).random(50)
    assert standard_error(alone, np.arange(50)) == pytest.approx(alone.std(ddof=1) / np.sqrt(50))


def test_equal_images_of_a_patient_count_as_one():
    hits = np.random.default_rng(0).random(60) < 0.7
    alone = effective_number(hits, np.arange(60))
    assert (
        effective_number(np.repeat(hits, 3), np.repeat(np.arange(60), 3)) == pytest.approx(alone) == pytest.approx(59)
    )
    assert effective_number(np.ones(90, bool), np.repeat(np.arange(30), 3)) == 30  # the variance says nothing


def test_the_j_of_youdens_threshold_is_within_a_standard_error_of_the_highest(outputs):
    _, positives = outputs
    scores = 1 / (1 + np.exp(-np.log(outputs[0] / (1 - outputs[0])) - 1))  # the best is at 0.73
    threshold = by_youden(scores, positives, EACH)
    fpr, tpr, thresholds = roc_curve(positives, scores)
    best = (tpr - fpr).argmax()
    n = np.bincount(positives.astype(int))
    error = np.sqrt(tpr[best] * (1 - tpr[best]) / n[1] + fpr[best] * (1 - fpr[best]) / n[0])
    j = 2 * balanced_accuracy_score(positives, scores >= threshold) - 1
    assert (tpr - fpr).max() - 1.05 * error <= j + 1e-9
    assert 0.5 < threshold < thresholds[best] - 0.02  # nearer to 0.5 than the threshold with the highest J


def test_the_tolerance_has_the_error_of_agresti_and_coull_by_patient():
    """Each class has 20 images, without errors; each score of the middle is passed at the cost of one more error."""
    negatives, positives = np.linspace(0.01, 0.2, 20), np.linspace(0.21, 0.4, 20)
    scores, truth = np.concatenate([negatives, positives]), np.arange(40) >= 20

    def allowed(patients: int) -> float:
        share = (1.96**2 / 2) / (patients + 1.96**2)
        return np.sqrt(2 * share * (1 - share) / (patients + 1.96**2))

    for patients in (20, 5):
        names = np.arange(40) // (20 // patients)
        missed = int(allowed(patients) * 20)  # positives that the threshold may miss on its way to 0.5
        assert by_youden(scores, truth, names) == pytest.approx(0.205 + 0.01 * missed)
    assert int(allowed(20) * 20) < int(allowed(5) * 20)


def test_a_threshold_of_separated_scores_is_the_prior_if_it_lies_between_them():
    """The middle of the gap depends on two images: it was exported."""
    scores, truth = np.repeat([0.01, 0.02, 0.62, 0.9], 10), np.repeat([False, False, True, True], 10)
    patients = np.arange(40)
    assert by_youden(scores, truth, patients) == 0.5
    assert by_youden(scores, truth, patients, 0.3) == 0.3
    assert by_youden(scores, truth, patients, 0.7) == pytest.approx(0.32)
    assert by_youden(np.full(40, 0.2), truth, patients, 0.4) == 0.4  # nothing to choose from


def test_youdens_threshold_is_pulled_to_the_prior(outputs):
    """Right probabilities of a collection with 74 % positives: the best threshold is 0.74, not 0.5."""
    scores, positives = outputs
    odds = scores / (1 - scores) * 0.74 / 0.26
    rng = np.random.default_rng(1)
    keep = np.where(positives, True, rng.random(4000) < 0.26 / 0.74)  # 74 % of those that are kept
    scores = (odds / (1 + odds))[keep][:300]
    positives = positives[keep][:300]
    near, far = (by_youden(scores, positives, EACH[:300], centre) for centre in (0.74, 0.5))
    assert near == pytest.approx(0.74, abs=0.02) and far < near - 0.03


@pytest.mark.parametrize("target", [0.5, 0.9, 0.95])
def test_a_sensitivity_is_reached_by_a_lower_bound_at_the_highest_specificity(outputs, target):
    scores, positives = outputs
    threshold, probability = by_sensitivity(scores, positives, EACH, target)
    assert probability >= CONFIDENCE and recall_score(positives, scores >= threshold) > target
    missed, n = (scores[positives] < threshold).sum(), positives.sum()
    chances = [binom.sf(m, n, 1 - target) for m in (missed, missed + 1)]  # Clopper and Pearson's
    assert chances[0] >= CONFIDENCE - 1e-3 and chances[1] < CONFIDENCE + 1e-3
    between = np.sort(np.append(scores, threshold))
    at = np.searchsorted(between, threshold)
    assert positives[scores == between[at + 1]].all()  # a higher threshold would miss the next positive


def test_new_images_reach_the_sensitivity_in_nearly_all_fits():
    """Scores of images of 60 positive patients; the sensitivity of a threshold on new images is known."""
    rng = np.random.default_rng(0)
    reached = []
    for _ in range(150):
        patients = np.repeat(np.arange(120), rng.integers(1, 4, 120))
        positives = patients < 60
        effect = rng.normal(size=120)[patients]
        score = np.sqrt(0.5) * effect + np.sqrt(0.5) * rng.normal(size=len(patients)) + 3 * positives
        threshold, probability = by_sensitivity(score, positives, patients, 0.9)
        assert probability >= CONFIDENCE
        reached.append(norm.sf(threshold - 3) >= 0.9)
    assert np.mean(reached) >= 0.93


def test_a_sensitivity_that_the_images_cannot_show_is_reached_on_them_with_its_probability():
    scores, positives = np.linspace(0, 1, 40), np.arange(40) >= 20
    threshold, probability = by_sensitivity(scores, positives, np.arange(40), 0.99)
    assert (scores[positives] >= threshold).all() and threshold > scores[19]
    assert probability == pytest.approx(1 - 0.99**20)
    assert by_sensitivity(scores, positives, np.arange(40) // 2, 0.99)[1] == pytest.approx(1 - 0.99**10)
    assert by_sensitivity(scores, ~positives, np.arange(40), 0.9)[0] == 0  # no score is lower


def test_images_with_equal_scores_are_missed_together():
    scores = np.repeat([0.2, 0.4, 0.6, 0.8], 50)
    positives = np.tile([True, False], 100)
    threshold, _ = by_sensitivity(scores, positives, np.arange(200), 0.6)
    assert threshold == pytest.approx(0.3)  # 0.4 and all above are found: 75 of 100
