"""Measures how often the 95 % intervals of paired differences hold the truth, on patients drawn as in `coverage`.

    python -m tests.benchmarks.paired [PATIENTS ...]

The second model's scores of an image share `ALIKE` of their variance within a class with the first model's. The truth
is that of very many patients. For each metric: coverage, the share of intervals above and below the truth, the mean
width, and how often there is none. Then how often each test finds a difference (p < 0.05) between equally good models.
"""

import sys
import warnings

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import norm

from tests.benchmarks.coverage import IMAGES, PREVALENCE, SHARED, STEEPNESS, decide, summarize
from xray_fastai.metrics.comparison import Called, compare_metrics
from xray_fastai.metrics.scored import Scored

# -----------------------------------------------------------------------------
PATIENTS = (40, 150, 600)
AUCS = ((0.98, 0.95), (0.90, 0.85))
ALIKE = 0.7
REPLICATIONS, RESAMPLES = 500, 100
TRUTH = 300_000  # patients
TESTED = ("accuracy", "sensitivity", "specificity", "roc_auc")
# -----------------------------------------------------------------------------


def draw(patients: int, aucs: tuple[float, float], rng: np.random.Generator, one_each: bool = False) -> list[Called]:
    """Draw the predictions of two models of the same images."""
    images = np.ones(patients, int) if one_each else rng.choice(list(IMAGES), patients, p=list(IMAGES.values()))
    of_patient, patient = rng.random(patients) < PREVALENCE, np.repeat(np.arange(patients), images)
    y_true = of_patient[patient].astype(int)

    def noise() -> np.ndarray:
        shared, own = rng.normal(0, SHARED**0.5, patients)[patient], rng.normal(0, (1 - SHARED) ** 0.5, len(patient))
        return shared + own

    common, called = noise(), []
    for auc in aucs:
        distance = norm.ppf(auc) * 2**0.5
        score = distance * (y_true - 0.5) + ALIKE**0.5 * common + (1 - ALIKE) ** 0.5 * noise()
        positive = expit(STEEPNESS * distance * score)
        scored = Scored(y_true, np.stack([1 - positive, positive], axis=1), patient, positive=1)
        called.append(Called(scored, decide(scored)))
    return called


def replicate(patients: int, aucs: tuple[float, float], one_each: bool = False) -> pd.DataFrame:
    """Return a row for each metric and test."""
    rng = np.random.default_rng(patients)
    drawn = [compare_metrics(*draw(patients, aucs, rng, one_each), RESAMPLES) for _ in range(REPLICATIONS)]
    rows = {(i, name): found for i, of_test in enumerate(drawn) for name, found in of_test.items()}
    index = pd.MultiIndex.from_tuples(rows, names=["test number", "metric"])
    return pd.DataFrame(list(rows.values()), index, columns=["a", "b", "value", "low", "high", "p", "test"])


def main(sizes: list[int]) -> None:
    warnings.simplefilter("ignore")
    for aucs in AUCS:
        truth = compare_metrics(*draw(TRUTH, aucs, np.random.default_rng(1)), 2)
        for patients in sizes:
            table = replicate(patients, aucs)
            rows = {name: summarize(table.xs(name, level="metric"), true.difference) for name, true in truth.items()}
            print(f"\nAUC {aucs[0]} and {aucs[1]}, {patients} patients, {REPLICATIONS:,} tests")
            print(pd.DataFrame(rows).T.to_string(float_format="{:.3f}".format), flush=True)
    for patients in sizes:
        for one_each in (True, False):
            table = replicate(patients, (0.9, 0.9), one_each).query("test != ''")
            found = (table.p < 0.05).groupby([table.index.get_level_values("metric"), table.test]).mean()
            print(f"\nboth with AUC 0.9, {patients} patients: share with p < 0.05\n{found.to_string()}", flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or list(PATIENTS))
