"""What the benchmarks share: some images in split folders, plain fastai on them, the phases of a real fit, a table."""

import contextlib
import io
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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
from xray_fastai.config import FitConfig
from xray_fastai.data.dataset import find_root, read_split
from xray_fastai.data.sources import phantom
from xray_fastai.model.augmentation import AUGMENT, FASTAI_VALUES
from xray_fastai.system.device import choose_device, choose_precision
from xray_fastai.training import fit as training
from xray_fastai.training.plan import Plan

DEVICE = choose_device("auto")
PRECISION = choose_precision("auto", DEVICE)
WIDE = 27  # columns of a ratio in a table
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Enough(Exception):
    """What was to be measured has been seen."""


def autocast() -> torch.autocast:
    """The precision that a fit chooses here."""
    return torch.autocast(DEVICE.type, TYPES[PRECISION], enabled=PRECISION != "fp32")


def now() -> float:
    """Seconds, when all that was started on a GPU is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def some_images(folder: Path, train: int, valid: int) -> Path:
    """Links to images of XRAY_DATA, or of the phantom, in train/CLASS and val/CLASS; no patient is in both.

    Returns:
        `folder`. Where there are fewer images than asked for, images are linked several times to train on.
    """
    root = find_root(os.environ["XRAY_DATA"]) if "XRAY_DATA" in os.environ else phantom.cached()
    table = read_split(root, "train")
    patients = sorted(table.patient.unique())
    random.Random(0).shuffle(patients)
    table = table.set_index("patient").loc[patients]
    for label in table.label.unique():
        for split in ("train", "val"):
            (folder / split / label).mkdir(parents=True)
    for i, row in enumerate(table.iloc[:valid].itertuples()):
        (folder / "val" / row.label / f"v{i}-{Path(row.path).name}").symlink_to(Path(row.path).resolve())
    rest = table[~table.index.isin(table.index[:valid])]
    for i in range(train):
        row = rest.iloc[i % len(rest)]
        name = f"t{i}-{Path(row.path).name}"
        (folder / "train" / row.label / name).symlink_to(Path(row.path).resolve())
    return folder


def random_weights(folder: Path, arch: str) -> Path:
    """A file of weights for `fit --weights`, of which a benchmark wants no more than that they are there."""
    torch.save(torchvision.models.get_model(arch, weights=None).state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def plain_learner(data: Path, arch: str, size: int, batch: int) -> Learner:
    """What a user would write with fastai alone; augmentation as `fit` has it, but for what fastai lacks."""
    values = {name: AUGMENT["strong"][name] for name in FASTAI_VALUES}
    augmentation = aug_transforms(do_flip=False, max_warp=0.0, **values)
    dls = ImageDataLoaders.from_folder(
        data, train="train", valid="val", item_tfms=Resize(size, method="squash"), batch_tfms=augmentation, bs=batch,
        device=DEVICE,
    )  # fmt: skip
    network = getattr(torchvision.models, arch)
    return vision_learner(dls, network, pretrained=False, loss_func=CrossEntropyLossFlat(), metrics=accuracy)


def real_fit(data: Path, seen: Callable[[Learner, Plan], list[Callback]], after: str, **settings) -> float:
    """Seconds that a phase of `xray_fastai.fit` takes; the fit is ended after it.

    Args:
        data: split folders.
        seen: learner and plan before the phase; gives callbacks that the phase is to have.
        after: the phase.
        **settings: of the fit.
    """
    train_phase, seconds = training._train_phase, []

    def timed(learn, plan, name, epochs, callbacks, *others):
        start = now()
        train_phase(learn, plan, name, epochs, [*callbacks, *seen(learn, plan)], *others)
        seconds.append(now() - start)
        if name == after:
            raise Enough

    training._train_phase = timed
    try:
        with (
            tempfile.TemporaryDirectory() as exports,
            contextlib.suppress(Enough),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            fit(FitConfig(data=str(data), valid="folder", exports=exports, **settings))
    finally:
        training._train_phase = train_phase
    return seconds[-1] if seconds else 0.0


def median(values: list[float]) -> float:
    return statistics.median(values)


def rounds(count: int) -> Iterator[int]:
    """Repeats, each of which measures all that is compared, so that a busy machine is busy for all."""
    for i in range(count):
        print(f"repeat {i + 1} of {count}", flush=True)
        yield i


def about_the_machine() -> str:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{DEVICE.type} ({name}), {PRECISION}, torch {torch.__version__}"


def rates(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Things a second of each way, a number a repeat; a way does its work once and returns how many things it did.

    A first round, in which memory is taken and caches are filled, is not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            count = way()
            if repeat:
                found[name].append(count / (time.perf_counter() - start))
    return found


def show(title: str, found: dict[str, list[float]], unit: str, against: tuple[str, ...]) -> None:
    """A row a way: the median, the lowest and the highest, and the ratio of its median to those of `against`."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    heads = "".join(f"{'/ ' + name:>{WIDE}}" for name in against)
    print(f"\n{title}\n{'':<28}{unit:>12}{'range':>20}{heads}")
    for name, values in found.items():
        ratios = "".join(f"{medians[name] / medians[other]:>{WIDE}.2f}" for other in against)
        print(f"{name:<28}{medians[name]:>12.1f}{f'{min(values):.1f} to {max(values):.1f}':>20}{ratios}", flush=True)
