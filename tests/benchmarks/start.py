"""Times the start of `--help`, `--version`, a usage error, and a fit up to its first batch.

    XRAY_DATA=chest_xray python -m tests.benchmarks.start

The first three are compared with `import fastai.vision.all`, and with `import typer` as the limit. (typer itself needs
longer to refuse an option, because since 0.29 pydantic reads the options; so there is a row for typer alone.) For the
fit the limit is to import torch and fastai and to decode each file once, at JPEG's reduced scale, on all cores: `fit`
has to do that to name the first broken file. Seconds of whole processes.
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
from xray_fastai import fit
from fastai.vision.all import Callback
class Leave(Callback):
    def before_batch(self):
        os._exit(0)
data, arch, size, exports = sys.argv[1:]
fit(data=data, valid="folder", arch=arch, size=int(size), weights="none", exports=exports, callbacks=[Leave()])
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
        ours = ["-m", "xray_fastai"]
        commands = {
            "import fastai.vision.all": (["-c", "import fastai.vision.all"], 0),
            "import typer": (["-c", "import typer"], 0),
            "--help": ([*ours, "--help"], 0),
            "--version": ([*ours, "--version"], 0),
            "typer alone: --epochs x": (["-c", TYPER_ALONE, "--epochs", "x"], 2),
            "fit --epochs x": ([*ours, "fit", "--epochs", "x"], 2),
            "torch, fastai, decoding": (["-c", READING, data], 0),
            "fit: first batch": (["-c", FIRST_BATCH, data, ARCH, SIZE], 0),
        }
        times = {name: [] for name in commands}
        for i in rounds(REPEATS):
            for name, (command, code) in commands.items():
                own = [folder / f"exports-{i}"] if name == "fit: first batch" else []
                times[name].append(seconds(*command, *own, code=code))
    medians = {name: median(values) for name, values in times.items()}
    print(f"\nmedians of {REPEATS}\n{'':<26}{'seconds':>9}{'it / limit':>12}")
    for name, value in medians.items():
        limit = medians["torch, fastai, decoding" if "batch" in name or "decoding" in name else "import typer"]
        print(f"{name:<26}{value:>9.2f}{value / limit:>12.2f}")


if __name__ == "__main__":
    main()
