"""Times the frozen phase: ours, plain fastai's, and only the forward passes that it needs.

    XRAY_DATA=chest_xray python -m tests.benchmarks.frozen

ours    `fit` from its call to the end of a frozen phase of EPOCHS epochs: reading the data, the features of the
        validation images and of some augmented views of each training image, the epochs on them, checkpoints
plain   making a `vision_learner` and its frozen `fit(EPOCHS)`; PLAIN epochs are measured and scaled to EPOCHS
limit   the forward passes that ours needs, with one batch in memory: views x training + validation images through the
        same backbone (batch norm folded in, best precision, channels last)
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
    median,
    now,
    plain_learner,
    random_weights,
    real_fit,
    rounds,
    some_images,
)
from xray_fastai.config import FitConfig
from xray_fastai.model.architectures import build_backbone
from xray_fastai.training.frozen_features import pooling

# -----------------------------------------------------------------------------
ARCH = os.environ.get("ARCH", "resnet50")
SIZE = int(os.environ.get("SIZE", "224"))
BATCH = int(os.environ.get("BATCH", "32"))
IMAGES = int(os.environ.get("IMAGES", "256"))  # an eighth of them for validation
EPOCHS = int(os.environ.get("EPOCHS", "20"))
PLAIN = int(os.environ.get("PLAIN", "1"))
VIEWS = int(os.environ.get("VIEWS", FitConfig.frozen_views))
REPEATS = int(os.environ.get("REPEATS", "3"))
# -----------------------------------------------------------------------------


class Count(Callback):
    "Counts training and validation images."

    def before_fit(self):
        self.images = [loader.n for loader in self.dls.loaders]


def forward_rate(steps: int = 4) -> float:
    """Measure images a second through the backbone and the pooling."""
    backbone = build_backbone(ARCH)[:-1]
    network = pooling(torch.nn.Sequential(backbone, torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1))))
    network.to(DEVICE)
    batch = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), autocast():
        network(batch)
        start = now()
        for _ in range(steps):
            network(batch)
        return steps * BATCH / (now() - start)


def main() -> None:
    print(f"{ARCH}, {SIZE} px, batch {BATCH}, {EPOCHS} epochs, {VIEWS} views; {about_the_machine()}")
    times = {"plain": [], "ours": [], "limit": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = some_images(folder / "data", IMAGES - IMAGES // 8, IMAGES // 8)
        weights, count = random_weights(folder, ARCH), Count()
        for _ in rounds(REPEATS):
            start = now()
            learn = plain_learner(data, ARCH, SIZE, BATCH)
            learn.freeze()
            made = now()
            with learn.no_bar(), learn.no_logging():
                learn.fit(PLAIN)
            times["plain"].append(made - start + (now() - made) * EPOCHS / PLAIN)
            del learn
            settings = {"arch": ARCH, "size": SIZE, "batch_size": BATCH, "weights": str(weights), "frozen_views": VIEWS}
            settings |= {"freeze_epochs": EPOCHS, "epochs": 1, "patience": EPOCHS}
            times["ours"].append(real_fit(data, count, EndAfter(1), **settings))
            train, valid = count.images
            times["limit"].append((min(VIEWS, EPOCHS) * train + valid) / forward_rate())
    print(f"\n{train} training and {valid} validation images; medians of {REPEATS}")
    seconds = {name: median(values) for name, values in times.items()}
    print(f"{'':<8}{'seconds':>9}{'plain / it':>12}{'it / limit':>12}")
    for name, value in seconds.items():
        print(f"{name:<8}{value:>9.2f}{seconds['plain'] / value:>12.1f}{value / seconds['limit']:>12.2f}")


if __name__ == "__main__":
    main()
