"""Compares rules for the epoch that a fit keeps and for its calibration, on images near to and far from the training.

    XRAY_DATA=chest_xray python -m tests.benchmarks.calibration FOLDER

Groups of images that differ from the rest are held out of train/ (`tests.benchmarks.shift`), and a random part of the
other patients. `fit` trains on a part of the rest. After each epoch the network's outputs on the validation images and
on all held-out images are written into FOLDER, one file a seed; a seed whose file exists is not trained again. The
tables follow from these files:

    epochs         by each of two validation losses, the epoch with the lowest and the one that `fit` keeps (the last
                   within a standard error of the lowest), and how good the kept one is, without calibration. `batches`
                   is the loss before 0.2.0: the batches' weighted means, averaged by images
    calibration    of the kept epoch by each of `fit --calibration`, and others: negative log-likelihood, expected
                   calibration error, Brier score. `equal` is the negative log-likelihood if both classes were equally
                   frequent: another prevalence
    views          the same for `--tta`, calibrated on single views and applied to the mean of five; of the seeds that
                   keep the last epoch
"""

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import Callback
from scipy.special import log_softmax, softmax

from tests.benchmarks.measuring import whole_number
from tests.benchmarks.shift import held_out, link
from xray_fastai import fit
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.data.images import open_image
from xray_fastai.data.sources import phantom
from xray_fastai.evaluation.subgroups import appearance
from xray_fastai.inference.scaling import Scaling
from xray_fastai.inference.tta import mean_over_views
from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import values
from xray_fastai.model.preprocessing import Preprocessing
from xray_fastai.training.calibration import METHODS, Validated, fit_slope_and_intercepts, fit_temperature
from xray_fastai.training.callbacks import standard_error

# -----------------------------------------------------------------------------
HOLDOUTS = os.environ.get("HOLDOUTS", "least typical,thumbnail,sharpest").split(",")
SEEDS = range(whole_number("SEEDS", 3))
POOL = whole_number("POOL", 1900)  # images to train on and to validate on
HELD = whole_number("HELD", 200)  # images of each held-out group; the random part has twice as many
BATCH = 80  # images in a batch of validation: the loss before 0.2.0 depends on it
COMMON = {
    "arch": os.environ.get("ARCH", "resnet18"),
    "size": whole_number("SIZE", 64, 32),
    "epochs": whole_number("EPOCHS", 10),
    "batch_size": 40,
    "valid": "0.2",
    "weights": "none",
}
# -----------------------------------------------------------------------------


