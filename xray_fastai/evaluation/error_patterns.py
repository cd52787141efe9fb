"""What the wrongly called images have in common: a patient, a size, a shape, a cause in the name.

Hints, not findings: images are counted as if they were independent, and a hint says where to look first.
"""

import re

import numpy as np
import pandas as pd

from xray_fastai.data.patients import CAUSE

ALPHA = 0.05

FEATURES = {
    "pixels": ("the smallest third (up to {:.2g} megapixels)", "the largest third (from {:.2g} megapixels)", 1e-6),
    "aspect": ("the narrowest third (width/height up to {:.2f})", "the widest third (width/height from {:.2f})", 1.0),
}


def suspicious_causes(table: pd.DataFrame) -> list[str]:
    """Say where the errors gather.

    Args:
        table: an image a row: path, patient, truth, prediction, width and height (pixels).

    Returns:
        Lines of text, each with its counts; at least one.
    """
    wrong = (table.truth != table.prediction).to_numpy()
    if not wrong.any():
        return ["No image is called wrongly."]
    counts = [
        (label, int(wrong[table.truth == label].sum()), int((table.truth == label).sum()))
        for label in sorted(set(table.truth))
    ]
    lines = ["By class: " + ", ".join(f"{label} {bad} of {n} wrong" for label, bad, n in counts) + "."]
    gathered = [*_by_patient(table, wrong), *_by_shape(table, wrong)]
    if not gathered:
        few = " With so few errors little could." if wrong.sum() < 5 else ""
        gathered = [f"No patient, image size or aspect ratio stands out among the errors.{few}"]
    return [*lines, *_by_cause(table, wrong), *gathered]


def _by_patient(table: pd.DataFrame, wrong: np.ndarray, most: int = 3) -> list[str]:
    """Patients with two or more images, at least half of them wrong, and more than chance gives at the overall rate.

    Chance is the binomial distribution's: P(as many errors or more) < 0.05.
    """
    from scipy.stats import binom

    by = pd.Series(wrong).groupby(table.patient.to_numpy()).agg(bad="sum", n="size")
    chance = binom.sf(by.bad - 1, by.n, wrong.mean())
    found = by[(by.n >= 2) & (by.bad >= 2) & (2 * by.bad >= by.n) & (chance < ALPHA)]
    found = found.sort_values(["bad", "n"], ascending=[False, True], kind="stable")
    lines = [f"Patient {row.Index}: {row.bad} of {row.n} images wrong." for row in found.head(most).itertuples()]
    if rest := found.bad.iloc[most:].tolist():
        lines.append(f"And {len(rest)} more such patient{'s' * (len(rest) > 1)}, with {sum(rest)} wrong images.")
    return lines


def _by_cause(table: pd.DataFrame, wrong: np.ndarray) -> list[str]:
    """Errors by the cause that a file's name holds; no line where the names hold none."""
    found = table.path.map(lambda path: CAUSE.search(re.split(r"[/\\]", path)[-1]))
    parts = []
    for cause in ("bacteria", "virus"):
        of = found.map(lambda match, cause=cause: bool(match) and match.group(1).lower() == cause).to_numpy(dtype=bool)
        if of.any():
            parts.append((cause, int(wrong[of].sum()), int(of.sum())))
    if not parts:
        return []
    line = "By the cause in the name: " + ", ".join(f"{cause} {bad} of {n} wrong" for cause, bad, n in parts)
    if len(parts) == 2:
        p = _fisher(*parts[0][1:], *parts[1][1:], "two-sided")
        line += f" ({'differs, ' if p < ALPHA else ''}Fisher's exact test p = {p:.2g})"
    return [line + "."]


def _by_shape(table: pd.DataFrame, wrong: np.ndarray) -> list[str]:
    """Thirds by size and by aspect ratio with more errors than the rest.

    Looked at in each class by itself: sizes and shapes differ between the classes of many collections, and so do error
    rates. Fisher's exact test, one-sided; p is multiplied by the number of thirds looked at (Bonferroni).
    """
    values = {"pixels": table.width * table.height, "aspect": table.width / table.height}
    looked, found = 0, []
    for label in sorted(table.truth.unique()):
        of = (table.truth == label).to_numpy()
        for feature, value in values.items():
            value = value[of].to_numpy(dtype=float)
            low, high = np.quantile(value, [1 / 3, 2 / 3])
            if low == high:
                continue
            small, large, unit = FEATURES[feature]
            least, most = value <= low, value >= high
            to, since = small.format(value[least].max() * unit), large.format(value[most].min() * unit)
            for third, name in [(least, to), (most, since)]:
                looked += 1
                bad, rest = int(wrong[of][third].sum()), int(wrong[of][~third].sum())
                p = _fisher(bad, int(third.sum()), rest, int((~third).sum()), "greater")
                found.append((p, label, name, bad, int(third.sum()), rest, int((~third).sum())))
    return [
        f"Of {label} {name}, {bad} of {n} are called wrongly; of the rest {rest} of {others} "
        f"(p = {looked * p:.2g}, corrected for {looked} comparisons)."
        for p, label, name, bad, n, rest, others in sorted(found)
        if looked * p < ALPHA
    ]


def _fisher(bad: int, n: int, bad_other: int, n_other: int, alternative: str) -> float:
    from scipy.stats import fisher_exact

    return float(fisher_exact([[bad, n - bad], [bad_other, n_other - bad_other]], alternative=alternative)[1])
