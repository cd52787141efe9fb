"""Metrics by group: each is that of the group alone, small groups have none, and the gap's interval holds the truth."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from xray_fastai.metrics.comparison import Called
from xray_fastai.metrics.groups import UNKNOWN, by_group, in_bands
from xray_fastai.metrics.scored import Scored

CLASSES = ["NORMAL", "PNEUMONIA"]


def drawn(seed, effects, patients=160, shared=False):
    """Images of two groups, whose scores separate the classes by `effects`.

    Args:
        seed: of the random numbers.
        effects: the distance between the classes' means in each group, in standard deviations.
        patients: how many; each has two images.
        shared: whether each patient has an image in both groups.
    """
    rng = np.random.default_rng(seed)
    of_patient = np.repeat(np.arange(patients), 2)
    group = np.arange(2 * patients) % 2 if shared else (np.arange(patients) // 2 % 2)[of_patient]
    y_true = (np.arange(patients) % 2)[of_patient]
    noise = np.sqrt(0.5) * (rng.normal(size=patients)[of_patient] + rng.normal(size=2 * patients))
    score = norm.cdf(noise + (y_true - 0.5) * np.array(effects)[group])
    called = Called(Scored(y_true, np.stack([1 - score, score], 1), of_patient, 1), (score >= 0.5).astype(int))
    return called, np.array(["AP", "PA"])[group]


def test_each_groups_metrics_are_those_of_its_images_alone():
    called, groups = drawn(0, (1.0, 2.0))
    found = by_group(called, groups, CLASSES)
    assert [row.name for row in found.rows] == ["AP", "PA"]
    for row in found.rows:
        chosen = groups == row.name
        y, p = called.scored.y_true[chosen], called.scored.y_prob[chosen, 1]
        assert (row.images, row.patients, row.too_few) == (chosen.sum(), chosen.sum() // 2, None)
        assert row.counts == [(y == 0).sum(), (y == 1).sum()]
        assert row.metrics["roc_auc"].value == pytest.approx(roc_auc_score(y, p))
        assert row.metrics["sensitivity"].value == pytest.approx((p[y == 1] >= 0.5).mean())
        assert row.metrics["specificity"].value == pytest.approx((p[y == 0] < 0.5).mean())
    auc = found.gaps[0]
    values = {row.name: row.metrics["roc_auc"].value for row in found.rows}
    assert (auc.metric, auc.best, auc.worst, auc.groups) == ("roc_auc", "PA", "AP", 2)
    assert auc.difference == pytest.approx(values["PA"] - values["AP"])
    assert auc.low < auc.difference < auc.high


@pytest.mark.parametrize("shared", [False, True])
def test_the_gaps_interval_holds_the_truth_and_no_more(shared):
    """Of 60 draws 95 % hold it: fewer than 50 would be a chance of 1 in 5,000 (binomial)."""
    truth = np.subtract(*norm.cdf(np.array([2.0, 1.0]) / np.sqrt(2)))
    gaps = [by_group(*drawn(seed, (1.0, 2.0), shared=shared), CLASSES).gaps[0] for seed in range(60)]
    signs = [1 if gap.best == "PA" else -1 for gap in gaps]
    held = sum(gap.low <= sign * truth <= gap.high for gap, sign in zip(gaps, signs, strict=True))
    assert held >= 50


def test_a_patient_in_both_groups_makes_the_gap_more_certain():
    """Half of the noise is the patient's own, so it cancels between two images of a patient."""
    called, groups = drawn(1, (1.0, 2.0), shared=True)
    alone = called.scored.patients * 2 + (groups == "PA")  # as if each image were of another patient
    apart = Called(Scored(called.scored.y_true, called.scored.y_prob, alone, 1), called.y_pred)
    shared, unshared = (by_group(one, groups, CLASSES).gaps[0] for one in (called, apart))
    assert shared.difference == unshared.difference
    assert shared.high - shared.low < 0.9 * (unshared.high - unshared.low)


def test_gaps_of_more_groups_allow_for_all_pairs():
    called, groups = drawn(2, (1.0, 2.0), patients=320)
    two = by_group(called, groups, CLASSES).gaps[0]
    halves = np.char.add(groups, np.where(called.scored.patients % 8 < 4, "", "2"))
    four = by_group(called, halves, CLASSES)
    assert four.gaps[0].groups == 4
    best, worst = ({row.name: row.metrics["roc_auc"].value for row in four.rows}[n] for n in four.gaps[0][1:3])
    assert best - worst == pytest.approx(four.gaps[0].difference) and four.gaps[0].difference >= two.difference
    only = np.isin(halves, four.gaps[0][1:3])
    part = Called(
        Scored(called.scored.y_true[only], called.scored.y_prob[only], called.scored.patients[only], 1),
        called.y_pred[only],
    )
    of_pair = by_group(part, halves[only], CLASSES).gaps[0]
    assert of_pair.high - of_pair.low < four.gaps[0].high - four.gaps[0].low


