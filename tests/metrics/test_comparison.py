"""Differences between two models have DeLong's, McNemar's and Newcombe's figures, and go by patient."""

import doctest

import numpy as np
import pytest
from scipy.stats import norm, t
from sklearn.metrics import roc_auc_score

from tests.metrics.drawn import draw
from xray_fastai.metrics import comparison
from xray_fastai.metrics.comparison import Called, compare_metrics, mcnemar
from xray_fastai.metrics.influence import Shares
from xray_fastai.metrics.intervals import share_interval
from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import METRICS


def two(images=120, patients=None, seed=0):
    """Two models of the same images; the second sees the first one's probability, with noise."""
    one = draw(2, images=images, patients=patients or 40, seed=seed)
    numbers = np.arange(images) if patients is None else one.patients
    positive = np.clip(one.y_prob[:, 1] + np.random.default_rng(seed).normal(0, 0.25, images), 0.01, 0.99)
    scored = [
        Scored(one.y_true, y_prob, numbers, 1) for y_prob in (one.y_prob, np.stack([1 - positive, positive], axis=1))
    ]
    return [Called(each, (each.y_prob[:, 1] >= 0.5).astype(int)) for each in scored]


def repeated(called, times):
    """The same images, each `times` over, as images of one patient."""
    s = called.scored
    again = [np.repeat(values, times, axis=0) for values in (s.y_true, s.y_prob, s.patients, called.y_pred)]
    return Called(Scored(*again[:3], s.positive), again[3])


def test_the_examples():
    failed, tried = doctest.testmod(comparison, extraglobs={"np": np})
    assert tried and not failed


def scores_of(images, seed, decimals):
    """Return the truth (N,), and the scores (2, N) of two models that see partly the same; rounded, many are equal."""
    rng = np.random.default_rng(seed)
    truth = np.arange(images) % 5 < 2
    common, own = rng.normal(size=images), rng.normal(size=(2, images))
    return truth, np.round(truth * np.array([[1.2], [0.7]]) + 0.7 * common + 0.7 * own, decimals)


@pytest.mark.parametrize("decimals", [6, 0])
def test_delongs_test_is_its_definition(decimals):
    """The structural components of DeLong et al. 1988, counted over all pairs, and the covariances of their means."""
    truth, scores = scores_of(90, 0, decimals)
    positives, negatives = scores[:, truth], scores[:, ~truth]
    m, n = positives.shape[1], negatives.shape[1]
    psi = np.empty((2, m, n))
    for model in range(2):
        for i in range(m):
            for j in range(n):
                x, y = positives[model, i], negatives[model, j]
                psi[model, i, j] = 1.0 if x > y else 0.5 if x == y else 0.0
    assert (psi == 0.5).any() == (decimals == 0)
    auc, v10, v01 = psi.mean(axis=(1, 2)), psi.mean(axis=2), psi.mean(axis=1)  # (2,), (2, m), (2, n)
    covariance = np.zeros((2, 2))
    for a in range(2):
        for b in range(2):
            covariance[a, b] += sum((v10[a] - auc[a]) * (v10[b] - auc[b])) / (m - 1) / m
            covariance[a, b] += sum((v01[a] - auc[a]) * (v01[b] - auc[b])) / (n - 1) / n
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    found = compare_aucs(truth, scores)
    assert (found.a, found.b) == pytest.approx(tuple(auc)) and found.test == "DeLong's test"
    assert (found.high - found.low) / 2 == pytest.approx(1.99 * error, rel=0.02)
    assert found.p == pytest.approx(2 * t.sf(abs(auc[1] - auc[0]) / error, 82), rel=0.2) and 1e-4 < found.p < 0.5


def compare_aucs(truth, scores):
    """Compare the AUCs of two models of as many patients as images."""
    called = []
    for score in scores:
        y_prob = norm.cdf(np.stack([-score, score], axis=1))
        called.append(Called(Scored(truth.astype(int), y_prob, np.arange(len(truth)), 1), (score > 0).astype(int)))
    return compare_metrics(*called, 10)["roc_auc"]


@pytest.mark.parametrize("images", [12, 40, 90])
def test_the_aucs_p_and_interval_agree(images):
    """With few images, too: p is below 0.05 where the interval leaves out 0, which some of these do."""
    found = [compare_aucs(*scores_of(images, seed, 6)) for seed in range(40)]
    clear = [one.low > 0 or one.high < 0 for one in found]
    assert clear == [one.p < 0.05 for one in found] and not all(clear) and (any(clear) or images == 12)


def test_delongs_error_is_that_of_a_bootstrap():
    truth, scores = scores_of(400, 1, 6)
    positives, negatives = np.flatnonzero(truth), np.flatnonzero(~truth)
    rng, differences = np.random.default_rng(0), []
    for _ in range(1500):
        drawn = np.concatenate([rng.choice(part, len(part)) for part in (positives, negatives)])
        differences.append(np.subtract(*(roc_auc_score(truth[drawn], model[drawn]) for model in scores)))
    found = compare_aucs(truth, scores)
    assert (found.high - found.low) / 2 == pytest.approx(1.966 * np.std(differences), rel=0.06)


def test_mcnemars_test_counts_what_one_model_alone_has_right():
    """One image against five, of six: 2 (1 + 6) / 2^6."""
    right = np.array(
        [[True] * 20 + [True] + [False] * 5 + [False] * 7, [True] * 20 + [False] + [True] * 5 + [False] * 7]
    )
    assert mcnemar(*right) == pytest.approx(14 / 64)
    assert mcnemar(right[0], right[0]) == 1


