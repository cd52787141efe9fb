"""How long until something happens: `--help`, `--version`, a usage error, and a fit's first batch.

    XRAY_DATA=chest_xray python -m tests.benchmarks.start

For the first three the yardstick is `import fastai.vision.all`, the limit `import typer`. (To refuse an option takes
typer itself longer: since 0.29 it has pydantic read them. So there is a row of typer alone.) For the fit the limit is
to import torch and fastai and to decode each file once, at JPEG's reduced scale, on all cores, as `fit` has to in order
to name the first that is broken. Seconds of whole processes.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# -----------------------------------------------------------------------------
IMAGES = int(os.environ.get("IMAGES", "512"))
ARCH = os.environ.get("ARCH", "resnet50")
SIZE = os.environ.get("SIZE", "224")
REPEATS = int(os.environ.get("REPEATS", "5"))
# -----------------------------------------------------------------------------

TYPER_ALONE = """
import sys, typer
app = typer.Typer(rich_markup_mode=None, add_completion=False)
@app.command()
def fit(epochs: int = 1): ...
app(sys.argv[1:])
"""
FIRST_BATCH = """
import os, sys
import xray_fastai.training.fit as training
from xray_fastai.cli.main import app
train_phase = training._train_phase
def until_the_first_batch(learn, plan, name, epochs, callbacks, *others):
    from fastai.vision.all import Callback
    class Leave(Callback):
        def before_batch(self):
            os._exit(0)
    train_phase(learn, plan, name, epochs, [*callbacks, Leave()], *others)
training._train_phase = until_the_first_batch
app(sys.argv[1:])
"""
READING = """
import os, sys
import torch, fastai.vision.all
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from PIL import Image
def decode(path):
    with Image.open(path) as image:
        image.draft("L", (112, 112))
        image.load()
with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    list(pool.map(decode, [path for path in Path(sys.argv[1]).rglob("*") if path.is_file()]))
"""


def seconds(*command: str, code: int = 0) -> float:
    start = time.perf_counter()
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    taken = time.perf_counter() - start
    assert result.returncode == code, result.stderr
    return taken


def main() -> None:
    from tests.benchmarks.measuring import about_the_machine, median, rounds, some_images

    print(f"{IMAGES} images, {ARCH}, {SIZE} px; {about_the_machine()}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = some_images(folder / "data", IMAGES - 8, 8)
        options = ["--data", data, "--valid", "folder", "--arch", ARCH, "--size", SIZE, "--weights", "none"]
        ours = ["-m", "xray_fastai"]
        commands = {
            "import fastai.vision.all": (["-c", "import fastai.vision.all"], 0),
            "import typer": (["-c", "import typer"], 0),
            "--help": ([*ours, "--help"], 0),
            "--version": ([*ours, "--version"], 0),
            "typer alone: --epochs x": (["-c", TYPER_ALONE, "--epochs", "x"], 2),
            "fit --epochs x": ([*ours, "fit", "--epochs", "x"], 2),
            "torch, fastai, decoding": (["-c", READING, data], 0),
            "fit: first batch": (["-c", FIRST_BATCH, "fit", *options, "--exports"], 0),
        }
        times = {name: [] for name in commands}
        for i in rounds(REPEATS):
            for name, (command, code) in commands.items():
                own = [folder / f"exports-{i}"] if name == "fit: first batch" else []
                times[name].append(seconds(*command, *own, code=code))
    found = {name: median(values) for name, values in times.items()}
    print(f"\nmedians of {REPEATS}\n{'':<26}{'seconds':>9}{'it / limit':>12}")
    for name, value in found.items():
        limit = found["torch, fastai, decoding" if "batch" in name or "decoding" in name else "import typer"]
        print(f"{name:<26}{value:>9.2f}{value / limit:>12.2f}")


if __name__ == "__main__":
    main()
