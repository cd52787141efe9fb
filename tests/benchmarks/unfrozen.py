"""Measures training images a second in the unfrozen phase: ours, plain fastai's, and a raw loop without loading.

    XRAY_DATA=chest_xray python -m tests.benchmarks.unfrozen

ours    `fit`'s own loop: loading, augmentation on the batch, all callbacks
plain   `vision_learner` with its defaults, unfrozen
limit   only torch, with one batch in memory: best precision, channels last, fused AdamW, no loading

The first SKIP batches of an epoch are not counted, the next STEPS are. In the first repeat ours also decodes the files;
the others find them in the cache. On a GPU, STEPS has to be larger than what the loading processes hold ready.

At the end: what share of a step of ours goes into which part (`step_shares`); SHARES=0 leaves that out.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import torch
import torchvision
from fastai.vision.all import Callback

from tests.benchmarks import step_shares
from tests.benchmarks.measuring import (
    DEVICE,
    Enough,
    about_the_machine,
    autocast,
    medians,
    now,
    plain_learner,
    real_fit,
    rounds,
    some_images,
    whole_number,
)

# -----------------------------------------------------------------------------
ARCH = os.environ.get("ARCH", "resnet50")
SIZE = whole_number("SIZE", 224, 32)
BATCH = whole_number("BATCH", 80 if DEVICE.type == "cuda" else 32)
STEPS = whole_number("STEPS", 60 if DEVICE.type == "cuda" else 4)
SKIP = whole_number("SKIP", 20 if DEVICE.type == "cuda" else 2, 0)
REPEATS = whole_number("REPEATS", 3)
SHARES = whole_number("SHARES", 1, 0)
# -----------------------------------------------------------------------------


class Stopwatch(Callback):
    "Times STEPS batches after the first SKIP, then ends the fit."

    order = 100

    def before_train(self):
        self.steps = 0
        self._look()

    def after_batch(self):
        self.steps += 1
        self._look()

    def _look(self):
        # only here: `now` waits for the GPU, which elsewhere would cost what it measures
        if self.steps == SKIP:
            self.start = now()
        elif self.steps == SKIP + STEPS:
            self.seconds = now() - self.start
            raise Enough("all batches were timed")  # fastai needs an exception with a message

    @property
    def rate(self) -> float:
        return STEPS * BATCH / self.seconds


def settings() -> dict:
    return {"arch": ARCH, "size": SIZE, "batch_size": BATCH, "weights": "none", "epochs": 1}


def ours(data: Path) -> float:
    watch = Stopwatch()
    real_fit(data, watch, **settings())
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


def measure() -> dict[str, float]:
    """Return the medians of images a second: plain, ours, limit. Also prints the shares of a step, unless SHARES=0."""
    rates = {"plain": [], "ours": [], "limit": []}
    with tempfile.TemporaryDirectory() as temporary:
        data = some_images(Path(temporary), (SKIP + STEPS + 1) * BATCH, 8)
        for _ in rounds(REPEATS):
            rates["plain"].append(plain(data))
            rates["ours"].append(ours(data))
            rates["limit"].append(limit())
        if SHARES:
            clock = step_shares.Clock()
            real_fit(data, *step_shares.watchers(clock, SKIP, STEPS), **settings())
            print(clock.table())
    return medians(rates)


def main() -> None:
    print(f"{ARCH}, {SIZE} px, batch {BATCH}; {about_the_machine()}")
    rates = measure()
    print(f"\nmedians of {REPEATS}\n{'':<8}{'images/s':>10}{'it / plain':>12}{'it / limit':>12}")
    for name, value in rates.items():
        print(f"{name:<8}{value:>10.2f}{value / rates['plain']:>12.2f}{value / rates['limit']:>12.2f}")


if __name__ == "__main__":
    main()
