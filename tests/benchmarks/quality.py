"""Measures the time to quality: seconds until a fit's ROC AUC on held-out images passes 0.90, 0.95, 0.97.

    XRAY_DATA=chest_xray python -m tests.benchmarks.quality FOLDER [WAY ...]
    ARCH=timm/tf_efficientnet_lite0 WEIGHTS=FILE XRAY_DATA=chest_xray python -m tests.benchmarks.quality FOLDER

The held-out images are those of `tests.benchmarks.elsewhere`, HELD random ones of each group. The AUC is the mean over
GROUPS: by default "random" (other patients) and "least typical" (images whose look is that of the other class). IMAGES
of the other patients are trained on, of which each way takes a tenth to validate. FILE has ImageNet's weights under
timm's names (`tests.benchmarks.transfer` writes it); without it all start from random weights.

plain, fine_tune    fastai alone: `ImageDataLoaders.from_folder(item_tfms=Resize(SIZE), batch_tfms=aug_transforms())`,
                    `vision_learner(...).fine_tune(EPOCHS)`, all else by its defaults: also its batches, normalization,
                    rates, and that each image is decoded in each epoch
plain, one cycle    the same with `fit_one_cycle(EPOCHS)`, which suits random weights better
ours                `fit(epochs=EPOCHS)`, all else by its defaults
N epochs            the schedule of `ours` anneals in N epochs
batch N             with a rate that grows with the root of the batch
SIZE first          `ours` at a smaller size, then from its export at SIZE
limit               `fit(time_limit=LIMIT)`, as many epochs as fit
frozen alone        the frozen phase on stored features; then the run ends, without an export

Seconds are CPU seconds of the process and of those it starts, and beside them seconds on the clock, which say little on
a busy machine. They count from the call, with decoding (caches are empty when a way starts), and without imports. A
callback measures the AUC after each epoch, and its own time is not counted: the seconds belong to the epochs' ends.
"end" is the AUC that a user keeps: of our export, of plain fastai's last epoch; "s in all" is the time for that. The
AUC with which the better plain way ends is a fourth level. FOLDER keeps a line a run (runs.jsonl); what is there is not
run again.
"""

import contextlib
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import torchvision
from fastai.vision.all import (
    Callback,
    ImageDataLoaders,
    Learner,
    Resize,
    TrackerCallback,
    accuracy,
    aug_transforms,
    set_seed,
    vision_learner,
)
from sklearn.metrics import roc_auc_score
from torch import nn

from tests.benchmarks.elsewhere import groups_of
from tests.benchmarks.measuring import DEVICE, EndAfter, Enough, Runs, about_the_machine, chosen, now, whole_number
from tests.benchmarks.second_hospital import by_patient
from tests.benchmarks.shift import link
from xray_fastai import fit
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data import pixel_cache
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.data.images import open_image
from xray_fastai.inference.model import open_model
from xray_fastai.inference.stream import predict_all
from xray_fastai.model.preprocessing import Preprocessing

