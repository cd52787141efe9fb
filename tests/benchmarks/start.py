"""Times the start of commands, of a fit up to its first batch, of `predict` of one image, `verify` and `serve`.

    XRAY_DATA=chest_xray python -m tests.benchmarks.start

Seconds of whole processes, each beside its own limit:

    --help, --version, a wrong option   `import typer`. (typer itself needs longer to refuse an option, because since
                                        0.29 pydantic reads the options; so there is a row for typer alone.)
    fit up to its first batch           importing torch and fastai, and decoding each file once, at JPEG's reduced
                                        scale, on all cores: `fit` has to do that to name the first broken file
    predict, serve until it answers     `import torchvision`, which the class of the network comes from
    verify                              `import torch`: it reads tensors

CPU seconds (user and system, of the process and its children) stand beside them: they say more on a busy machine.
"""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

# -----------------------------------------------------------------------------
IMAGES = int(os.environ.get("IMAGES", "512"))
ARCH = os.environ.get("ARCH", "resnet50")
SIZE = os.environ.get("SIZE", "224")
REPEATS = int(os.environ.get("REPEATS", "5"))
ONLY = os.environ.get("ONLY", "").split()  # words in the names of the rows to measure, such as "predict verify"
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


def measured(*command: str, code: int = 0) -> tuple[float, float]:
    """Return the seconds of a process, and its CPU seconds with those of its children."""
    before, start = _cpu_of_children(), time.perf_counter()
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    taken = time.perf_counter() - start
    assert result.returncode == code, result.stderr
    return taken, _cpu_of_children() - before


def measured_server(*command: str) -> tuple[float, float]:
    """Return the seconds until a server has answered, and the CPU seconds until it has ended."""
    before, start = _cpu_of_children(), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-u", *map(str, command)], stdout=subprocess.PIPE, text=True)
    taken = None
    for line in process.stdout:
        if line.startswith("page"):
            urllib.request.urlopen(f"{line.split()[1]}/health").close()
            taken = time.perf_counter() - start
            process.send_signal(signal.SIGINT)
    process.wait()
    assert taken is not None, "the server ended before it was ready"
    return taken, _cpu_of_children() - before


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def rows(folder: Path, data: Path, export: Path) -> dict[str, tuple[list, int, str]]:
    """Return by name: the arguments of Python, the exit code, and the row that is its limit."""
    ours, image = ["-m", "xray_fastai"], next((data / "val").rglob("*.jpeg"))
    device = ["--device", "cpu"]  # CUDA's own start would hide what is compared
    return {
        "import typer": (["-c", "import typer"], 0, "import typer"),
        "import torch": (["-c", "import torch"], 0, "import torch"),
        "import torchvision": (["-c", "import torchvision"], 0, "import torchvision"),
        "import fastai.vision.all": (["-c", "import fastai.vision.all"], 0, "import torchvision"),
        "--help": ([*ours, "--help"], 0, "import typer"),
        "--version": ([*ours, "--version"], 0, "import typer"),
        "typer alone: --epochs x": (["-c", TYPER_ALONE, "--epochs", "x"], 2, "import typer"),
        "fit --epochs x": ([*ours, "fit", "--epochs", "x"], 2, "import typer"),
        "predict, one image": ([*ours, "predict", image, "--model", export, *device], 0, "import torchvision"),
        "verify": ([*ours, "verify", export], 0, "import torch"),
        "serve, ready": ([*ours, "serve", "--model", export, "--port", "0", *device], 0, "import torchvision"),
        "torch, fastai, decoding": (["-c", READING, data], 0, "torch, fastai, decoding"),
        "fit: first batch": (
            ["-c", FIRST_BATCH, data, ARCH, SIZE, folder / "exports"], 0, "torch, fastai, decoding",
        ),
    }  # fmt: skip


def main() -> None:
    from tests.benchmarks.measuring import about_the_machine, medians, rounds, some_images

    print(f"{IMAGES} images, {ARCH}, {SIZE} px; {about_the_machine()}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = some_images(folder / "data", IMAGES - 8, 8)
        export = small_export(folder)
        commands = rows(folder, data, export)
        if ONLY:
            wanted = {name for name in commands if any(word in name for word in ONLY)}
            wanted |= {commands[name][2] for name in wanted}
            commands = {name: row for name, row in commands.items() if name in wanted}
        times: dict[str, list] = {name: [] for name in commands}
        cpu: dict[str, list] = {name: [] for name in commands}
        for _ in rounds(REPEATS):
            for name, (command, code, _) in commands.items():
                is_server = name.startswith("serve")
                taken, used = measured_server(*command) if is_server else measured(*command, code=code)
                times[name].append(taken)
                cpu[name].append(used)
    seconds, cpu_seconds = medians(times), medians(cpu)
    print(f"\nmedians of {REPEATS}\n{'':<26}{'seconds':>9}{'it / limit':>12}{'CPU s':>9}{'it / limit':>12}  limit")
    for name, (_, _, limit) in commands.items():
        ratios = (seconds[name] / seconds[limit], cpu_seconds[name] / cpu_seconds[limit])
        print(
            f"{name:<26}{seconds[name]:>9.2f}{ratios[0]:>12.2f}{cpu_seconds[name]:>9.2f}{ratios[1]:>12.2f}  "
            f"{'' if name == limit else limit}"
        )


def small_export(folder: Path) -> Path:
    """Fit on a few images for one epoch; the weights do not matter, their number does."""
    import contextlib
    import io

    from tests.benchmarks.measuring import some_images
    from xray_fastai import fit

    data = some_images(folder / "some", 16, 8)
    with contextlib.redirect_stdout(io.StringIO()):
        return fit(
            data=str(data), valid="folder", arch=ARCH, size=int(SIZE), epochs=1, batch_size=8, weights="none",
            exports=str(folder / "model"), name="model",
        ).path  # fmt: skip


if __name__ == "__main__":
    main()
