"""Measures how fast new images are predicted: ours, a loop of fastai's `learn.predict`, and raw forward passes.

    python -m tests.benchmarks.predict

`fit` makes the model in one epoch on a few images, which is enough to time it. The images are those of XRAY_DATA, or
the drawn X-rays. The limit is raw torch on decoded and normalised batches in memory, in the best precision and memory
format, without and with batch norm folded into the convolutions.
"""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import torch
from torch.fx.experimental.optimization import fuse

from tests.benchmarks.measuring import (
    DEVICE,
    PRECISION,
    TYPES,
    about_the_machine,
    autocast,
    now,
    rates,
    show,
    some_images,
)
from xray_fastai import fit, load_learner, predict
from xray_fastai.inference.model import open_model

# -----------------------------------------------------------------------------
ARCH = os.environ.get("ARCH", "resnet50")
SIZE = int(os.environ.get("SIZE", "224"))
BATCH = int(os.environ.get("BATCH", "32"))
IMAGES = int(os.environ.get("IMAGES", "96"))
PLAIN = int(os.environ.get("PLAIN", "16"))  # images for the slow loop
REPEATS = int(os.environ.get("REPEATS", "3"))
# -----------------------------------------------------------------------------


def main() -> None:
    print(f"{ARCH}, {SIZE} px, batch {BATCH}, {IMAGES} images; {about_the_machine()}")
    with tempfile.TemporaryDirectory() as temporary:
        data = some_images(Path(temporary) / "data", max(16, IMAGES), 8)
        some = some_images(Path(temporary) / "some", 16, 8)
        with contextlib.redirect_stdout(io.StringIO()):
            settings = {"arch": ARCH, "size": SIZE, "epochs": 1, "batch_size": 8, "weights": "none", "cache": False}
            export = fit(data=str(some), valid="folder", exports=temporary, name="model", **settings).path
        paths = sorted(map(str, (data / "train").rglob("*.jpeg")))[:IMAGES]
        learn, model, exact = load_learner(export), open_model(export), open_model(export, precision="fp32")
        learn.dls.to(DEVICE)
        learn.model.to(DEVICE)
        x = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)
        raw = open_model(export).network.to(memory_format=torch.channels_last)
        folded, kind = fuse(raw).to(TYPES[PRECISION], memory_format=torch.channels_last), TYPES[PRECISION]

        def plain() -> int:
            with learn.no_bar(), learn.no_logging():
                for path in paths[:PLAIN]:
                    learn.predict(path)
            return PLAIN

        def ours(model=model) -> int:
            return len(predict(paths, model, batch_size=BATCH))

        def limit() -> int:
            with torch.inference_mode(), autocast():
                for _ in range(IMAGES // BATCH):
                    raw(x)
            now()
            return IMAGES // BATCH * BATCH

        def further() -> int:
            with torch.inference_mode():
                for _ in range(IMAGES // BATCH):
                    folded(x.to(kind))
            now()
            return IMAGES // BATCH * BATCH

        ways = {
            "loop of learn.predict": plain,
            f"xray-fastai, {model.precision}": ours,
            "xray-fastai, fp32": lambda: ours(exact),
            f"limit: forward, {PRECISION}": limit,
            "limit, batch norm folded": further,
        }
        show("", rates(ways, REPEATS), "images/s", ("loop of learn.predict", f"limit: forward, {PRECISION}"))


if __name__ == "__main__":
    main()
