"""Intervals are Wilson's and Student's with the variance between patients, and none has no width."""

import time

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from tests.metrics.drawn import draw
from xray_fastai.metrics import influence
from xray_fastai.metrics.influence import Shares
from xray_fastai.metrics.intervals import (
    FALSE_POSITIVE_RATES,
    interval_of,
    measure,
    patient_weights,
    sensitivities,
    share_interval,
    student_interval,
)
from xray_fastai.metrics.scored import Scored

# Weil's rats, table 1 of Rao & Scott 1992: of each litter those that survived, of those alive after four days
CONTROL = "13/13 12/12 9/9 9/9 8/8 8/8 12/13 11/12 9/10 9/10 8/9 11/13 4/5 5/7 7/10 7/10"
TREATED = "12/12 11/11 10/10 9/9 10/11 9/10 9/10 8/9 8/9 4/5 7/9 4/7 5/10 3/6 3/10 0/7"


def of_litters(text):
    counts = [tuple(map(int, litter.split("/"))) for litter in text.split()]
    hits = np.concatenate([np.arange(n) < y for y, n in counts])
    litters = np.repeat(np.arange(len(counts)), [n for _, n in counts])
    return Shares(hits[:, None], np.ones((len(hits), 1))), litters


@pytest.mark.parametrize(("text", "share", "effect"), [(CONTROL, 142 / 158, 1.232495), (TREATED, 112 / 145, 3.952861)])
def test_the_effective_number_is_that_of_rao_and_scott(text, share, effect):
    """The published design effects of the two groups: the limits are Wilson's with the number divided by them."""
    shares, litters = of_litters(text)
    assert shares.values == pytest.approx([share])
    t = stats.t.ppf(0.975, 15)
    n = len(litters) / effect
    center, half = wilson(share, n, t)
    assert share_interval(shares, litters) == pytest.approx((center - half, center + half), abs=1e-6)


def wilson(p, n, z):
    return (p + z**2 / 2 / n) / (1 + z**2 / n), z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)


@pytest.mark.parametrize("hits", [0, 1, 30, 199, 200])
def test_of_an_image_each_it_is_scipys_wilson_interval(hits):
    """With the quantile of Student instead of the normal's; the variance has n - 1 below."""
    shares = Shares((np.arange(200) < hits)[:, None], np.ones((200, 1)))
    level = 2 * stats.norm.cdf(stats.t.ppf(0.975, 199)) - 1
    expected = stats.binomtest(hits, 200).proportion_ci(level, "wilson")
    assert share_interval(shares, np.arange(200)) == pytest.approx((expected.low, expected.high), abs=4e-4)


def test_a_mean_of_shares_is_that_of_zou_and_donner():
    """Of two independent shares, each half of the distance to its limit, squared and added (MOVER)."""
    rng = np.random.default_rng(0)
    side = np.arange(300) % 2 == 0
    hits = rng.random(300) < np.where(side, 0.95, 0.7)
    shares = Shares(np.stack([hits, hits], axis=1), np.stack([side, ~side], axis=1).astype(float))
    low, high = share_interval(shares, np.arange(300))
    parts = [share_interval(Shares(hits[:, None], s[:, None].astype(float)), np.arange(300)) for s in (side, ~side)]
    p, (lows, highs) = shares.values, np.transpose(parts)
    assert low == pytest.approx(p.mean() - np.hypot(*(p - lows)) / 2)
    assert high == pytest.approx(p.mean() + np.hypot(*(highs - p)) / 2)


def test_a_mean_of_equal_shares_is_the_share():
    """Shares that vary together do not narrow their mean."""
    hits = (np.arange(100) % 5 > 0)[:, None]
    once, twice = (Shares(np.repeat(hits, k, axis=1), np.ones((100, k))) for k in (1, 2))
    patients = np.arange(100) // 2
    assert share_interval(twice, patients) == pytest.approx(share_interval(once, patients))


