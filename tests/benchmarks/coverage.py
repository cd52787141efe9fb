"""Measures how often the 95 % intervals of all metrics hold the truth, on drawn patients with correlated images.

    python -m tests.benchmarks.coverage [PATIENTS ...]

A patient has one class and one to ten images. The scores of a patient's images share a part of their variance. The
probabilities are too extreme, and shifted as by balanced class weights. The truth is that of very many patients.

For each metric: coverage, the share of intervals that lie above the truth, the share below it, the mean width, and the
share of tests in which the metric is undefined or has no interval. `curve` is the interval of the ROC curve at a false
positive rate of 0.05 and 0.2. A line for the calibration error, which has no interval, gives its mean and the truth.
"""

import sys
import warnings

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import norm

from xray_fastai.metrics.intervals import FALSE_POSITIVE_RATES, measure, sensitivities
from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import values

# -----------------------------------------------------------------------------
PATIENTS = (40, 150, 600)
AUC = (0.98, 0.90)
IMAGES = {1: 0.5, 2: 0.2, 3: 0.12, 4: 0.08, 6: 0.06, 10: 0.04}  # share of the patients with so many images
SHARED = 0.6  # of the variance of the scores within a class, between patients
PREVALENCE = 0.6
STEEPNESS = 1.3  # of the logits, relative to calibrated ones
THRESHOLD = 0.5
REPLICATIONS, RESAMPLES = 1000, 200
TRUTH = 300_000  # patients, four times
RATES = (0.05, 0.2)
# -----------------------------------------------------------------------------


def draw(patients: int, auc: float, rng: np.random.Generator) -> Scored:
    """Draw the images of a test whose scores are normal in both classes, `distance` apart."""
    distance = norm.ppf(auc) * 2**0.5
    images = rng.choice(list(IMAGES), patients, p=list(IMAGES.values()))
    of_patient, patient = rng.random(patients) < PREVALENCE, np.repeat(np.arange(patients), images)
    y_true = of_patient[patient].astype(int)
    shared, own = rng.normal(0, SHARED**0.5, patients)[patient], rng.normal(0, (1 - SHARED) ** 0.5, len(patient))
    positive = expit(STEEPNESS * distance * (distance * (y_true - 0.5) + shared + own))
    return Scored(y_true, np.stack([1 - positive, positive], axis=1), patient, positive=1)


def decide(scored: Scored) -> np.ndarray:
    return (scored.y_prob[:, 1] >= THRESHOLD).astype(int)


def truth(auc: float) -> dict[str, float]:
    rng, rows = np.random.default_rng(1), []
    at = np.searchsorted(FALSE_POSITIVE_RATES, RATES)
    for _ in range(4):
        scored = draw(TRUTH, auc, rng)
        curve = sensitivities(scored, np.ones((1, len(scored.y_true))))[0, at]
        of_curve = {f"curve {rate}": value for rate, value in zip(RATES, curve, strict=True)}
        rows.append(values(scored, decide(scored)) | values(scored) | of_curve)
    return pd.DataFrame(rows).mean().to_dict()


def replicate(patients: int, auc: float) -> pd.DataFrame:
    """Return a row for each metric and test: value, low, high."""
    rng, rows = np.random.default_rng(patients), []
    at = np.searchsorted(FALSE_POSITIVE_RATES, RATES)
    while len(rows) < REPLICATIONS:
        scored = draw(patients, auc, rng)
        measured = measure(scored, {"": decide(scored)}, RESAMPLES)
        limits = zip(RATES, *measured.curves[0].band[:, at], strict=True)
        of_curve = {f"curve {rate}": (np.nan, low, high) for rate, low, high in limits}
        rows.append(measured.points[""] | measured.free | of_curve)
    table = pd.DataFrame({(i, name): interval for i, row in enumerate(rows) for name, interval in row.items()}).T
    return table.set_axis(["value", "low", "high"], axis=1).rename_axis(["test", "metric"])


def summarize(table: pd.DataFrame, expected: float) -> pd.Series:
    known = table.dropna(subset=["low", "high"])
    above, below = (known.low > expected).mean(), (known.high < expected).mean()
    width = (known.high - known.low).mean()
    return pd.Series({"coverage": 1 - above - below, "above": above, "below": below, "width": width,
                      "none": 1 - len(known) / len(table), "mean": table.value.mean(), "truth": expected})  # fmt: skip


def main(sizes: list[int]) -> None:
    warnings.simplefilter("ignore")
    for auc in AUC:
        expected = truth(auc)
        for patients in sizes:
            table = replicate(patients, auc)
            rows = {name: summarize(table.xs(name, level="metric"), true) for name, true in expected.items()}
            print(f"\nAUC {auc}, {patients} patients, {REPLICATIONS:,} tests")
            print(pd.DataFrame(rows).T.to_string(float_format="{:.3f}".format), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or list(PATIENTS))