def test_groups_that_are_alike_have_a_gap_of_zero_between_two():
    y_true = np.tile(np.repeat([1, 0], 20), 2)
    called = Called(Scored(y_true, np.eye(2)[y_true], np.arange(80), 1), y_true)
    for gap in by_group(called, np.repeat(["F", "M"], 40), CLASSES).gaps:
        assert (gap.best, gap.worst, gap.difference) == ("M", "F", 0) and gap.low < 0 < gap.high


def test_a_small_group_says_what_it_lacks():
    called, groups = drawn(3, (1.0, 2.0))
    groups = groups.astype(object)
    groups[called.scored.patients < 12] = "portable"  # 6 patients of each class
    few_normal = (groups == "PA") & (called.scored.y_true == 0) & (called.scored.patients > 30)
    groups[few_normal] = "AP"
    rows = {row.name: row for row in by_group(called, groups, CLASSES).rows}
    assert rows["portable"].too_few == "6 patients with NORMAL and 6 patients with PNEUMONIA; 10 are needed"
    assert all(np.isnan(metric.value) for metric in rows["portable"].metrics.values())
    assert rows["PA"].too_few.endswith("patients with NORMAL; 10 are needed")
    assert np.isnan([rows["PA"].metrics[name].value for name in ("roc_auc", "specificity")]).all()
    assert rows["PA"].metrics["sensitivity"].low > 0 and rows["AP"].too_few is None
    gaps = {gap.metric: gap.groups for gap in by_group(called, groups, CLASSES).gaps}
    assert gaps == {"sensitivity": 2}


def test_more_than_two_classes_need_patients_of_each():
    rng = np.random.default_rng(0)
    y_true = np.arange(120) % 3
    y_prob = rng.dirichlet(np.ones(3), 120) + np.eye(3)[y_true]
    called = Called(Scored(y_true, y_prob / 2, np.arange(120), None), y_prob.argmax(1))
    groups = np.where(np.arange(120) < 60, "a", "b")
    found = by_group(called, groups, ["A", "B", "C"])
    assert [row.too_few for row in found.rows] == [None, None] and len(found.gaps) == 3
    groups[(y_true == 2) & (np.arange(120) > 20)] = "a"
    assert by_group(called, groups, ["A", "B", "C"]).rows[1].too_few == "0 patients with C; 10 are needed"


def test_other_numbers_are_cut_at_their_quartiles_and_few_values_are_names():
    groups, words = in_bands("weight", pd.Series([*range(100), None]))
    assert groups.value_counts().to_dict() == {
        "0 to 24.75": 25, "24.75 to 49.5": 25, "49.5 to 74.25": 25, "74.25 to 99": 25, UNKNOWN: 1
    }  # fmt: skip
    assert "quartiles" in words
    groups, words = in_bands("machine", pd.Series([1, 2, 2, 1]))
    assert (groups.tolist(), words) == (["1", "2", "2", "1"], None)


def test_ages_have_the_usual_bands_in_their_order_and_other_names_none():
    for name in ("age", "Patient Age", "PatientAge", "age_years"):
        groups, words = in_bands(name, pd.Series([0, 17.9, 18, 40, "003M", "099Y", "80"]))
        assert groups.tolist() == ["0-17", "0-17", "18-39", "40-59", "0-17", "80+", "80+"] and words
    for name in ("percentage", "Agent", "image", "stage"):
        assert "quartiles" in in_bands(name, pd.Series(range(7)))[1]
    assert in_bands("age", pd.Series(["young", "old"]))[1] is None


def test_of_many_names_the_most_frequent_stay():
    values = [f"clinic {i:02d}" for i in range(20) for _ in range(40 - i)] + ["", None]
    groups, _ = in_bands("clinic", pd.Series(values))
    counts = groups.value_counts()
    assert len(counts) == 13 and counts["9 others"] == sum(40 - i for i in range(11, 20)) and counts[UNKNOWN] == 2
    assert list(groups.cat.categories[-2:]) == ["9 others", UNKNOWN]
