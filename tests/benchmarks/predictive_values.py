"""Measures how often the intervals of PPV and NPV at a prevalence hold the truth, on drawn patients.

    python -m tests.benchmarks.predictive_values [PATIENTS ...]

Half of the patients have the class. A patient has one to ten images, whose calls agree beyond chance: each patient has
a sensitivity, or a specificity, of its own, beta-distributed. `mixed` is the share of patients with images of both
classes, as in follow-ups. Of each test: the share of intervals that hold the truth, that lie above it and below it, and
the mean width on the logit (finite ones).
"""

import sys

import numpy as np
from scipy.special import logit

from xray_fastai.metrics.predictive_values import predictive_values
from xray_fastai.metrics.scored import Scored

# -----------------------------------------------------------------------------
PATIENTS = (40, 150, 600)
TESTS = ((0.98, 0.78), (0.90, 0.95), (0.99, 0.99))  # sensitivity, specificity
IMAGES = {1: 0.5, 2: 0.2, 3: 0.12, 4: 0.08, 6: 0.06, 10: 0.04}  # share of the patients with so many images
CORRELATION = 0.2  # of the calls of two images of a patient
MIXED = (0.0, 0.3)
PREVALENCE = 0.03
REPLICATIONS = 2000
# -----------------------------------------------------------------------------


def draw(patients: int, test: tuple[float, float], mixed: float, rng: np.random.Generator) -> Scored:
    """Draw the images of a test; `y_prob` is 0 or 1, as they are called."""
    images = rng.choice(list(IMAGES), patients, p=list(IMAGES.values()))
    patient = np.repeat(np.arange(patients), images)
    of_patient = np.arange(patients) % 2
    other = (rng.random(patients) < mixed)[patient] & (rng.random(len(patient)) < 0.5)
    y_true = np.where(other, 1 - of_patient[patient], of_patient[patient])
    spread = 1 / CORRELATION - 1
    rates = np.stack([rng.beta(spread * rate, spread * (1 - rate), patients) for rate in test])  # (2, patients)
    right = rng.random(len(patient)) < np.where(y_true == 1, rates[0, patient], rates[1, patient])
    called = np.where(right, y_true, 1 - y_true)
    return Scored(y_true, np.stack([1 - called, called], axis=1), patient, positive=1)


def main(sizes: list[int]) -> None:
    columns = "patients sens spec mixed value coverage above below width none"
    print("  ".join(f"{column:>8}" for column in columns.split()))
    for patients in sizes:
        for test in TESTS:
            for mixed in MIXED:
                rng = np.random.default_rng(0)
                sensitivity, specificity = test
                truth = {
                    "ppv": sensitivity * PREVALENCE / (sensitivity * PREVALENCE + (1 - specificity) * (1 - PREVALENCE)),
                    "npv": specificity * (1 - PREVALENCE)
                    / (specificity * (1 - PREVALENCE) + (1 - sensitivity) * PREVALENCE),
                }  # fmt: skip
                drawn = [draw(patients, test, mixed, rng) for _ in range(REPLICATIONS)]
                found = [predictive_values(scored, scored.y_prob[:, 1], PREVALENCE) for scored in drawn]
                for name, true in truth.items():
                    low, high = np.array([[getattr(one, name).low, getattr(one, name).high] for one in found]).T
                    known = ~np.isnan(low)
                    above, below = (low[known] > true).mean(), (high[known] < true).mean()
                    with np.errstate(divide="ignore"):
                        width = logit(high) - logit(low)
                    row = [patients, *test, mixed, name, 1 - above - below, above, below]
                    row += [width[np.isfinite(width)].mean(), 1 - known.mean()]
                    cells = (f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row)
                    print("  ".join(f"{cell:>8}" for cell in cells), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or list(PATIENTS))
