"""Checks in long runs that memory does not grow and that no row is missing.

    python -m tests.benchmarks.soak

20 fits run one after another in one process. Then `xray-fastai predict` reads 50,000 files: links to a few hundred
drawn X-rays, of which one in a hundred is broken. Memory is the resident set of the process (Linux: /proc/self/statm).
"""

import contextlib
import csv
import io
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.measuring import whole_number
from xray_fastai import fit
from xray_fastai.data.sources import phantom

# -----------------------------------------------------------------------------
FILES = whole_number("FILES", 50000)
FITS = whole_number("FITS", 20)
SETTINGS = {"arch": "resnet18", "size": 32, "epochs": 1, "device": "cpu", "workers": 0, "weights": "none"}
# -----------------------------------------------------------------------------


def resident() -> float:
    """Return the resident set of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def predict_many(export: Path, images: list[Path], folder: Path, count: int) -> float:
    """Run `predict` over `count` links, check its rows, and return its largest resident set in MB."""
    many = folder / str(count)
    many.mkdir()
    broken = folder / "broken.jpeg"
    broken.write_bytes(images[0].read_bytes()[:300])
    for i in range(count):
        (many / f"{i:06}.jpeg").symlink_to(broken if i % 100 == 99 else images[i % len(images)])
    rows = folder / f"{count}.csv"
    command = ["predict", str(many), "--model", str(export), "--output", str(rows)]
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "xray_fastai", *command], stdout=subprocess.DEVNULL)
    peak = 0.0
    while child.poll() is None:  # ru_maxrss would include this process, from which the child was forked
        with contextlib.suppress(OSError, IndexError):
            status = Path(f"/proc/{child.pid}/status").read_text()
            peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) / 1e3)
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    with rows.open(newline="") as stream:
        written = list(csv.DictReader(stream))
    bad = sum(bool(row["error"]) for row in written)
    print(
        f"predict {count:>7,} files: {len(written):,} rows, {bad:,} of them errors, exit code "
        f"{child.returncode}, {peak:.0f} MB maximum, {count / seconds:.0f} files/s",
        flush=True,
    )
    assert len(written) == count and bad == count // 100
    return peak


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(phantom.cached(), folder / "data")
        memory = []
        for i in range(FITS):
            with contextlib.redirect_stdout(io.StringIO()):
                export = fit(
                    **SETTINGS, data=str(folder / "data"), exports=str(folder / "exports"), name=f"fit-{i}"
                ).path
            memory.append(resident())
            print(f"fit {i + 1:>3}: {memory[-1]:.0f} MB", flush=True)
        print(f"fits: {memory[-1] - memory[min(4, FITS - 1)]:+.0f} MB from the fifth to the last")
        images = sorted((folder / "data").rglob("*.png")) or sorted((folder / "data").rglob("*.jp*g"))
        few, many = (predict_many(export, images[:300], folder, count) for count in (1000, FILES))
        print(f"predict: {many - few:+.0f} MB for {FILES:,} files against 1,000")


if __name__ == "__main__":
    main()
