"""Shared parts of the benchmarks: images in split folders, plain fastai's learner, a timed fit, kept runs, a table."""

import contextlib
import io
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from fastai.vision.all import (
    Callback,
    CrossEntropyLossFlat,
    ImageDataLoaders,
    Learner,
    Resize,
    accuracy,
    aug_transforms,
    vision_learner,
)

from xray_fastai import fit
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.data.sources import phantom
from xray_fastai.model.augmentation import AUGMENT, FASTAI_VALUES
from xray_fastai.system.device import choose_device, choose_precision

DEVICE = choose_device(os.environ.get("DEVICE", "auto"))
PRECISION = choose_precision("auto", DEVICE)
RATIO_WIDTH = 27  # characters of a ratio in a table
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def whole_number(name: str, default: int, least: int = 1) -> int:
    """Return a setting from the environment.

    Raises:
        SystemExit: it is no whole number, or below `least`.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < least:
        raise SystemExit(f"{name}={text}: give a whole number of {least} or more")
    return int(text)


def chosen(kind: str, names: Collection[str], known: Collection[str]) -> Collection[str]:
    """Return the names on a command line; without any, all that are known.

    Raises:
        SystemExit: one of them is not known; `kind` says what it should name.
    """
    if unknown := set(names) - set(known):
        raise SystemExit(f"no {kind} is named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return names or known


class Runs:
    """Keeps a row a run in a file of JSON lines; what is there is not run again, so several short commands add up."""

    def __init__(
        self,
        file: Path,
        kind: str,  # the key of a row that names what was run, beside "seed"
        **same: Any,  # rows with other values of these keys do not count
    ):
        self.file, self.kind = file, kind
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self.rows = [row for row in rows if all(row[key] == value for key, value in same.items())]

    def left(self, names: Iterable[str], seeds: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Yield seed and name of each run without a row: all names with one seed, then all with the next."""
        for seed in seeds:
            for name in names:
                if not any(row[self.kind] == name and row["seed"] == seed for row in self.rows):
                    yield seed, name

    def add(self, *rows: dict) -> None:
        """Keep more rows."""
        self.rows += rows
        with self.file.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


class Enough(Exception):
    """Ends a fit when everything is measured."""


def autocast() -> torch.autocast:
    """Return a context with the precision that a fit chooses on this machine."""
    return torch.autocast(DEVICE.type, TYPES[PRECISION], enabled=PRECISION != "fp32")


def now() -> float:
    """Return the time in seconds, after everything that was started on a GPU has ended."""
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def some_images(folder: Path, train: int, valid: int) -> Path:
    """Link images of XRAY_DATA, or of the drawn X-rays, into train/CLASS and val/CLASS; no patient is in both.

    The classes take turns, so that both splits have all. At most a quarter of the images go into val/, and the others
    of their patients into neither. Where a split needs more images than it has, each is linked several times.

    Returns:
        `folder`.

    Raises:
        SystemExit: no images of a class are left for a split.
    """
    root = find_root(os.environ["XRAY_DATA"]) if "XRAY_DATA" in os.environ else phantom.cached()
    table = read_split(root, "train")
    patients = sorted(table.patient.unique())
    random.Random(0).shuffle(patients)
    table = table.set_index("patient").loc[patients]
    turns = table.groupby("label").cumcount().to_numpy().argsort(kind="stable")
    table = table.iloc[turns]
    held_out = table.iloc[: min(valid, len(table) // 4)]
    rest = table[~table.index.isin(held_out.index)]
    if not set(table.label) == set(held_out.label) == set(rest.label):
        raise SystemExit(f"{root}: {len(table)} images are too few for {valid} of all classes for validation")
    for label in table.label.unique():
        for split in ("train", "val"):
            (folder / split / label).mkdir(parents=True)
    for split, count, images in (("val", valid, held_out), ("train", train, rest)):
        for i in range(count):
            row = images.iloc[i % len(images)]
            (folder / split / row.label / f"{split}{i}-{Path(row.path).name}").symlink_to(Path(row.path).resolve())
    return folder


def random_weights(folder: Path, arch: str) -> Path:
    """Write random weights for `fit --weights`: with them there is a frozen phase, which is all a benchmark needs."""
    torch.save(torchvision.models.get_model(arch, weights=None).state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def plain_learner(data: Path, arch: str, size: int, batch: int) -> Learner:
    """Return the learner of a user of fastai alone, with the part of `fit`'s augmentation that fastai has."""
    values = {name: AUGMENT["strong"][name] for name in FASTAI_VALUES}
    augmentation = aug_transforms(do_flip=False, max_warp=0.0, **values)
    dls = ImageDataLoaders.from_folder(
        data, train="train", valid="val", item_tfms=Resize(size, method="squash"), batch_tfms=augmentation, bs=batch,
        device=DEVICE,
    )  # fmt: skip
    network = getattr(torchvision.models, arch)
    return vision_learner(dls, network, pretrained=False, loss_func=CrossEntropyLossFlat(), metrics=accuracy)


class EndAfter(Callback):
    "Ends the fit by raising `Enough` at the end of a phase."

    order = 100

    def __init__(
        self,
        phases: int,  # how many to train
    ):
        self.phases = phases

    def after_fit(self):
        self.phases -= 1
        if not self.phases:
            raise Enough("the phase is complete")  # fastai needs an exception with a message


def real_fit(data: Path, *callbacks: Callback, **settings) -> float:
    """Run `xray_fastai.fit` until a callback raises `Enough`, and return the seconds.

    Args:
        data: split folders.
        *callbacks: added to the fit.
        **settings: of the fit.

    Raises:
        SystemExit: the fit ended before, because of a signal for example.
    """
    with tempfile.TemporaryDirectory() as exports, contextlib.redirect_stdout(io.StringIO()):
        start = now()
        try:
            config = FitConfig(data=str(data), valid="folder", exports=exports, device=DEVICE.type, **settings)
            result = fit(config, callbacks=callbacks)
        except Enough:
            return now() - start
    raise SystemExit(f"the fit ended ({result.status}) before everything was measured")


def median(values: list[float]) -> float:
    return statistics.median(values)


def medians(measured: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each name's values; a name without values is left out."""
    return {name: median(values) for name, values in measured.items() if values}


def rounds(count: int) -> Iterator[int]:
    """Count the repeats. Each measures everything that is compared, so that a busy machine slows all of it."""
    for i in range(count):
        print(f"repeat {i + 1} of {count}", flush=True)
        yield i


def about_the_machine() -> str:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{DEVICE.type} ({name}), {PRECISION}, torch {torch.__version__}"


def rates(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Measure items a second.

    A first round, which allocates memory and fills caches, is not counted.

    Args:
        ways: by name, functions that do the work once and return the number of items.
        repeats: rounds to measure.

    Returns:
        For each name one rate per repeat.
    """
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            count = way()
            if repeat:
                measured[name].append(count / (time.perf_counter() - start))
    return measured


def show(title: str, measured: dict[str, list[float]], unit: str, against: tuple[str, ...]) -> None:
    """Print for each name the median, lowest and highest rate, and its ratio to the medians of `against`."""
    middle = medians(measured)
    heads = "".join(f"{'/ ' + name:>{RATIO_WIDTH}}" for name in against)
    print(f"\n{title}\n{'':<28}{unit:>12}{'range':>20}{heads}")
    for name, values in measured.items():
        ratios = "".join(f"{middle[name] / middle[other]:>{RATIO_WIDTH}.2f}" for other in against)
        print(f"{name:<28}{middle[name]:>12.1f}{f'{min(values):.1f} to {max(values):.1f}':>20}{ratios}", flush=True)