def test_the_variance_of_the_auc_is_obuchowskis():
    """Her formula (Biometrics 1997), written out: sums of DeLong's components by patient, and their covariance."""
    scored = draw(2, images=120, patients=50)
    y, s, patients = scored.y_true, scored.y_prob[:, 1], scored.patients
    wins = (s[y == 1][:, None] > s[y == 0]) + (s[y == 1][:, None] == s[y == 0]) / 2  # (positives, negatives)
    auc = wins.mean()
    units, (m, n) = patients.max() + 1, wins.shape
    v10 = np.bincount(patients[y == 1], wins.mean(axis=1) - auc, units)
    v01 = np.bincount(patients[y == 0], wins.mean(axis=0) - auc, units)
    i10, i01 = (np.unique(patients[y == k]).size for k in (1, 0))
    s10, s01 = i10 / (i10 - 1) / m * (v10**2).sum(), i01 / (i01 - 1) / n * (v01**2).sum()
    s11 = units / (units - 1) * (v10 * v01).sum()
    expected = s10 / m + s01 / n + 2 * s11 / (m * n)
    of_patient = np.bincount(patients, influence.of_roc_auc(scored, 1))
    assert units / (units - 1) * (of_patient**2).sum() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["roc_auc", "average_precision"])
def test_the_standard_error_is_that_of_a_jackknife_over_patients(name):
    """With scikit-learn's metric, without one patient at a time."""
    scored = draw(2, images=400, patients=150)
    score = {"roc_auc": sk.roc_auc_score, "average_precision": sk.average_precision_score}[name]
    m = scored.patients.max() + 1
    left = [scored.patients != i for i in range(m)]
    values = np.array([score(scored.y_true[keep], scored.y_prob[keep, 1]) for keep in left])
    error = np.sqrt((m - 1) / m * ((values - values.mean()) ** 2).sum())
    value, low, high = interval_of(name, scored)
    half = (np.log(high / (1 - high)) - np.log(low / (1 - low))) / 2
    assert half == pytest.approx(1.96 * error / (value * (1 - value)), rel=0.06)


def test_student_has_a_degree_of_freedom_less_than_patients_where_nothing_is_unusual():
    """Normal influences have a kurtosis of 3 in the mean: then the interval is the textbook's of a mean."""
    x = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    low, high = student_interval(5, (x - x.mean()) / 2000, np.arange(2000), "real")
    expected = stats.ttest_1samp(x + 5, 0).confidence_interval()
    assert (low, high) == pytest.approx(expected, abs=1e-4)


def test_a_few_influential_patients_widen_students_interval():
    """Of equal variance, one in which five of a hundred patients differ is known less well."""
    patients = np.arange(100)
    even = np.where(patients % 2, 0.01, -0.01)
    few = np.zeros(100)
    few[:5] = np.array([2, -2, 2, -2, 0]) * 0.01 * np.sqrt(100 / 16)
    (low, high), (lower, higher) = (student_interval(0, u, patients, "real") for u in (even, few))
    assert (few**2).sum() == pytest.approx((even**2).sum()) and higher - lower > 1.1 * (high - low)


def test_one_patient_with_many_images_widens_the_interval():
    """Half of the images are misclassified: once of as many patients, once of a single one."""
    scored, number = draw(2, images=200), np.arange(200)
    y_pred = np.where(number < 100, 1 - scored.y_true, scored.y_true)
    of_patients = [
        measure(Scored(scored.y_true, scored.y_prob, patients, 1), {"x": y_pred}, 10).points["x"]["accuracy"]
        for patients in (number, np.maximum(number - 99, 0))
    ]
    (value, low, high), (same, lower, higher) = of_patients
    assert value == same == 0.5
    assert higher - lower > 3 * (high - low)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
def test_no_interval_is_without_width_or_without_its_metric(classes):
    rng = np.random.default_rng(0)
    with_interval = 0
    for seed in range(20):
        scored = draw(classes, images=int(rng.integers(4, 30)), patients=int(rng.integers(2, 12)), seed=seed)
        measured = measure(scored, {"x": scored.y_prob.argmax(axis=1), "true": scored.y_true}, 20)
        for value, low, high in [
            *measured.free.values(),
            *measured.points["x"].values(),
            *measured.points["true"].values(),
        ]:
            assert np.isnan(low) == np.isnan(high)
            assert np.isnan(low) or (low <= value <= high and high - low > 1e-6)
            with_interval += not np.isnan(low)
    assert with_interval > 150


