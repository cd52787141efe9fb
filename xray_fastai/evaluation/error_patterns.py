"""Find what misclassified images have in common: a patient, a size, a shape, a cause in the file name.

The results are hints where to look first, not findings: images are counted as if they were independent.
"""

import re

import numpy as np
import pandas as pd
from scipy.stats import binom, fisher_exact

from xray_fastai.data.patients import CAUSE

ALPHA = 0.05

FEATURES = {
    "pixels": ("the smallest third (up to {:.2g} megapixels)", "the largest third (from {:.2g} megapixels)", 1e-6),
    "aspect": ("the narrowest third (width/height up to {:.2f})", "the widest third (width/height from {:.2f})", 1.0),
}


def suspicious_causes(table: pd.DataFrame) -> list[str]:
    """Describe where the errors are.

    Args:
        table: a row for each image: path, patient, truth, prediction, width and height (pixels).

    Returns:
        Lines of text with their counts; at least one.
    """
    wrong = (table.truth != table.prediction).to_numpy()
    if not wrong.any():
        return ["No image is misclassified."]
    counts = [
        (label, int(wrong[table.truth == label].sum()), int((table.truth == label).sum()))
        for label in sorted(set(table.truth))
    ]
    lines = ["By class: " + ", ".join(f"{label} {bad} of {n} wrong" for label, bad, n in counts) + "."]
    patterns = [*_by_patient(table, wrong), *_by_shape(table, wrong)]
    if not patterns:
        few = " There are too few errors to tell." if wrong.sum() < 5 else ""
        patterns = [f"No patient, image size or aspect ratio stands out among the errors.{few}"]
    return [*lines, *_by_cause(table, wrong), *patterns]


def _by_patient(table: pd.DataFrame, wrong: np.ndarray, max_lines: int = 3) -> list[str]:
    """Describe patients with more errors than chance explains.

    They have two or more images, at least half of them misclassified, and at the overall error rate the binomial
    probability of as many errors or more is below 0.05.
    """
    by = pd.Series(wrong).groupby(table.patient.to_numpy()).agg(bad="sum", n="size")
    chance = binom.sf(by.bad - 1, by.n, wrong.mean())
    several = (by.n >= 2) & (by.bad >= 2) & (2 * by.bad >= by.n)
    patients = by[several & (chance < ALPHA)]
    patients = patients.sort_values(["bad", "n"], ascending=[False, True], kind="stable")
    lines = [
        f"Patient {row.Index}: {row.bad} of {row.n} images wrong." for row in patients.head(max_lines).itertuples()
    ]
    if rest := patients.bad.iloc[max_lines:].tolist():
        lines.append(f"And {len(rest)} more such patient{'s' * (len(rest) > 1)}, with {sum(rest)} wrong images.")
    return lines


def _by_cause(table: pd.DataFrame, wrong: np.ndarray) -> list[str]:
    """Count errors by the cause in the file names; no line where the names hold none."""
    matches = table.path.map(lambda path: CAUSE.search(re.split(r"[/\\]", path)[-1]))
    causes = matches.map(lambda match: match.group(1).lower() if match else "").to_numpy()
    parts = []
    for cause in ("bacteria", "virus"):
        of_cause = causes == cause
        if of_cause.any():
            parts.append((cause, int(wrong[of_cause].sum()), int(of_cause.sum())))
    if not parts:
        return []
    line = "By the cause in the name: " + ", ".join(f"{cause} {bad} of {n} wrong" for cause, bad, n in parts)
    if len(parts) == 2:
        p = _fisher(*parts[0][1:], *parts[1][1:], "two-sided")
        line += f" ({'differs, ' if p < ALPHA else ''}Fisher's exact test p = {p:.2g})"
    return [line + "."]


def _by_shape(table: pd.DataFrame, wrong: np.ndarray) -> list[str]:
    """Describe the thirds by size and by aspect ratio that have more errors than the rest.

    Each class is tested alone: in many collections the classes differ in size, shape and error rate. The test is
    Fisher's exact test, one-sided; p is multiplied by the number of thirds tested (Bonferroni).
    """
    values = {"pixels": table.width * table.height, "aspect": table.width / table.height}
    tests = []
    for label in sorted(table.truth.unique()):
        of_label = (table.truth == label).to_numpy()
        errors = wrong[of_label]
        for feature, of_all in values.items():
            value = of_all[of_label].to_numpy(dtype=float)
            low, high = np.quantile(value, [1 / 3, 2 / 3])
            if low == high:
                continue
            small, large, unit = FEATURES[feature]
            smallest, largest = value <= low, value >= high
            thirds = [
                (smallest, small.format(value[smallest].max() * unit)),
                (largest, large.format(value[largest].min() * unit)),
            ]
            for third, name in thirds:
                bad, n = int(errors[third].sum()), int(third.sum())
                rest, others = int(errors[~third].sum()), int((~third).sum())
                tests.append((_fisher(bad, n, rest, others, "greater"), label, name, bad, n, rest, others))
    return [
        f"Of {label} {name}, {bad} of {n} are misclassified; of the rest {rest} of {others} "
        f"(p = {len(tests) * p:.2g}, corrected for {len(tests)} comparisons)."
        for p, label, name, bad, n, rest, others in sorted(tests)
        if len(tests) * p < ALPHA
    ]


def _fisher(bad: int, n: int, bad_other: int, n_other: int, alternative: str) -> float:
    """Return the p of Fisher's exact test that two groups have the same error rate."""
    return float(fisher_exact([[bad, n - bad], [bad_other, n_other - bad_other]], alternative=alternative)[1])
