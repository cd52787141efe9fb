"""Measures recipes of `fit` one after another on one GPU, on X-rays that were held out of train/.

    XRAY_DATA=chest_xray python -m tests.gpu.recipes FOLDER [RECIPE ...]
    XRAY_DATA=chest_xray DEVICE=cpu QUICK=1 python -m tests.gpu.recipes FOLDER    # tiny, to try it without a GPU

The groups that are held out are those of `tests.benchmarks.elsewhere`: "least typical", "thumbnail", and an eighth of
the other patients. `fit` keeps the decoded images on the card (`xray_fastai.model.decoded`): 263 MB for all at 224 px.
Each recipe is fitted with seed 0, then each with seed 1, and so on, so that a run that ends early compares equals. It
ends before a fit that would not fit into MINUTES, by the time that the recipe took with an earlier seed. FOLDER keeps
a line for each fit (fits.jsonl) and all exports. What is there is not fitted again, so several short runs add up.

The table has, for each recipe and group, means over the seeds: ROC AUC, balanced accuracy and accuracy at the export's
threshold, and balanced accuracy after `recalibrate` with 50 random images of the group (5 draws), measured on
the others' patients.
"""

import os
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.benchmarks.elsewhere import draws, groups_of, measured, outputs
from tests.benchmarks.measuring import Runs, chosen, whole_number
from tests.benchmarks.shift import link
from xray_fastai import fit
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.inference.model import open_model
from xray_fastai.inference.scaling import Scaling
from xray_fastai.training.calibration import Calibration
from xray_fastai.training.local_fit import Rule, fit_locally

# -----------------------------------------------------------------------------
RECIPES: dict[str, dict[str, Any]] = {  # settings of a fit that differ from COMMON
    "default": {},
    "members 3": {"members": 3},
    "160 px": {"size": 160},
    "resnet18": {"arch": "resnet18"},
    "dropout 0.2": {"dropout": 0.2},
    "batch 160, twice the rate": {"batch_size": 160, "lr": 4e-3},
    "half the rate": {"lr": 1e-3},
    "48 epochs": {"epochs": 48},
    "densenet121": {"arch": "densenet121"},
    "members 5": {"members": 5},
}
QUICK = os.environ.get("QUICK") == "1"
DEVICE = os.environ.get("DEVICE", "cuda")
SEEDS = range(whole_number("SEEDS", 3))
MINUTES = whole_number("MINUTES", 9)
COMMON = {"weights": "none", "epochs": 24, "device": DEVICE, "quiet": True}
TINY = {"arch": "resnet18", "size": 32, "epochs": 1, "batch_size": 80}  # instead of the recipe's values
LOCAL, DRAWS = 50, 5
# -----------------------------------------------------------------------------


def figures_of(export: Path, groups: dict[str, pd.DataFrame]) -> dict[str, dict[str, float]]:
    """Return the metrics of an export by group."""
    model = open_model(export, DEVICE, "auto")
    own, found = Calibration(Scaling(), model.threshold), {}
    for name, table in groups.items():
        images = outputs(model, table)
        found[name] = {key: measured(images, own)[key] for key in ("roc_auc", "balanced_accuracy", "accuracy")}
        local = [measured(others, fit_locally(part, 1, Rule())) for part, others in islice(draws(images, LOCAL), DRAWS)]
        found[name][f"after {LOCAL}"] = float(np.mean([row["balanced_accuracy"] for row in local]))
    return found


def as_table(rows: Sequence[dict]) -> str:
    """Return means over the seeds, a row for each recipe and a group of columns for each group of images."""
    cells: dict[tuple, dict[tuple, float]] = {}
    for row in rows:
        cell = cells[row["recipe"], row["seed"]] = {("fit", "minutes"): row["seconds"] / 60}
        for group, figures in row["figures"].items():
            cell |= {(group, key): value for key, value in figures.items()}
    table = pd.DataFrame(cells).T.rename_axis(["recipe", "seed"])
    means = table.groupby("recipe", sort=False).mean()
    means["fit", "seeds"] = table.groupby("recipe", sort=False).size()
    return means.T.to_string(float_format="{:.3f}".format)


def main(folder: Path, names: Sequence[str]) -> None:
    started = time.perf_counter()
    names = chosen("recipe", names, RECIPES)
    table = read_split(find_root(os.environ["XRAY_DATA"]), "train")
    folder.mkdir(parents=True, exist_ok=True)
    groups, data, runs = groups_of(folder, table), folder / "data", Runs(folder / "fits.jsonl", "recipe")
    if not data.exists():
        link(data, table, table.file.isin(pd.concat(groups.values()).file).to_numpy())
    took = {row["recipe"]: row["seconds"] for row in runs.rows}
    for seed, recipe in runs.left(names, SEEDS):
        if time.perf_counter() - started + took.get(recipe, 0) > 60 * MINUTES:
            print(f"{recipe}, seed {seed}: no time left; run the command again to go on", flush=True)
            continue
        settings = COMMON | RECIPES[recipe] | (TINY if QUICK else {})
        begun = time.perf_counter()
        name = f"{recipe}-{seed}".replace(" ", "-").replace(",", "")
        export = fit(data, **settings, seed=seed, exports=folder / "exports", name=name).path
        seconds = took[recipe] = time.perf_counter() - begun
        runs.add({"recipe": recipe, "seed": seed, "seconds": seconds, "figures": figures_of(export, groups)})
        print(f"{recipe}, seed {seed}: {seconds:.0f} s", flush=True)
    print(as_table(runs.rows))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