def test_a_share_has_newcombes_interval():
    """His method 10, written out: Wilson's limits of both shares, and the coefficient phi of the fourfold table."""
    rng = np.random.default_rng(0)
    a = rng.random(300) < 0.8
    b = np.where(rng.random(300) < 0.6, a, rng.random(300) < 0.9)
    table = np.array([[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]])
    phi = np.linalg.det(table) / np.sqrt(np.prod([*table.sum(axis=0), *table.sum(axis=1)], dtype=float))
    y_true, called = np.ones(300, int), []
    for right in (a, b):
        y_pred = right.astype(int)
        called.append(Called(Scored(y_true, np.eye(2)[y_pred], np.arange(300), 1), y_pred))
    (la, ua), (lb, ub) = (share_interval(Shares(x[:, None], np.ones((300, 1))), np.arange(300)) for x in (a, b))
    pa, pb = a.mean(), b.mean()
    below = np.sqrt((pb - lb) ** 2 - 2 * phi * (pb - lb) * (ua - pa) + (ua - pa) ** 2)
    above = np.sqrt((ub - pb) ** 2 - 2 * phi * (ub - pb) * (pa - la) + (pa - la) ** 2)
    found = compare_metrics(*called, 10)["accuracy"]
    assert (found.low, found.high) == pytest.approx((pb - pa - below, pb - pa + above))


def test_the_difference_of_aucs_has_the_error_of_a_jackknife_over_patients():
    a, b = two(images=400, patients=150)
    patients, y_true = a.scored.patients, a.scored.y_true
    left = [patients != i for i in range(patients.max() + 1)]
    values = np.array(
        [np.subtract(*(roc_auc_score(y_true[keep], one.scored.y_prob[keep, 1]) for one in (b, a))) for keep in left]
    )
    error = np.sqrt((len(left) - 1) / len(left) * ((values - values.mean()) ** 2).sum())
    found = compare_metrics(a, b, 10)["roc_auc"]
    assert found.test == "Obuchowski's test" and (found.high - found.low) / 2 == pytest.approx(1.97 * error, rel=0.04)


def test_copies_of_an_image_add_no_certainty():
    """Three copies of each image, as one patient's, have the intervals of one, and the p of its AUC."""
    once = compare_metrics(*two(), 10)
    thrice = compare_metrics(*(repeated(one, 3) for one in two()), 10)
    for name in ("roc_auc", "accuracy", "nll", "sensitivity"):
        assert thrice[name][:5] == pytest.approx(once[name][:5])
    assert once["roc_auc"].test == "DeLong's test" and once["accuracy"].test == "McNemar's exact test"
    assert thrice["roc_auc"].p == pytest.approx(once["roc_auc"].p)


def test_the_models_can_be_swapped():
    a, b = two(patients=50)
    there, back = compare_metrics(a, b, 50), compare_metrics(b, a, 50)
    for name in METRICS:
        expected = (there[name].b, there[name].a, -there[name].difference, -there[name].high, -there[name].low)
        assert back[name][:5] == pytest.approx(expected, nan_ok=True)
        assert back[name].p == pytest.approx(there[name].p, nan_ok=True)


def test_all_that_has_an_interval_has_one_of_the_difference():
    found = compare_metrics(*two(patients=50), 50)
    for name, one in found.items():
        assert one.difference == pytest.approx(one.b - one.a)
        assert name == "expected_calibration_error" or one.low < one.difference < one.high
    assert [name for name, one in found.items() if one.test] == ["accuracy", "sensitivity", "specificity", "roc_auc"]


def test_a_model_does_not_differ_from_itself():
    a, _ = two()
    for name, one in compare_metrics(a, a, 10).items():
        assert one.difference == 0 and (np.isnan(one.low) or one.low <= 0 <= one.high), name
        assert np.isnan(one.p) or one.p == 1


def test_three_classes_and_one_class():
    three = [draw(3, seed=0), draw(3, seed=0)]
    calls = [Called(one, one.y_prob.argmax(axis=1)) for one in three]
    calls[1] = Called(calls[1].scored, calls[0].scored.y_true)
    found = compare_metrics(*calls, 10)
    assert found["accuracy"].difference > 0.1 and [name for name, one in found.items() if one.test] == ["accuracy"]
    a, b = (Called(Scored(np.ones(120, int), one.scored.y_prob, one.scored.patients, 1), one.y_pred) for one in two())
    found = compare_metrics(a, b, 10)
    assert np.isnan(found["roc_auc"][:5]).all() and found["sensitivity"].low < found["sensitivity"].high


def test_errors_on_other_images_of_the_same_patients_cancel():
    """Of 20 of 100 patients the one model errs on the first image, the other one on the second: no patient differs."""
    y_true, patients = np.repeat(np.arange(100) % 2, 2), np.repeat(np.arange(100), 2)
    called = []
    for image in (0, 1):
        y_pred = y_true.copy()
        y_pred[image:40:2] = 1 - y_pred[image:40:2]
        called.append(Called(Scored(y_true, np.eye(2)[y_pred], patients, 1), y_pred))
    found = compare_metrics(*called, 10)["accuracy"]
    assert found.difference == 0
    assert found.high - found.low < 0.04  # by image it is 0.13
