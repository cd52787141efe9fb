"""Measures what `fit --weights EXPORT` gives a second hospital that has few images.

    XRAY_DATA=chest_xray python -m tests.benchmarks.second_hospital

A group of images that differ from the rest is taken out of train/, with all images of their patients: the second
hospital (`tests.benchmarks.shift`). The rest is the first hospital, which trains a model from scratch. The second
hospital sets TEST images of patients of its own aside. Of its others it has the first 50, 200 or 1,000, a fifth of them
for validation, and trains on them from scratch, and from the first hospital's export. SEEDS are of the fit and of the
choice of these images. HOSPITALS names the groups:

    source           studies named IM- and pneumonia by a virus; the first hospital has NORMAL2-IM- and bacteria
    least typical    the 40 % of each class whose brightness, contrast and sharpness are most like the other class

A row is printed as soon as it is measured. After MINUTES of CPU time no further fit begins.
"""

import contextlib
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from tests.benchmarks.measuring import whole_number
from tests.benchmarks.shift import link, measure
from xray_fastai import fit
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.data.labelled import Request, labelled_images
from xray_fastai.evaluation.subgroups import appearance, unusual
from xray_fastai.inference.model import Model, open_model

# -----------------------------------------------------------------------------
HOSPITALS = os.environ.get("HOSPITALS", "source,least typical").split(",")
SEEDS = range(whole_number("SEEDS", 2))
MINUTES = whole_number("MINUTES", 35)  # of CPU time
TEST = whole_number("TEST", 600)  # the second hospital's images to test on
EPOCHS = {50: 40, 200: 25, 1000: 8}  # of each phase, by images: fewer images make fewer steps an epoch
FIRST = {"weights": "none", "epochs": whole_number("EPOCHS", 6), "batch_size": 32}
SECOND = {"batch_size": 16, "patience": 10, "valid": "0.2"}
COMMON = {"arch": os.environ.get("ARCH", "resnet18"), "size": whole_number("SIZE", 64, 32), "device": "cpu"}
SHARE = 0.4  # of each class in "least typical"
# -----------------------------------------------------------------------------


def second_hospital(name: str, table: pd.DataFrame) -> np.ndarray:
    """Return which images belong to the second hospital, boolean (N,)."""
    if name == "source":
        return table.file.map(lambda file: re.match(r"IM-|person\d+_virus", Path(file).name) is not None).to_numpy()
    positives = (table.label == "PNEUMONIA").to_numpy()
    return unusual(appearance(list(table.path)), positives, table.patient.to_numpy(), SHARE)[name]


def by_patient(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return the rows patient by patient, the patients in random order."""
    patients = np.random.default_rng(seed).permutation(sorted(table.patient.unique()))
    return table.set_index("patient", drop=False).loc[patients].reset_index(drop=True)


def trained(folder: Path, rows: pd.DataFrame, name: str, **settings) -> Path:
    """Fit on these images without printing, and return the export."""
    link(folder / name, rows, np.zeros(len(rows), bool))
    with contextlib.redirect_stdout(io.StringIO()):
        return fit(folder / name, **COMMON, **settings, name=name.replace(" ", "-"), exports=folder / "exports").path


def measured(model: Model, test: pd.DataFrame, first: pd.DataFrame) -> dict[str, float]:
    """Return AUC and balanced accuracy on the second hospital's test images, and AUC on images of the first."""
    at = {
        name: measure(model, list(rows.path), rows.label.eq(model.positive).to_numpy())
        for name, rows in (("second", test), ("first", first))
    }
    return {"AUC": at["second"]["AUC"], "balanced": at["second"]["balanced"], "first AUC": at["first"]["AUC"]}


def results(folder: Path, table: pd.DataFrame, name: str) -> Iterator[dict]:
    """Train and measure with one second hospital."""
    second = table[second_hospital(name, table)]
    first = table[~table.patient.isin(second.patient)]
    shuffled = by_patient(second, 0)
    is_test = shuffled.patient.isin(shuffled.patient[:TEST])
    test, pool = shuffled[is_test], shuffled[~is_test]
    print(f"{name}: {len(first):,} images; second: {len(test):,} to test on, {len(pool):,} others", flush=True)
    parent = trained(folder, first, f"first {name}", seed=0, **FIRST)
    model = open_model(parent, "cpu", "fp32")
    validated = labelled_images(model.settings, Request(None, "valid")).table
    yield {"images": 0, "start": "as it is"} | measured(model, test, validated)
    for seed in SEEDS:
        for images, epochs in EPOCHS.items():
            for start, weights in (("scratch", "none"), ("export", parent)):
                if time.process_time() > 60 * MINUTES:
                    return
                began, run = time.process_time(), f"{name} {seed} {images} {start}"
                rows = by_patient(pool, seed).head(images)
                export = trained(folder, rows, run, weights=weights, epochs=epochs, seed=seed, **SECOND)
                model = open_model(export, "cpu", "fp32")
                minutes = (time.process_time() - began) / 60
                yield {"images": images, "start": start, "seed": seed} | measured(model, test, validated) | {
                    "minutes": minutes, "best": "{phase} {epoch}".format_map(model.settings["best"])
                }  # fmt: skip
                shutil.rmtree(export)


def main() -> None:
    table = read_split(find_root(os.environ["XRAY_DATA"]), "train")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in HOSPITALS:
            for row in results(Path(folder), table, name):
                rows.append({"hospital": name} | row)
                print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
                print(end="", flush=True)
    columns = ["AUC", "balanced", "first AUC"]
    means = pd.DataFrame(rows).groupby(["hospital", "images", "start"], sort=False)[columns].agg(["mean", "min", "max"])
    print(means.to_string(float_format="{:.3f}".format))
    print(f"{time.process_time() / 60:.1f} minutes of CPU time")


if __name__ == "__main__":
    main()
