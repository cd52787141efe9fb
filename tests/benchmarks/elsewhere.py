"""Measures what a model's figures on validation are worth elsewhere, and what `recalibrate` wins with a few labels.

    XRAY_DATA=chest_xray python -m tests.benchmarks.elsewhere FOLDER

Groups of images that differ from the rest are taken out of train/, with all images of their patients: HOLDOUTS, as
`tests.benchmarks.shift` has them, and an eighth of the other patients at random. `fit` trains on the rest, from
scratch. FOLDER keeps the groups (held.csv) and the export; what is there is not made again.

Of a group, 20, 50 or 100 random images are the local ones with labels, DRAWS times. All is measured on the images of
the other patients. SPREADS are penalties of the fit (`training.local_fit.SPREAD`): a small one stays near the
export's probabilities. `intercept` leaves the slope as it is.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from tests.benchmarks.measuring import whole_number
from tests.benchmarks.shift import HOLDOUTS, held_out, link
from xray_fastai import fit
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.data.labelled import Request, labelled_images
from xray_fastai.evaluation.subgroups import appearance
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.scaling import Scaling
from xray_fastai.inference.stream import predict_all
from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import METRICS
from xray_fastai.training.calibration import Calibration, Validated
from xray_fastai.training.local_fit import Rule, fit_locally

# -----------------------------------------------------------------------------
COMMON = {
    "arch": os.environ.get("ARCH", "resnet18"),
    "size": whole_number("SIZE", 64, 32),
    "epochs": whole_number("EPOCHS", 10),
    "weights": "none",
    "seed": 0,
    "device": "cpu",
}
IMAGES = [int(number) for number in os.environ.get("IMAGES", "20,50,100").split(",")]
DRAWS = whole_number("DRAWS", 20)
SPREADS = (0.25, 0.5, 1.0, 2.0, 4.0)
SHOWN = (
    "roc_auc", "balanced_accuracy", "sensitivity", "specificity", "accuracy", "nll", "brier_score",
    "calibration_slope", "calibration_intercept",
)  # fmt: skip
# -----------------------------------------------------------------------------


def outputs(model: Model, table: pd.DataFrame) -> Validated:
    """Return images as `fit_locally` takes them; the logits are of the export's probabilities."""
    return Validated(
        logits=model.scaling(predict_all(model, list(table.path))),
        targets=table.label.eq(model.positive).to_numpy().astype(int),
        patients=pd.factorize(table.patient)[0],
        weights=np.ones(2),
        trained=np.ones(2),
    )


def part(images: Validated, chosen: np.ndarray) -> Validated:
    """Return the chosen images, boolean (N,)."""
    return replace(
        images, logits=images.logits[chosen], targets=images.targets[chosen], patients=images.patients[chosen]
    )


def measured(images: Validated, calibration: Calibration) -> dict[str, float]:
    """Return the metrics of images; the positive class is the second."""
    probabilities = calibration.probabilities(images.logits)
    scored = Scored(images.targets, probabilities, images.patients, positive=1)
    called = (probabilities[:, 1] >= calibration.threshold).astype(int)
    return {name: float(METRICS[name].value(scored, called)) for name in SHOWN}


def draws(images: Validated, number: int) -> Iterator[tuple[Validated, Validated]]:
    """Yield local images of both classes, and the images of other patients."""
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        chosen = np.zeros(len(images.targets), bool)
        while len(np.unique(images.targets[chosen])) < 2:
            chosen[:] = False
            chosen[rng.choice(len(chosen), number, replace=False)] = True
        yield part(images, chosen), part(images, ~np.isin(images.patients, images.patients[chosen]))


def recalibrated(images: Validated, own: Calibration) -> Iterator[dict]:
    """Measure each way to recalibrate on each draw."""
    for number in IMAGES:
        for i, (local, others) in enumerate(draws(images, number)):
            ways = {f"spread {spread:g}": fit_locally(local, 1, Rule(), spread, 0) for spread in SPREADS}
            ways["intercept"] = fit_locally(local, 1, Rule(), fewest_for_slope=number + 1)
            for way, calibration in {"as it is": own, **ways}.items():
                yield {"images": number, "draw": i, "way": way} | measured(others, calibration)


def groups_of(folder: Path, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the images of each group by name; FOLDER/held.csv keeps them."""
    file = folder / "held.csv"
    if not file.exists():
        looks = appearance(list(table.path))
        groups = {name: table[held_out(name, table, looks)] for name in HOLDOUTS}
        rest = table[~table.patient.isin(pd.concat(groups.values()).patient)]
        patients = np.random.default_rng(0).permutation(rest.patient.unique())
        groups["random"] = rest[rest.patient.isin(patients[: len(patients) // 8])]
        pd.concat([rows[["file"]].assign(group=name) for name, rows in groups.items()]).to_csv(file, index=False)
    held = pd.read_csv(file)
    return {name: table[table.file.isin(rows.file)] for name, rows in held.groupby("group", sort=False)}


def main(folder: Path) -> None:
    table = read_split(find_root(os.environ["XRAY_DATA"]), "train")
    folder.mkdir(parents=True, exist_ok=True)
    groups = groups_of(folder, table)
    export = folder / "exports" / COMMON["arch"]
    if not export.exists():
        link(folder / "data", table, table.file.isin(pd.concat(groups.values()).file).to_numpy())
        fit(folder / "data", **COMMON, exports=folder / "exports", name=COMMON["arch"])
    model = open_model(export, "cpu", "fp32")
    own = Calibration(Scaling(), model.threshold)
    tables = {"validation": labelled_images(model.settings, Request(None, "valid")).table, **groups}
    images = {name: outputs(model, rows) for name, rows in tables.items()}
    rows = {name: {"images": len(each.targets)} | measured(each, own) for name, each in images.items()}
    print(f"trained on {sum(model.settings['data']['train'].values()):,} images; the export as it is")
    print(pd.DataFrame(rows).T.to_string(float_format="{:.3f}".format), flush=True)
    for name in groups:
        means = (
            pd.DataFrame(recalibrated(images[name], own)).drop(columns="draw").groupby(["images", "way"], sort=False)
        )
        print(f"\n{name}: mean of {DRAWS} draws\n" + means.mean().to_string(float_format="{:.3f}".format))
        deviations = means[["balanced_accuracy", "accuracy", "nll"]].std()
        print("standard deviation over the draws\n" + deviations.to_string(float_format="{:.3f}".format), flush=True)
    print(f"{time.process_time() / 60:.1f} minutes of CPU time")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
