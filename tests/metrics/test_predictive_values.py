"""PPV and NPV at a prevalence: Bayes' theorem, and intervals near published ones that hold the truth."""

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.metrics import precision_score

from tests.benchmarks.predictive_values import draw
from tests.metrics.drawn import draw as draw_scored
from xray_fastai.metrics.predictive_values import predictive_values
from xray_fastai.metrics.scored import Scored


def of_counts(found: int, positives: int, cleared: int, negatives: int, prevalence, images_of_a_patient: int = 1):
    """Return both values of a two-by-two table, each as value, low and high."""
    y_true = np.repeat([1, 0], [positives, negatives])
    y_pred = np.concatenate([np.arange(positives) < found, np.arange(negatives) >= cleared]).astype(int)
    patients = np.arange(len(y_true)) // images_of_a_patient
    return predictive_values(Scored(y_true, np.eye(2)[y_pred], patients, 1), y_pred, prevalence)


def test_at_the_share_of_the_images_they_are_those_of_the_table():
    scored = draw_scored(2, images=200)
    y_pred = (scored.y_prob[:, 1] >= 0.5).astype(int)
    ppv, npv = predictive_values(scored, y_pred, scored.y_true.mean())
    assert ppv.value == pytest.approx(precision_score(scored.y_true, y_pred))
    assert npv.value == pytest.approx(precision_score(1 - scored.y_true, 1 - y_pred))


def test_the_breast_cancer_signature():
    """van de Vijver et al. 2002, at a prevalence of 7 %: the score intervals of Gart & Nam (CIfinder's README) are
    0.139 to 0.305 and 0.977 to 0.998; with no false alarm the PPV is 0.526 at least."""
    ppv, npv = of_counts(31, 34, 32, 44, 0.07)
    assert ppv == pytest.approx((0.2010, 0.139, 0.305), abs=0.006)
    assert npv == pytest.approx((0.99095, 0.977, 0.998), abs=0.003)
    ppv, npv = of_counts(31, 34, 44, 44, 0.07)
    assert (ppv.value, ppv.high) == (1, 1) and 0.4 < ppv.low < 0.53
    assert npv == pytest.approx((0.9934, 0.984, 0.998), abs=0.002)


@pytest.mark.parametrize("prevalence", [0.03, 0.5])
def test_with_many_images_it_is_the_interval_on_the_logit(prevalence):
    """Mercaldo et al. 2007, equations 8 to 11, on their table VIII (ApoE e4 and Alzheimer's disease)."""
    se, sp, cases, controls = 240 / 418, 288 / 375, 418, 375
    ppv, npv = of_counts(240, 418, 288, 375, prevalence)
    odds = prevalence / (1 - prevalence)
    for found, ratio, variance in (
        (ppv, odds * se / (1 - sp), (1 - se) / se / cases + sp / (1 - sp) / controls),
        (npv, sp / (1 - se) / odds, se / (1 - se) / cases + (1 - sp) / sp / controls),
    ):
        center = np.log(ratio)
        limits = expit(center + np.array([0, -1, 1]) * 1.96 * np.sqrt(variance))
        assert logit(found) == pytest.approx(logit(limits), abs=0.015)


def test_an_array_of_prevalences_is_a_curve():
    shares = np.array([0.001, 0.03, 0.9])
    curve = of_counts(31, 34, 32, 44, shares)
    for i, share in enumerate(shares):
        for values, one in zip(curve, of_counts(31, 34, 32, 44, share), strict=True):
            assert [part[i] for part in values] == pytest.approx(list(one))
    assert (np.diff(curve.ppv.value) > 0).all() and (np.diff(curve.npv.value) < 0).all()


def test_images_of_one_patient_count_as_fewer():
    single, paired = (of_counts(180, 200, 190, 200, 0.03, k).ppv for k in (1, 10))
    assert paired.value == single.value and paired.high - paired.low > 1.5 * (single.high - single.low)


def test_what_is_undefined():
    ppv, npv = of_counts(0, 34, 44, 44, 0.07)  # no image is called positive
    assert np.isnan(ppv).all() and npv.value == pytest.approx(0.93) and npv.low < 0.93 < npv.high
    assert np.isnan(of_counts(3, 34, 0, 0, 0.07)).all()  # images of one class
    ppv, _ = of_counts(3, 4, 30, 44, 0.07, images_of_a_patient=4)  # one patient has the class
    assert ppv.value > 0 and np.isnan([ppv.low, ppv.high]).all()
    ppv, npv = of_counts(34, 34, 44, 44, 0.07)  # no image is called wrongly
    assert ppv.value == npv.value == ppv.high == npv.high == 1 and 0.4 < ppv.low < 0.6 and 0.98 < npv.low < 1


@pytest.mark.parametrize("mixed", [0.0, 0.3])
def test_the_intervals_hold_the_truth(mixed):
    """Of 300 tests of 60 patients with correlated images; the benchmark has more."""
    rng, held = np.random.default_rng(0), {"ppv": 0, "npv": 0}
    truth = {"ppv": 0.9 * 0.03 / (0.9 * 0.03 + 0.1 * 0.97), "npv": 0.9 * 0.97 / (0.9 * 0.97 + 0.1 * 0.03)}
    for _ in range(300):
        scored = draw(60, (0.9, 0.9), mixed, rng)
        found = predictive_values(scored, scored.y_prob[:, 1], 0.03)
        for name, true in truth.items():
            held[name] += getattr(found, name).low <= true <= getattr(found, name).high
    assert all(0.91 <= count / 300 <= 0.99 for count in held.values()), held
