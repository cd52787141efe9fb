"""Measures how fast new images are predicted: ours, a loop of fastai's `learn.predict`, and two limits.

    python -m tests.benchmarks.predict

`fit` makes the model in one epoch on a few images, which is enough to time it. The images are those of XRAY_DATA, or
the drawn X-rays, each linked as often as needed: with IMAGES=16384, on a GPU, `predict` takes seconds and its start
little of that.

decode limit    `open_image`, in one process for each core, without a network
forward limit   raw torch on decoded and normalised batches in memory, in the best precision and memory format, without
                or with batch norm folded into the convolutions: the faster of the two

`predict` can be no faster than the slower limit where decoding and network use different parts of the machine (a GPU).
On a CPU they share the cores, and the limit is 1 / (1 / decode + 1 / forward).
"""

import contextlib
import io
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.fx.experimental.optimization import fuse

from tests.benchmarks.measuring import (
    DEVICE,
    PRECISION,
    TYPES,
    about_the_machine,
    autocast,
    median,
    medians,
    now,
    rates,
    show,
    some_images,
    whole_number,
)
from xray_fastai import fit, load_learner, predict
from xray_fastai.data.images import open_image
from xray_fastai.inference.model import open_model

# -----------------------------------------------------------------------------
ARCH = os.environ.get("ARCH", "resnet50")
SIZE = whole_number("SIZE", 224, 32)
BATCH = whole_number("BATCH", 32)
IMAGES = whole_number("IMAGES", 16384 if DEVICE.type == "cuda" else 96)
PLAIN = whole_number("PLAIN", 16)  # images for the slow loop
REPEATS = whole_number("REPEATS", 3)
# -----------------------------------------------------------------------------
LOOP, DECODE, FORWARD, FOLDED = "loop of learn.predict", "decode limit", "forward", "forward, folded"


def decode(paths: list[str]) -> int:
    for path in paths:
        open_image(path, SIZE)
    return len(paths)


def decode_rate(paths: list[str]) -> float:
    """Measure images a second that all cores decode, each in its own process; the processes' start is not counted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [paths[i : i + 16] for i in range(0, len(paths), 16)]
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        list(pool.map(decode, parts[:1] * 4 * cores))
        start = time.perf_counter()
        return sum(pool.map(decode, parts)) / (time.perf_counter() - start)


def measure() -> dict[str, float]:
    """Print the table, and return medians of images a second by name; `ours` is ours in the model's precision."""
    with tempfile.TemporaryDirectory() as temporary:
        data = some_images(Path(temporary) / "data", IMAGES, 8)
        some = some_images(Path(temporary) / "some", 16, 8)
        with contextlib.redirect_stdout(io.StringIO()):
            settings = {"arch": ARCH, "size": SIZE, "epochs": 1, "batch_size": 8, "weights": "none", "cache": False}
            settings |= {"device": DEVICE.type, "exports": temporary, "name": "model"}
            export = fit(data=str(some), valid="folder", **settings).path
        paths = sorted(map(str, (data / "train").rglob("*.jpeg")))
        learn, model, exact = load_learner(export), *(open_model(export, DEVICE.type, p) for p in ("auto", "fp32"))
        learn.dls.to(DEVICE)
        learn.model.to(DEVICE)
        kind = TYPES[PRECISION]
        x = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)
        raw = open_model(export, DEVICE.type).network.to(memory_format=torch.channels_last)
        folded, converted = fuse(raw).to(kind, memory_format=torch.channels_last), x.to(kind)
        steps = -(-IMAGES // BATCH)

        def plain() -> int:
            with learn.no_bar(), learn.no_logging():
                for path in paths[:PLAIN]:
                    learn.predict(path)
            return min(PLAIN, len(paths))

        def ours(model=model) -> int:
            return len(predict(paths, model, batch_size=BATCH))

        def forward() -> int:
            with torch.inference_mode(), autocast():
                for _ in range(steps):
                    raw(x)
            now()
            return steps * BATCH

        def forward_folded() -> int:
            with torch.inference_mode():
                for _ in range(steps):
                    folded(converted)
            now()
            return steps * BATCH

        name = f"xray-fastai, {model.precision}"
        ways = {LOOP: plain, name: ours, "xray-fastai, fp32": lambda: ours(exact)}
        measured = rates(ways | {FORWARD: forward, FOLDED: forward_folded}, REPEATS)
        measured[DECODE] = [decode_rate(paths) for _ in range(REPEATS)]
    show("", measured, "images/s", (LOOP, DECODE, FOLDED))
    return medians(measured) | {"ours": median(measured[name])}


def limit_of(rate: dict[str, float]) -> float:
    """Return the images a second that decoding and network allow together."""
    forward = max(rate[FORWARD], rate[FOLDED])
    return min(rate[DECODE], forward) if DEVICE.type == "cuda" else 1 / (1 / rate[DECODE] + 1 / forward)


def main() -> None:
    print(f"{ARCH}, {SIZE} px, batch {BATCH}, {IMAGES} images; {about_the_machine()}")
    rate = measure()
    print(f"\nours / limit {rate['ours'] / limit_of(rate):.2f}, ours / loop {rate['ours'] / rate[LOOP]:.1f}")


if __name__ == "__main__":
    main()