class KeepOutputs(Callback):
    "Keeps the network's outputs after each epoch, and the mean over views (`--tta`) after the last."

    def __init__(
        self,
        held: dict[str, pd.DataFrame],  # by name, tables of images
    ):
        self.held = held

    def before_fit(self):
        tables = {"validation": self.dls.valid.items, **self.held}
        self.kept = {"weights": self.learn.loss_func.func.weight.cpu().numpy()}
        self.pixels, self.logits = {}, {name: [] for name in tables}
        for name, table in tables.items():
            pixels = np.stack([np.asarray(open_image(path, COMMON["size"])) for path in table.path])
            self.pixels[name] = torch.from_numpy(pixels)[:, None]  # (N, 1, S, S)
            self.kept[f"{name}/targets"] = (table.label == self.dls.vocab[1]).to_numpy().astype(int)
            self.kept[f"{name}/patients"] = pd.factorize(table.patient)[0]
        self.kept["trained"] = np.bincount([self.dls.vocab.o2i[label] for label in self.dls.train.items.label])
        self.preprocessing = Preprocessing("equalize")

    def forward_images(self, images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(self.preprocessing(images).contiguous(memory_format=torch.channels_last))

    def after_epoch(self):
        self.model.eval()
        for name, pixels in self.pixels.items():
            self.logits[name].append(torch.cat([self.forward_images(part) for part in pixels.split(64)]).numpy())

    def after_fit(self):
        for name, pixels in self.pixels.items():
            views = [mean_over_views(self.forward_images, part) for part in pixels.split(64)]
            self.kept[f"{name}/views"] = torch.cat(views).numpy()
            self.kept[f"{name}/logits"] = np.stack(self.logits[name])  # (epochs, N, 2)


def some(table: pd.DataFrame, count: int, rng: np.random.Generator) -> pd.DataFrame:
    """Return all images of random patients, until there are `count` images."""
    patients = rng.permutation(table.patient.unique())
    sizes = table.patient.value_counts().loc[patients].cumsum()
    return table[table.patient.isin(sizes.index[: np.searchsorted(sizes, count) + 1])]


def train(folder: Path) -> None:
    """Write FOLDER/SEED.npz for each seed that has none."""
    if not (seeds := [seed for seed in SEEDS if not (folder / f"{seed}.npz").exists()]):
        return
    root = find_root(os.environ["XRAY_DATA"]) if "XRAY_DATA" in os.environ else phantom.cached()
    table = read_split(root, "train")
    looks = appearance(list(table.path))
    groups = {name: table[held_out(name, table, looks)] for name in HOLDOUTS}
    rest = table[~table.patient.isin(pd.concat(groups.values()).patient)]
    for seed in seeds:
        rng, start = np.random.default_rng(seed), time.process_time()
        held = {"random": some(rest, 2 * HELD, rng)}
        held |= {name: rows.sample(HELD, random_state=seed) for name, rows in groups.items()}
        pool = some(rest[~rest.patient.isin(held["random"].patient)], POOL, rng)
        outputs = KeepOutputs(held)
        with tempfile.TemporaryDirectory() as exports, contextlib.redirect_stdout(io.StringIO()):
            link(Path(exports) / "data", pool, np.zeros(len(pool), bool))
            fit(**COMMON, data=f"{exports}/data", exports=exports, seed=seed, callbacks=[outputs])
        np.savez(folder / f"{seed}.npz", **outputs.kept)
        counts = ", ".join(f"{name} {len(pixels)}" for name, pixels in outputs.pixels.items())
        print(f"seed {seed}: {counts}; {(time.process_time() - start) / 60:.1f} minutes of CPU time", flush=True)


def validation_losses(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Return the weighted mean over all images (N,), and the mean of the batches' weighted means."""
    each = -log_softmax(logits, axis=1)[np.arange(len(targets)), targets]
    w, starts = weights[targets], range(0, len(targets), BATCH)
    batches = [np.average(each[i : i + BATCH], weights=w[i : i + BATCH]) for i in starts]
    sizes = [len(each[i : i + BATCH]) for i in starts]
    return {"batches": float(np.average(batches, weights=sizes)), "all images": float(np.average(each, weights=w))}


def kept_epoch(losses: list[float], margins: list[float]) -> int:
    """Return the epoch, from 0, that `callbacks.BestWeights` keeps: the last within a margin of the lowest so far."""
    lowest, kept = np.inf, 0
    for epoch, loss in enumerate(losses):
        if loss < lowest:
            lowest, kept, margin = loss, epoch, margins[epoch]
        elif loss <= lowest + margin:
            kept = epoch
    return kept


def measures(logits: np.ndarray, targets: np.ndarray, scaling: Scaling) -> dict[str, float]:
    """Measure the probabilities of outputs (N, 2)."""
    scaled = scaling(logits)
    each = -log_softmax(scaled, axis=1)[np.arange(len(targets)), targets]
    scored = Scored(targets, softmax(scaled, axis=1), np.arange(len(targets)), positive=1)
    figures = values(scored)
    return {
        "NLL": float(each.mean()),
        "equal": float(np.mean([each[targets == k].mean() for k in (0, 1)])),
        "ECE": figures["expected_calibration_error"],
        "Brier": figures["brier_score"],
        "AUC": figures["roc_auc"],
    }


def scalings(images: Validated) -> dict[str, Scaling]:
    """Return each way to calibrate by name."""
    found = {name: method(images)[0] for name, method in METHODS.items()}
    found["best temperature"] = Scaling("cautious", fit_temperature(images.logits, images.targets))
    temperature, intercepts = fit_slope_and_intercepts(images, spread=1e3)
    return found | {"slope, intercept": Scaling("validation", temperature, intercepts.tolist())}


def show(folder: Path) -> None:
    """Print the tables of all seeds in FOLDER."""
    epochs, calibrations, views = [], [], []
    for file in sorted(folder.glob("*.npz")):
        kept = np.load(file)
        names = [key.removesuffix("/logits") for key in kept if key.endswith("/logits")]
        logits, targets = ({n: kept[f"{n}/{what}"] for n in names} for what in ("logits", "targets"))
        valid, truth, weights = logits["validation"], targets["validation"], kept["weights"]
        losses = [validation_losses(outputs, truth, weights) for outputs in valid]
        tensors = [torch.from_numpy(part) for part in (valid, truth, weights)]
        margins = [standard_error(outputs, tensors[1], tensors[2]) for outputs in tensors[0]]
        for name in ("batches", "all images"):
            column = [row[name] for row in losses]
            epoch = kept_epoch(column, margins)
            row = {"seed": file.stem, "loss": name, "lowest": int(np.argmin(column)) + 1, "kept": epoch + 1}
            for part in names:
                found = measures(logits[part][epoch], targets[part], Scaling())
                row |= {f"{part} NLL": found["NLL"], f"{part} AUC": found["AUC"]}
            epochs.append(row)
        images = Validated(valid[epoch], truth, kept["validation/patients"], weights, kept["trained"])
        for name, scaling in scalings(images).items():
            for part in names:
                found = measures(logits[part][epoch], targets[part], scaling)
                calibrations.append({"seed": file.stem, "calibration": name, "images": part} | found)
                if epoch == len(valid) - 1:  # the outputs by view are those of the last epoch
                    of_views = measures(kept[f"{part}/views"], targets[part], scaling)
                    for label, row in (("single", found), ("views", of_views)):
                        views.append({"seed": file.stem, "calibration": f"{name}, {label}", "images": part} | row)
    print(pd.DataFrame(epochs).set_index(["seed", "loss"]).T.to_string(float_format="{:.3f}".format))
    for rows in filter(None, (calibrations, views)):
        show_calibrations(pd.DataFrame(rows).drop(columns="AUC"))


def show_calibrations(table: pd.DataFrame) -> None:
    """Print the mean over seeds, and the negative log-likelihood of each seed, with means over the held-out groups."""
    means = []
    for name, others in (("far", ["validation", "random"]), ("near and far", ["validation"])):
        groups = table[~table.images.isin(others)].groupby(["seed", "calibration"], as_index=False)
        means.append(groups.mean(numeric_only=True).assign(images=f"mean of {name}"))
    table = pd.concat([table, *means])
    grouped = table.drop(columns="seed").groupby(["images", "calibration"], sort=False)
    print(f"\nmean of seeds {', '.join(table.seed.unique())}")
    print(grouped.mean().to_string(float_format="{:.3f}".format))
    print("\nNLL of each seed")
    nll = table.pivot_table("NLL", ["images", "calibration"], "seed", sort=False)
    print(nll.to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    train(target)
    show(target)