# -----------------------------------------------------------------------------
ARCH = os.environ.get("ARCH", "resnet18")
WEIGHTS = os.environ.get("WEIGHTS", "none")
SIZE = whole_number("SIZE", 64, 32)
SMALL = whole_number("SMALL", max(32, SIZE // 2), 32)  # the first size of `SIZE first`
IMAGES = whole_number("IMAGES", 1500, 40)
HELD = whole_number("HELD", 250, 10)
GROUPS = os.environ.get("GROUPS", "random,least typical").split(",")
EPOCHS = whole_number("EPOCHS", 8, 2)
FEWER = whole_number("FEWER", 6, 2)
BATCH = whole_number("BATCH", 32)
LIMIT = whole_number("LIMIT", 60)  # seconds on the clock
SEEDS = range(whole_number("SEEDS", 1))
WORKERS = whole_number("WORKERS", 0, 0) if "WORKERS" in os.environ else None  # of plain fastai; None is its own default
LEVELS = (0.90, 0.95, 0.97)
DEFAULT_BATCH, DEFAULT_RATE = 80, 2e-3  # of `fit`
# -----------------------------------------------------------------------------
Found = dict[str, float]  # AUC by group


class Stopwatch:
    """Counts CPU seconds and seconds on the clock, except for those in `pause`."""

    def __init__(self):
        self.paused, self.start = np.zeros(2), self._now()

    @staticmethod
    def _now() -> np.ndarray:
        return np.array([sum(os.times()[:4]), now()])

    def elapsed(self) -> np.ndarray:
        return self._now() - self.start - self.paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        began = self._now()
        yield
        self.paused += self._now() - began


class AfterEachEpoch(Callback):
    "Measures the AUC of each group after each epoch, and notes when that was."

    order = TrackerCallback.order  # before what may end the fit

    def __init__(
        self,
        watch: Stopwatch,
        inputs: Callable[[Learner], dict[str, torch.Tensor]],  # makes the network's input (N, 3, S, S) of each group
        positives: dict[str, np.ndarray],
    ):
        self.watch, self.inputs, self.positives = watch, inputs, positives
        self.made: dict[str, torch.Tensor] | None = None
        self.rows: list[dict] = []

    def before_fit(self):
        if self.made is None:
            with self.watch.pause():
                self.made = self.inputs(self.learn)

    def after_epoch(self):
        seconds = self.watch.elapsed().tolist()
        with self.watch.pause(), torch.inference_mode():
            network = nn.Sequential(*self.model.children())  # in the frozen phase, `model` runs the head alone
            found = {name: torch.cat([network(part) for part in x.split(64)]) for name, x in self.made.items()}
            aucs = {
                name: roc_auc_score(self.positives[name], out.float().diff()[:, 0].cpu()) for name, out in found.items()
            }
        self.rows.append({"seconds": seconds, "AUC": aucs})


class Task:
    """Holds what all ways share: the images to train on, those that are held out, and where to write."""

    def __init__(self, folder: Path):
        self.folder = folder
        table = read_split(find_root(os.environ["XRAY_DATA"]), "train")
        folder.mkdir(parents=True, exist_ok=True)
        held = groups_of(folder, table)
        self.groups = {name: rows.sample(min(HELD, len(rows)), random_state=0) for name, rows in held.items()}
        self.positives = {name: rows.label.eq("PNEUMONIA").to_numpy() for name, rows in self.groups.items()}
        rest = by_patient(table[~table.patient.isin(pd.concat(held.values()).patient)], 0).head(IMAGES)
        self.data = folder / f"data-{len(rest)}"
        if not self.data.exists():
            link(self.data, rest, np.zeros(len(rest), bool))

    def ours(self, seed: int, *steps: dict, callbacks: Sequence[Callback] = ()) -> dict:
        """Fit once or, by the export of the step before, again, and return the rows of epochs and the end."""
        watch, rows, weights = Stopwatch(), [], WEIGHTS
        for number, settings in enumerate(steps):
            size = settings.get("size", SIZE)
            own = {"arch": ARCH, "size": size, "epochs": EPOCHS, "weights": weights, "device": DEVICE.type}
            own |= {"seed": seed, "exports": self.folder / "exports", "name": f"step-{number}", "quiet": True}
            each = AfterEachEpoch(watch, lambda _, size=size: self.decoded(size), self.positives)
            with contextlib.suppress(Enough):
                weights = fit(self.data, **own | settings, callbacks=[each, *callbacks]).path
            rows += each.rows
        seconds = watch.elapsed().tolist()
        if callbacks:  # which end the run before it has an export
            return {"epochs": rows, "end": rows[-1]["AUC"], "seconds": rows[-1]["seconds"]}
        model = open_model(weights, DEVICE.type)
        end = {
            name: roc_auc_score(
                self.positives[name],
                model.probabilities(predict_all(model, list(table.path)))[:, model.classes.index("PNEUMONIA")],
            )
            for name, table in self.groups.items()
        }
        return {"epochs": rows, "end": end, "seconds": seconds}

    def decoded(self, size: int) -> dict[str, torch.Tensor]:
        """Return what our networks get of the held-out images."""
        prepare = Preprocessing(contrast="equalize")
        return {
            name: prepare(
                torch.from_numpy(np.stack([np.asarray(open_image(path, size)) for path in table.path]))[:, None]
            ).to(DEVICE)
            for name, table in self.groups.items()
        }

    def plain(self, seed: int, method: str) -> dict:
        """Train as a user of fastai alone does, and return the rows of epochs and the end."""
        set_seed(seed)
        watch = Stopwatch()
        dls = ImageDataLoaders.from_folder(
            self.data / "train", valid_pct=0.1, seed=seed, item_tfms=Resize(SIZE), batch_tfms=aug_transforms(),
            device=DEVICE, num_workers=WORKERS,
        )  # fmt: skip
        learn = vision_learner(dls, **network(), metrics=accuracy)
        each = AfterEachEpoch(watch, self.by_fastai, self.positives)
        with learn.no_bar(), learn.no_logging():
            getattr(learn, method)(EPOCHS, cbs=each)
        return {"epochs": each.rows, "end": each.rows[-1]["AUC"], "seconds": watch.elapsed().tolist()}

    def by_fastai(self, learn: Learner) -> dict[str, torch.Tensor]:
        """Return what plain fastai's network gets of the held-out images."""
        return {
            name: torch.cat([batch[0].as_subclass(torch.Tensor) for batch in learn.dls.test_dl(list(table.path))])
            for name, table in self.groups.items()
        }


def network() -> dict:
    """Return the network of plain fastai, as `vision_learner` takes it.

    Raises:
        SystemExit: weights of a network that is not timm's.
    """
    if WEIGHTS == "none":
        name = ARCH.removeprefix("timm/")
        return {"arch": name if name != ARCH else getattr(torchvision.models, ARCH), "pretrained": False}
    if not ARCH.startswith("timm/"):
        raise SystemExit("WEIGHTS: give a file of a network of timm, and ARCH=timm/NAME")
    return {"arch": ARCH.removeprefix("timm/"), "pretrained_cfg_overlay": {"file": WEIGHTS}}


def with_batch(batch: int) -> dict:
    return {"batch_size": batch, "lr": DEFAULT_RATE * (batch / DEFAULT_BATCH) ** 0.5}


WAYS: dict[str, Callable[[Task, int], dict]] = {
    "plain, fine_tune": lambda task, seed: task.plain(seed, "fine_tune"),
    "ours": lambda task, seed: task.ours(seed, {}),
    f"{FEWER} epochs": lambda task, seed: task.ours(seed, {"epochs": FEWER}),
    f"{FEWER // 2} epochs": lambda task, seed: task.ours(seed, {"epochs": FEWER // 2}),
    f"batch {2 * DEFAULT_BATCH}": lambda task, seed: task.ours(seed, with_batch(2 * DEFAULT_BATCH)),
    f"batch {BATCH}": lambda task, seed: task.ours(seed, with_batch(BATCH)),
    f"{FEWER} epochs, batch {BATCH}": lambda task, seed: task.ours(seed, {"epochs": FEWER} | with_batch(BATCH)),
    f"{SMALL} px first": lambda task, seed: task.ours(
        seed, {"size": SMALL, "epochs": FEWER}, {"epochs": 2, "freeze_epochs": 0}
    ),
    f"limit {LIMIT} s": lambda task, seed: task.ours(seed, {"epochs": FitConfig.epochs, "time_limit": f"{LIMIT}s"}),
}
if WEIGHTS == "none":
    WAYS |= {
        "plain, one cycle": lambda task, seed: task.plain(seed, "fit_one_cycle"),
    }
else:
    WAYS |= {
        "frozen alone": lambda task, seed: task.ours(seed, {"freeze_epochs": 3 * EPOCHS}, callbacks=[EndAfter(1)]),
    }


def time_of(run: dict, level: float) -> np.ndarray | None:
    """Return the CPU seconds and the seconds on the clock at which a level was passed first; None is never."""
    for row in run["epochs"]:
        if mean_of(row["AUC"]) >= level:
            return np.array(row["seconds"])
    return None


def mean_of(aucs: Found) -> float:
    return float(np.mean([aucs[name] for name in GROUPS]))


def as_table(runs: Sequence[dict]) -> str:
    """Return a row for each way: medians over the seeds, and how many times as long the fastest plain way takes.

    The last level is the AUC that the better plain way ends with.
    """
    by_way = {way: [run for run in runs if run["way"] == way] for way in dict.fromkeys(run["way"] for run in runs)}
    ends = {way: float(np.mean([mean_of(run["end"]) for run in own])) for way, own in by_way.items()}
    plain = [way for way in by_way if way.startswith("plain")]
    levels = {f"{level:.2f}": level for level in LEVELS}
    if plain:
        levels["plain's end"] = max(ends[way] for way in plain)
    rows: dict[str, dict[str, str]] = {way: {} for way in by_way}
    for title, level in levels.items():
        times = {}
        for way, own in by_way.items():
            found = [seconds for run in own if (seconds := time_of(run, level)) is not None]
            if 2 * len(found) > len(own):
                times[way] = np.median(found, axis=0)
        best = min((times[way][0] for way in plain if way in times), default=None)
        for way, row in rows.items():
            row[title] = "{:.0f} ({:.0f})".format(*times[way]) if way in times else "never"
            row[f"plain / it, {title}"] = f"{best / times[way][0]:.1f}" if best and way in times else "-"
    for way, own in by_way.items():
        rows[way]["s in all"] = "{:.0f} ({:.0f})".format(*np.median([run["seconds"] for run in own], axis=0))
        rows[way]["end"] = f"{ends[way]:.3f}"
        rows[way] |= {f"end, {name}": f"{np.mean([run['end'][name] for run in own]):.3f}" for name in own[0]["end"]}
    return pd.DataFrame(rows).T.to_string()


def main(folder: Path, names: Sequence[str]) -> None:
    names, task = chosen("way", names, WAYS), Task(folder)
    setup = f"{ARCH}, {SIZE} px, {IMAGES} images, weights {Path(WEIGHTS).stem}, {EPOCHS} epochs"
    runs = Runs(folder / "runs.jsonl", "way", setup=setup)
    print(f"{setup}; AUC of {', '.join(GROUPS)}; {about_the_machine()}", flush=True)
    cache = folder / "cache"
    for seed, way in runs.left(names, SEEDS):
        for old in (cache, folder / "exports"):
            shutil.rmtree(old, ignore_errors=True)
        began = time.perf_counter()
        with patch.object(pixel_cache, "cache_dir", lambda: cache), contextlib.redirect_stdout(io.StringIO()):
            run = {"setup": setup, "way": way, "seed": seed} | WAYS[way](task, seed)
        runs.add(run)
        print(f"{way}, seed {seed}: {time.perf_counter() - began:.0f} s on the clock", flush=True)
    print("\nCPU seconds (seconds on the clock)\n" + as_table(runs.rows))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
