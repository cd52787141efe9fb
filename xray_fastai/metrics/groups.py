"""Metrics by group of images (sex, age, view, machine), with intervals by patient, and the gap between best and worst.

The gap's interval combines those of both groups (Zou & Donner, `comparison.limits_of_difference`). Where a patient has
images in both, as with views, the two depend on each other, and the correlation between the patients' influences
accounts for it. The best and the worst of several groups differ by chance alone; so each interval of a gap has a level
at which those of all pairs of groups hold with 95 % (Bonferroni).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

from xray_fastai.metrics.comparison import Called, influence_of, limits_of_difference
from xray_fastai.metrics.intervals import Interval, interval_of
from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import METRICS
from xray_fastai.system.text import count_of

NAMES = ("roc_auc", "sensitivity", "specificity")
"""The metrics: each compares groups whose share of the class to detect differs."""
MIN_PATIENTS = 10
"""Patients of each class that a metric counts, for a figure to mean something."""
MAX_GROUPS = 12
MAX_CATEGORIES = 6
"""Numbers of at most so many different values are names of groups."""
AGES = (0, 18, 40, 60, 80)
"""Where the bands of ages begin."""
UNKNOWN = "unknown"

_AGE = re.compile(r"(?<![A-Za-z])(?:[Aa]ge|AGE)(?![a-z])|(?<=[a-z])Age(?![a-z])")
_DICOM_AGE = re.compile(r"(\d{3})([DWMY])")  # PS3.5, value representation AS
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}


class GroupRow(NamedTuple):
    """The images of a group, and the metrics that they are enough for."""

    name: str
    images: int
    patients: int
    counts: list[int]  # images of each class
    metrics: dict[str, Interval]  # NaN where the group is too small
    too_few: str | None  # why a metric is missing


class Gap(NamedTuple):
    """The largest difference of a metric between two groups."""

    metric: str
    best: str
    worst: str
    difference: float
    low: float
    high: float
    groups: int  # that have the metric


@dataclass(frozen=True)
class ByGroup:
    """All groups of a column, in its order, and the gap of each metric that two groups or more have."""

    rows: list[GroupRow]
    gaps: list[Gap]


def by_group(called: Called, groups: Sequence[str], classes: Sequence[str]) -> ByGroup:
    """Compute the metrics of each group, and the gap between the best and the worst.

    Args:
        called: the predictions of N images.
        groups: (N,), the group of each; a categorical column gives the order, else they are sorted.
        classes: the names of the classes.

    Examples:
        Of women 90 % are found, of men 70 %.

        >>> y_true = np.tile(np.repeat([1, 0], 50), 2)
        >>> y_pred = y_true * (np.arange(200) % 10 >= np.repeat([1, 3], 100))
        >>> called = Called(Scored(y_true, np.eye(2)[y_pred], np.arange(200), positive=1), y_pred)
        >>> found = by_group(called, ["F"] * 100 + ["M"] * 100, ["NORMAL", "PNEUMONIA"])
        >>> [(row.name, row.images, round(row.metrics["sensitivity"].value, 2)) for row in found.rows]
        [('F', 100, 0.9), ('M', 100, 0.7)]
        >>> gap = found.gaps[1]
        >>> f"{gap.metric}, {gap.best} less {gap.worst}: {gap.difference:.2f} ({gap.low:.2f} to {gap.high:.2f})"
        'sensitivity, F less M: 0.20 (0.04 to 0.35)'
    """
    column = pd.Series(groups).reset_index(drop=True)
    order = [str(name) for name in (column.cat.categories if column.dtype == "category" else sorted(set(column)))]
    members = {name: (column.astype(str) == name).to_numpy() for name in order}
    members = {name: chosen for name, chosen in members.items() if chosen.any()}
    parts = {name: _part(called, chosen) for name, chosen in members.items()}
    rows = [_row(name, part, classes) for name, part in parts.items()]
    gaps = [_gap(metric, called.scored.patients, members, parts) for metric in NAMES]
    return ByGroup(rows, [gap for gap in gaps if gap is not None])


def in_bands(name: str, values: pd.Series) -> tuple[pd.Series, str | None]:
    """Return the groups that a column's values make, and in words how numbers were cut, or None.

    Ages get the usual bands; a DICOM age such as 045Y is read. Other numbers are cut at their quartiles, unless they
    have few values. Of many texts the `MAX_GROUPS` most frequent stay. A missing value is `UNKNOWN`.

    Args:
        name: the column's.
        values: (N,), as they stand in the table.

    >>> groups, words = in_bands("age", pd.Series(["7", "045Y", 81, None, 18, 59, 60, 3]))
    >>> groups.tolist()
    ['0-17', '40-59', '80+', 'unknown', '18-39', '40-59', '60-79', '0-17']
    >>> words
    'years, in the bands 0-17, 18-39, 40-59, 60-79, 80+'
    """
    texts = values.astype("string").str.strip().replace("", pd.NA).reset_index(drop=True)
    of_age = _AGE.search(name) is not None
    numbers = pd.to_numeric(texts.map(_years, na_action="ignore") if of_age else texts, errors="coerce").astype(float)
    known = texts.notna()
    if not known.any() or numbers[known].isna().any() or (not of_age and numbers.nunique() <= MAX_CATEGORIES):
        return _largest(texts), None
    if of_age:
        names = [f"{low}-{high - 1}" for low, high in pairwise(AGES)] + [f"{AGES[-1]}+"]
        cut = pd.cut(numbers, [*AGES, np.inf], right=False, labels=names)
        words = f"years, in the bands {', '.join(names)}"
    else:
        edges = np.unique(numbers[known].quantile([0, 0.25, 0.5, 0.75, 1]))
        names = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
        cut = pd.cut(numbers, edges, labels=names, include_lowest=True)
        words = "numbers, cut at their quartiles; a limit belongs to the lower group"
    cut = cut.cat.add_categories([UNKNOWN]).fillna(UNKNOWN)
    return cut, words


def _years(text: str) -> str | float:
    """Return a DICOM age in years, and other texts as they are."""
    match = _DICOM_AGE.fullmatch(text)
    return text if match is None else int(match[1]) * _YEARS[match[2]]


def _largest(texts: pd.Series) -> pd.Series:
    """Return the `MAX_GROUPS` most frequent texts, sorted, and what the others are joined to."""
    counts = texts.value_counts()
    others = [] if len(counts) <= MAX_GROUPS else list(counts.index[MAX_GROUPS - 1 :])
    joined = f"{len(others)} others"
    groups = texts.where(~texts.isin(others), joined).fillna(UNKNOWN)
    order = sorted(set(counts.index) - set(others)) + [joined] * bool(others) + [UNKNOWN] * bool(texts.isna().any())
    return groups.astype(pd.CategoricalDtype(list(dict.fromkeys(order))))


def _part(called: Called, chosen: np.ndarray) -> Called:
    """Return the predictions of some images, whose patients are numbered from 0 on."""
    scored = called.scored
    patients = pd.factorize(scored.patients[chosen])[0]
    part = Scored(scored.y_true[chosen], scored.y_prob[chosen], patients, scored.positive)
    return Called(part, called.y_pred[chosen])


def _needed(metric: str, scored: Scored) -> list[int]:
    """Return the classes that a metric counts."""
    if scored.positive is None or metric == "roc_auc":
        return list(range(scored.classes))
    return [k for k in range(scored.classes) if (k == scored.positive) == (metric == "sensitivity")]


def _patients_of(scored: Scored) -> list[int]:
    return [np.unique(scored.patients[scored.y_true == k]).size for k in range(scored.classes)]


def _is_enough(metric: str, part: Called) -> bool:
    patients = _patients_of(part.scored)
    return all(patients[k] >= MIN_PATIENTS for k in _needed(metric, part.scored))


def _row(name: str, part: Called, classes: Sequence[str]) -> GroupRow:
    scored, patients = part.scored, _patients_of(part.scored)
    metrics = {
        metric: interval_of(metric, scored, y_pred=part.y_pred) if _is_enough(metric, part) else Interval(*[np.nan] * 3)
        for metric in NAMES
    }
    few = [f"{count_of(n, 'patient')} with {classes[k]}" for k, n in enumerate(patients) if n < MIN_PATIENTS]
    why = f"{' and '.join(few)}; {MIN_PATIENTS} are needed" if few else None
    counts = [int((scored.y_true == k).sum()) for k in range(scored.classes)]
    return GroupRow(name, len(scored.y_true), int(scored.patients.max()) + 1, counts, metrics, why)


def _gap(metric: str, patients: np.ndarray, members: dict[str, np.ndarray], parts: dict[str, Called]) -> Gap | None:
    """Return the gap of a metric; None where fewer than two groups have it, `UNKNOWN` left out."""
    enough = {name: part for name, part in parts.items() if name != UNKNOWN and _is_enough(metric, part)}
    if len(enough) < 2:
        return None
    values = {name: float(METRICS[metric].value(*part)) for name, part in enough.items()}
    worst, *_, best = sorted(values, key=values.__getitem__)
    level = 1 - 0.05 / (len(enough) * (len(enough) - 1) / 2)
    intervals = [interval_of(metric, enough[name].scored, level, enough[name].y_pred) for name in (worst, best)]
    sums = [
        np.bincount(patients[members[name]], influence_of(METRICS[metric].spread(*enough[name])), patients.max() + 1)
        for name in (worst, best)
    ]
    limits = limits_of_difference(*intervals, *sums)
    return Gap(metric, best, worst, values[best] - values[worst], *limits, len(enough))
