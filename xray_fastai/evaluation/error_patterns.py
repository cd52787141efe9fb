"""Find what misclassified images have in common: a patient, a size, a shape, a cause in the file name.

The results are hints where to look first, not findings. There are three kinds: patients, shape, cause. Each is
corrected for its number of comparisons (Holm, A simple sequentially rejective multiple test procedure, Scand J Stat
1979) at a third of `ALPHA`. Shape and cause are tested by permutation of whole patients, since images of one patient
are not independent. A patient is tested against a beta-binomial distribution, which knows how errors cluster.
`python -m tests.benchmarks.looks` measures the rates: with independent errors 1.5 % of runs print a hint (200 runs of
300 patients); with clustered errors 5 % print one on the shape, 4 % one on the cause, and none names a patient.
"""

import re

import numpy as np
import pandas as pd
from scipy.stats import betabinom

from xray_fastai.data.patients import CAUSE

ALPHA = 0.05
"""The largest probability of any hint where errors are independent and nothing has an effect."""
KINDS = 3
PERMUTATIONS, SEED = 4999, 0

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

    They have at least half of their images misclassified. All patients with two or more images are tested against a
    beta-binomial distribution with the error rate of the other patients, and with their clustering.
    """
    by = pd.Series(wrong).groupby(table.patient.to_numpy()).agg(bad="sum", n="size")
    p = np.ones(len(by))
    for i in np.flatnonzero((by.n >= 2) & (2 * by.bad >= by.n)):
        p[i] = _beta_binomial_p(*by.iloc[i], np.delete(by.bad.to_numpy(), i), np.delete(by.n.to_numpy(), i))
    of_several = (by.n >= 2).to_numpy()
    by, p = by[of_several], holm(p[of_several])
    patients = by[p < ALPHA / KINDS]
    patients = patients.sort_values(["bad", "n"], ascending=[False, True], kind="stable")
    lines = [
        f"Patient {row.Index}: {row.bad} of {row.n} images wrong." for row in patients.head(max_lines).itertuples()
    ]
    if rest := patients.bad.iloc[max_lines:].tolist():
        lines.append(f"And {len(rest)} more such patient{'s' * (len(rest) > 1)}, with {sum(rest)} wrong images.")
    return lines


def _beta_binomial_p(bad: int, n: int, others_bad: np.ndarray, others_n: np.ndarray) -> float:
    """Return the probability of so many errors in a patient who is like the others.

    The intraclass correlation is the analysis-of-variance estimator for binary data (Ridout, Demetrio & Firth,
    Estimating intraclass correlation for binary data, Biometrics 1999).

    Args:
        bad: the number of misclassified images of the patient.
        n: the number of images of the patient.
        others_bad: (P,), of each other patient the number of misclassified images.
        others_n: (P,), of each other patient the number of images.
    """
    images, patients, errors = others_n.sum(), len(others_n), others_bad.sum()
    rate = (errors + 0.5) / (images + 1)  # 0 would make any error impossible
    correlation = 0.0
    if 0 < errors < images and patients > 1 and images > patients:
        squares = (others_bad**2 / others_n).sum()
        between, within = (squares - errors**2 / images) / (patients - 1), (errors - squares) / (images - patients)
        size = (images - (others_n**2).sum() / images) / (patients - 1)
        correlation = (between - within) / (between + (size - 1) * within)
    strength = 1 / np.clip(correlation, 1e-6, 1 - 1e-6) - 1
    return float(betabinom.sf(bad - 1, n, rate * strength, (1 - rate) * strength))


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
        named = causes != ""
        errors, patients = wrong[named], table.patient.to_numpy()[named]
        sides = np.stack([causes[named] == cause for cause in ("bacteria", "virus")], axis=1)
        p = holm(permutation_p(errors, patients, sides)).min()
        line += f" ({'differs, ' if p < ALPHA / KINDS else ''}p = {p:.2g})"
    return [line + "."]


def _by_shape(table: pd.DataFrame, wrong: np.ndarray) -> list[str]:
    """Describe the thirds by size and by aspect ratio that have more errors than the rest.

    Each class is tested alone: in many collections the classes differ in size, shape and error rate.
    """
    values = {"pixels": table.width * table.height, "aspect": table.width / table.height}
    tests, p = [], []
    for label in sorted(table.truth.unique()):
        of_label = (table.truth == label).to_numpy()
        errors, thirds, names = wrong[of_label], [], []
        for feature, of_all in values.items():
            value = of_all[of_label].to_numpy(dtype=float)
            low, high = np.quantile(value, [1 / 3, 2 / 3])
            if low == high:
                continue
            small, large, unit = FEATURES[feature]
            smallest, largest = value <= low, value >= high
            thirds += [smallest, largest]
            names += [small.format(value[smallest].max() * unit), large.format(value[largest].min() * unit)]
        if thirds:
            p += permutation_p(errors, table.patient.to_numpy()[of_label], np.stack(thirds, axis=1)).tolist()
        tests += [
            (label, name, errors[third].sum(), third.sum(), errors[~third].sum(), (~third).sum())
            for third, name in zip(thirds, names, strict=True)
        ]
    return [
        f"Of {label} {name}, {bad} of {n} are misclassified; of the rest {rest} of {others} "
        f"(p = {corrected:.2g}, corrected for {len(tests)} comparisons)."
        for corrected, (label, name, bad, n, rest, others) in sorted(zip(holm(np.array(p)), tests, strict=True))
        if corrected < ALPHA / KINDS
    ]


def permutation_p(wrong: np.ndarray, patients: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the one-sided p (K,) that groups of images have as many errors as they do by chance.

    The errors of a patient stay together: patients are put in random order, and their errors laid over the images in
    this order.

    Args:
        wrong: (N,), whether an image is misclassified.
        patients: (N,), the patient of each image.
        groups: (N, K), which images are in each group.
    """
    order = np.argsort(patients, kind="stable")
    wrong, groups = wrong[order].astype(float), groups[order].astype(float)
    numbers = np.unique(patients[order], return_inverse=True)[1]
    observed, rng = wrong @ groups, np.random.default_rng(SEED)
    reached = np.zeros(groups.shape[1])
    for _ in range(PERMUTATIONS):
        shuffled = wrong[np.argsort(rng.permutation(numbers.max() + 1)[numbers], kind="stable")]
        reached += shuffled @ groups >= observed
    return (reached + 1) / (PERMUTATIONS + 1)


def holm(p: np.ndarray) -> np.ndarray:
    """Return p-values (K,) corrected for their number by Holm's method.

    >>> holm(np.array([0.01, 0.04, 0.03])).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)))
    return corrected
