"""Times the frozen phase: ours, plain fastai's, and only the forward passes that it needs.

    XRAY_DATA=chest_xray python -m tests.benchmarks.frozen

ours    `fit` from its call to the end of a frozen phase of EPOCHS epochs: reading the data, the features of the
        validation images and of some augmented views of each training image, the epochs on them, checkpoints
plain   making a `vision_learner` and its frozen `fit(EPOCHS)`; PLAIN epochs are measured and scaled to EPOCHS; with
        PLAIN=0 it is left out
limit   the forward passes that ours needs, with one batch in memory: views x training + validation images through the
        same backbone (batch norm folded in, best precision, channels last)

Ours is also given in two parts: from the call to the first epoch, and the epochs.
"""

import os
import tempfile
from pathlib import Path

import torch
from fastai.vision.all import Callback

from tests.benchmarks.measuring import (
    DEVICE,
    EndAfter,
    about_the_machine,
    autocast,
    medians,
    now,
    plain_learner,
    random_weights,
    real_fit,
    rounds,
    some_images,
    whole_number,
)
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.model.architectures import build_backbone
from xray_fastai.training.frozen_features import pooling

# -----------------------------------------------------------------------------
ARCH = os.environ.get("ARCH", "resnet50")
SIZE = whole_number("SIZE", 224, 32)
BATCH = whole_number("BATCH", 80 if DEVICE.type == "cuda" else 32)
IMAGES = whole_number("IMAGES", 2048 if DEVICE.type == "cuda" else 256, 16)  # an eighth of them for validation
EPOCHS = whole_number("EPOCHS", 20)
PLAIN = whole_number("PLAIN", 1, 0)
VIEWS = whole_number("VIEWS", FitConfig.frozen_views)
REPEATS = whole_number("REPEATS", 3)
# -----------------------------------------------------------------------------


class FirstEpoch(Callback):
    "Remembers when the epochs began, and the numbers of training and validation images."

    def before_fit(self):
        self.images, self.at = [loader.n for loader in self.dls.loaders], now()


def forward_rate() -> float:
    """Measure images a second through the backbone and the pooling."""
    backbone = build_backbone(ARCH)[:-1]
    network = pooling(torch.nn.Sequential(backbone, torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1))))
    network.to(DEVICE)
    batch = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    skip, steps = (10, 50) if DEVICE.type == "cuda" else (1, 4)
    with torch.inference_mode(), autocast():
        for step in range(skip + steps):
            if step == skip:
                start = now()
            network(batch)
        return steps * BATCH / (now() - start)


def plain(data: Path) -> float:
    start = now()
    learn = plain_learner(data, ARCH, SIZE, BATCH)
    learn.freeze()
    made = now()
    with learn.no_bar(), learn.no_logging():
        learn.fit(PLAIN)
    return made - start + (now() - made) * EPOCHS / PLAIN


def measure() -> dict[str, float]:
    """Return the medians of seconds: plain (unless PLAIN=0), ours, its two parts, limit."""
    times = {"plain": [], "ours": [], "until the epochs": [], "epochs": [], "limit": []}
    settings = {"arch": ARCH, "size": SIZE, "batch_size": BATCH, "frozen_views": VIEWS}
    settings |= {"freeze_epochs": EPOCHS, "epochs": 1, "patience": EPOCHS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = some_images(folder / "data", IMAGES - IMAGES // 8, IMAGES // 8)
        settings["weights"] = str(random_weights(folder, ARCH))
        for _ in rounds(REPEATS):
            if PLAIN:
                times["plain"].append(plain(data))
            first, start = FirstEpoch(), now()
            seconds = real_fit(data, first, EndAfter(1), **settings)
            times["ours"].append(seconds)
            times["until the epochs"].append(first.at - start)
            times["epochs"].append(seconds - times["until the epochs"][-1])
            train, valid = first.images
            times["limit"].append((min(VIEWS, EPOCHS) * train + valid) / forward_rate())
    print(f"\n{train} training and {valid} validation images; medians of {REPEATS}")
    return medians(times)


def main() -> None:
    print(f"{ARCH}, {SIZE} px, batch {BATCH}, {EPOCHS} epochs, {VIEWS} views; {about_the_machine()}")
    seconds = measure()
    print(f"{'':<18}{'seconds':>9}{'plain / it':>12}{'it / limit':>12}")
    for name, value in seconds.items():
        faster = f"{seconds['plain'] / value:.1f}" if "plain" in seconds else ""
        print(f"{name:<18}{value:>9.2f}{faster:>12}{value / seconds['limit']:>12.2f}")


if __name__ == "__main__":
    main()
