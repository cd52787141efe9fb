"""Measures what several looks at the same images do where there is nothing to find.

    python -m tests.benchmarks.looks

The errors of a patient depend on each other. Sizes and shapes differ by patient and class, but have nothing to do with
the errors. Printed is the share of runs with a false hint of each kind, and by how much the worst group's AUC and its
expected value miss the truth, which is the AUC of all images.
"""

import numpy as np
import pandas as pd

from tests.benchmarks.coverage import draw
from xray_fastai.evaluation.error_patterns import suspicious_causes
from xray_fastai.evaluation.subgroups import worst_group

# -----------------------------------------------------------------------------
RUNS, PATIENTS = 200, 300
KINDS = {"Patient": "patient", "Of ": "shape", "differs": "cause"}
# -----------------------------------------------------------------------------


def main() -> None:
    rng, hints, worst = np.random.default_rng(0), [], []
    for _ in range(RUNS):
        for clustered in (False, True):
            scored = draw(PATIENTS, 0.9, rng)
            patients = scored.patients if clustered else np.arange(len(scored.y_true))
            of_patient = rng.normal(size=(patients.max() + 1, 2))[scored.patients]
            wrong = (scored.y_prob[:, 1] >= 0.5) != scored.y_true
            wrong = wrong if clustered else rng.permutation(wrong)
            truth = np.where(scored.y_true, "PNEUMONIA", "NORMAL")
            other = np.where(scored.y_true, "NORMAL", "PNEUMONIA")
            cause = np.where(of_patient[:, 0] > 0, "bacteria", "virus")
            table = pd.DataFrame({
                "path": [f"person{i}_{c}_1.jpeg" for i, c in zip(scored.patients, cause, strict=True)],
                "patient": [f"person{i}" for i in scored.patients], "truth": truth,
                "prediction": np.where(wrong, other, truth),
                "width": 1000 + 100 * of_patient[:, 0], "height": 800 + 80 * of_patient[:, 1],
            })  # fmt: skip
            text = suspicious_causes(table)
            kinds = {k for start, k in KINDS.items() if any(line.startswith(start) for line in text)}
            kinds |= {"cause"} if any("(differs" in line for line in text) else set()
            hints.append({"errors": "by patient" if clustered else "independent", "any": bool(kinds)}
                         | {k: k in kinds for k in KINDS.values()})  # fmt: skip
        looks = pd.DataFrame(rng.normal(size=(len(scored.y_true), 4)),
                             columns=["brightness", "contrast", "sharpness", "aspect"])  # fmt: skip
        group = worst_group(looks, scored.y_true == 1, scored.patients, scored.y_prob[:, 1])
        if group is not None:
            worst.append({"lowest": group.roc_auc - 0.9, "expected": group.expected - 0.9,
                          "holds": group.low <= 0.9 <= group.high, "warned": group.is_worse_than(0.9)})  # fmt: skip
    print(f"{RUNS} runs of {PATIENTS} patients: share with a false hint")
    print(pd.DataFrame(hints).groupby("errors").mean().to_string(float_format="{:.3f}".format))
    print(f"worst group of nine, {len(worst)} runs: mean difference to the truth, interval holds it, warning")
    print(pd.DataFrame(worst).mean().to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