def test_patients_that_agree_leave_no_false_certainty():
    """Of each patient one image of two is right: the variance between patients is 0."""
    shares = Shares((np.arange(40) % 2 == 0)[:, None], np.ones((40, 1)))
    low, high = share_interval(shares, np.arange(40) // 2)
    assert (low, high) == pytest.approx((0.349, 0.651), abs=0.01)
    assert np.isnan(student_interval(0.25, np.zeros(40), np.arange(40), "positive")).all()


def test_a_single_patient_with_an_error_gives_no_interval():
    """Three of four images found of the only positive patient: nothing is known about other patients."""
    y_true, patients = np.array([1, 1, 1, 1, 0, 0, 0]), np.array([0, 0, 0, 0, 1, 2, 3])
    y_pred = np.array([1, 1, 1, 0, 0, 0, 0])
    points = measure(Scored(y_true, np.eye(2)[y_pred], patients, 1), {"x": y_pred}, 10).points["x"]
    assert points["sensitivity"].value == 0.75 and np.isnan(points["sensitivity"].low)
    assert points["specificity"].low == pytest.approx(wilson(1, 3, stats.t.ppf(0.975, 2))[0] * 2 - 1, abs=1e-9)


def test_a_perfect_order_has_the_interval_of_its_rarer_class():
    y_true = np.repeat([1, 0], [10, 50])
    scored = Scored(y_true, np.eye(2)[y_true], np.arange(60), 1)
    value, low, high = interval_of("roc_auc", scored)
    t = stats.t.ppf(0.975, 9)
    assert (value, high) == (1, 1) and low == pytest.approx(10 / (10 + t**2))
    assert np.isnan(measure(scored, {}, 10).free["calibration_slope"]).all()


def test_one_patient_has_no_interval():
    interval = measure(draw(2, patients=1), {}, 10).free["roc_auc"]
    assert np.isfinite(interval.value) and np.isnan([interval.low, interval.high]).all()


def test_the_curves_of_each_class():
    scored = draw(3)
    for curve in measure(scored, {}, 10).curves:
        assert curve.auc.value == pytest.approx(sk.roc_auc_score(scored.y_true == curve.label, curve.scores))
        assert curve.auc.low < curve.auc.value < curve.auc.high


def test_the_sensitivities_are_those_of_scikit_learns_curve():
    scored = draw(2)
    weights = next(patient_weights(scored.patients, 3))
    for weight, found in zip(weights, sensitivities(scored, weights), strict=True):
        false_positive_rate, sensitivity, _ = sk.roc_curve(scored.y_true, scored.y_prob[:, 1], sample_weight=weight)
        inner = np.interp(FALSE_POSITIVE_RATES + 1e-9, false_positive_rate, sensitivity)
        assert found[:-1] == pytest.approx(inner[:-1], abs=1e-6)


def test_the_band_holds_the_curve():
    scored = draw(2, images=200)
    low, high = measure(scored, {}, 100).curves[0].band
    (curve,) = sensitivities(scored, np.ones((1, 200)))
    assert (low <= curve).all() and (curve <= high).all() and (high - low).min() > 0.01


@pytest.mark.parametrize("seed", range(4))
def test_the_edges_of_the_band_never_fall(seed):
    """A sensitivity that holds at a rate of false positives holds at every higher one."""
    band = measure(draw(2, images=80, seed=seed), {}, 100).curves[0].band
    assert (np.diff(band) >= 0).all() and (band[1] - band[0]).max() > 0.1


def test_images_of_a_patient_are_drawn_together():
    patients = draw(2).patients
    weights = np.concatenate(list(patient_weights(patients, 8, seed=3)))
    for patient in range(patients.max() + 1):
        of_patient = weights[:, patients == patient]
        assert (of_patient == of_patient[:, :1]).all()
    drawn = [weights[:, patients == patient][:, 0] for patient in range(patients.max() + 1)]
    assert (np.sum(drawn, axis=0) == patients.max() + 1).all()


def test_the_bins_have_the_intervals_of_their_shares():
    scored = draw(2, images=300, patients=100)
    bins = measure(scored, {}, 10).reliability
    assert sum(of_bin.images for of_bin in bins) == 300
    assert all(
        of_bin.share.low < of_bin.share.value < of_bin.share.high or of_bin.share.value in (0, 1) for of_bin in bins
    )


def test_624_images_take_seconds():
    scored = draw(2, images=624, patients=400)
    y_pred = scored.y_prob.argmax(axis=1)
    started = time.perf_counter()
    measure(scored, {"0.5": y_pred, "chosen": y_pred})
    assert time.perf_counter() - started < 5
