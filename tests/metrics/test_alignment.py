"""Scores without labels are compared with validation's, and the operating point is moved to fit them."""

import numpy as np
import pytest
from scipy.stats import ks_1samp, kstwobign

from xray_fastai.metrics.alignment import (
    Reference,
    align,
    distance,
    log_odds,
    matched,
    p_value,
    quantiles,
)


def draw(images: int, prevalence: float, moved: float = 0, spread: float = 1, seed: int = 0) -> np.ndarray:
    """Scores of a good model: normal by class, with an AUC of 0.98; `moved` and `spread` change all."""
    rng = np.random.default_rng(seed)
    positive = rng.random(images) < prevalence
    return np.where(positive, rng.normal(2.3, 1.6, images), rng.normal(-2.3, 1.6, images)) * spread + moved


@pytest.fixture(scope="module")
def reference():
    rng = np.random.default_rng(9)
    return Reference(*(np.array(quantiles(rng.normal(mean, 1.6, 2000), 101)) for mean in (-2.3, 2.3)), 0.7, 600)


def test_log_odds_are_of_the_class_to_detect():
    assert log_odds(np.array([[1, 3], [2.0, -1]], np.float32), 0).tolist() == [-2, 3]


def test_the_reference_mixes_the_classes_by_the_prevalence(reference):
    assert reference.below(np.array([-99, -2.3, 2.3, 99]), 0.25) == pytest.approx([0, 0.375, 0.876, 1], abs=0.02)
    assert reference.share_called(0.0, 0.0) == pytest.approx(1 - 0.925, abs=0.02)  # 1 - specificity
    assert reference.share_called(0.0, 1.0) == pytest.approx(0.925, abs=0.02)  # sensitivity


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.745, 1])
def test_the_share_called_is_the_one_wanted(share):
    scores = draw(200, 0.5)
    assert (scores >= matched(scores, share)).mean() == pytest.approx(share, abs=0.003)


def test_the_distance_is_that_of_kolmogorov_and_smirnov(reference):
    scores = draw(80, 0.5)
    expected = ks_1samp(scores, lambda values: reference.below(values, 0.7)).statistic
    assert distance(scores, reference, 0.7) == pytest.approx(expected, abs=1e-12)


def test_the_p_value_is_of_two_samples(reference):
    """The reference of 600 patients against 300 counts as 200 images against a known distribution."""
    assert p_value(0.1, 300, reference) == pytest.approx(kstwobign.sf(np.sqrt(200) * 0.1))


@pytest.mark.parametrize("moved", [-2, 1.5])
@pytest.mark.parametrize("prevalence", [0.7, 0.3])
def test_a_move_of_all_scores_is_found(prevalence, moved, reference):
    """What balances sensitivity and specificity at validation does so again."""
    found = [align(draw(300, prevalence, moved, seed=s), 300, reference, 0.0, prevalence) for s in range(8)]
    assert np.mean([alignment.threshold for alignment in found]) == pytest.approx(moved, abs=0.25)


def test_scores_that_fit_as_they_are_stay(reference):
    """Chance alone would move the threshold by some 0.5."""
    found = align(draw(300, 0.3), 300, reference, 0.1, 0.3)
    assert found.threshold == 0.1 and found.kind == "none"


@pytest.mark.parametrize(
    ("prevalence", "moved", "spread", "kind"),
    [
        (0.7, 0, 1, "none"),
        (0.3, 0, 1, "prevalence"),
        (0.7, 2, 1, "images"),
        (0.7, -2, 1, "images"),
        (0.7, 0, 0.4, "unknown"),
    ],
)
def test_a_shift_of_the_prevalence_is_told_from_one_of_the_images(prevalence, moved, spread, kind, reference):
    """The prevalence is said to be 0.7."""
    for seed in range(5):
        found = align(draw(300, prevalence, moved, spread, seed), 300, reference, 0.0, 0.7)
        assert found.kind == kind
        assert kind != "prevalence" or found.prevalence == pytest.approx(prevalence, abs=0.1)


def test_without_a_shift_the_test_is_wrong_as_seldom_as_it_says(reference):
    """At most one in twenty; with the prevalence that fits best less often."""
    found = [align(draw(150, 0.3, seed=seed), 150, reference, 0.0, 0.3) for seed in range(200)]
    wrong = sum(alignment.unmoved < 0.05 for alignment in found), sum(alignment.mixed < 0.05 for alignment in found)
    assert wrong[1] <= wrong[0] <= 18  # 10 are expected, and more than 18 in one run of 100
