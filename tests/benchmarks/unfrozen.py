"""Measures training images a second in the unfrozen phase: ours, plain fastai's, and a raw loop without loading.

    XRAY_DATA=chest_xray python -m tests.benchmarks.unfrozen

ours    `fit`'s own loop: loading, augmentation on the batch, all callbacks
plain   `vision_learner` with its defaults, unfrozen
limit   only torch, with one batch in memory: best precision, channels last, fused AdamW, no loading

The first SKIP batches of an epoch are not counted, the next STEPS are.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import torch
import torchvision
from fastai.vision.all import Callback

from tests.benchmarks.measuring import (
    DEVICE,
    Enough,
    about_the_machine,
    autocast,
    median,
    now,
    plain_learner,
    real_fit,
    rounds,
    some_images,
)

# -----------------------------------------------------------------------------
ARCH = os.environ.get("ARCH", "resnet50")
SIZE = int(os.environ.get("SIZE", "224"))
BATCH = int(os.environ.get("BATCH", "32"))
STEPS = int(os.environ.get("STEPS", "4"))
SKIP = int(os.environ.get("SKIP", "2"))
REPEATS = int(os.environ.get("REPEATS", "3"))
# -----------------------------------------------------------------------------


class Stopwatch(Callback):
    "Times STEPS batches after the first SKIP, then ends the fit."

    order = 100

    def before_fit(self):
        self.ends = []

    def after_batch(self):
        self.ends.append(now())
        if len(self.ends) == SKIP + STEPS:
            raise Enough("all batches were timed")  # fastai needs an exception with a message

    @property
    def rate(self) -> float:
        return STEPS * BATCH / (self.ends[-1] - self.ends[SKIP - 1])


def ours(data: Path) -> float:
    watch = Stopwatch()
    settings = {"arch": ARCH, "size": SIZE, "batch_size": BATCH, "weights": "none", "epochs": 1}
    real_fit(data, watch, **settings)
    return watch.rate


def plain(data: Path) -> float:
    learn, watch = plain_learner(data, ARCH, SIZE, BATCH), Stopwatch()
    learn.unfreeze()
    with contextlib.suppress(Enough), learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=watch)
    return watch.rate


def limit() -> float:
    network = torchvision.models.get_model(ARCH, weights=None, num_classes=2)
    network.to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), fused=DEVICE.type in ("cpu", "cuda"))
    x = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y = torch.arange(BATCH, device=DEVICE) % 2
    for step in range(SKIP + STEPS):
        if step == SKIP:
            start = now()
        with autocast():
            loss = torch.nn.functional.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return STEPS * BATCH / (now() - start)


def main() -> None:
    print(f"{ARCH}, {SIZE} px, batch {BATCH}; {about_the_machine()}")
    rates = {"plain": [], "ours": [], "limit": []}
    with tempfile.TemporaryDirectory() as temporary:
        data = some_images(Path(temporary), (SKIP + STEPS + 1) * BATCH, 8)
        for _ in rounds(REPEATS):
            rates["plain"].append(plain(data))
            rates["ours"].append(ours(data))
            rates["limit"].append(limit())
    print(f"\nmedians of {REPEATS}\n{'':<8}{'images/s':>10}{'it / plain':>12}{'it / limit':>12}")
    medians = {name: median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{name:<8}{value:>10.2f}{value / medians['plain']:>12.2f}{value / medians['limit']:>12.2f}")


if __name__ == "__main__":
    main()
