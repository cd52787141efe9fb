"""What the tests share: a small collection, the command line, one small export, and the real images where they are."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner

from tests import small_network
from tests.forked import Forked, with_tests
from xray_fastai.data.sources import phantom

small_network.allow()  # before modules are imported that read the table of architectures
from xray_fastai.cli import app  # noqa: E402

# torch comes later: tests run side by side, one process a core, and torch's threads would get into each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")

# where the tests themselves are a background job, Ctrl-C is ignored, and so it would be in the commands they start
signal.signal(signal.SIGINT, signal.default_int_handler)

# without loading processes
QUICK = ["--arch", small_network.NAME, "--size", "32", "--batch-size", "8", "--workers", "0", "--device", "cpu"]
RESNET18 = ["--arch", "resnet18", *QUICK[2:]]


def pytest_collection_modifyitems(items):
    """Mark what needs a running server, a process of its own, as slow."""
    for item in items:
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Leave what was imported out of later garbage collections: each would take half a second; a fit ends with one."""
    if "torch" in sys.modules:
        small_network.register()
    gc.collect()
    gc.freeze()


def common_folder(tmp_path_factory) -> Path:
    """Return a folder of this run of the tests that all of its processes share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """Fill a folder in the first process that needs it, and return a copy of it for this one."""
    folder = common_folder(tmp_path_factory) / f"made-{name}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            partial.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(common_folder(tmp_path_factory) / "cache"))  # not the user's
                make(partial)
            partial.rename(folder)
    return Path(shutil.copytree(folder, tmp_path_factory.mktemp(name) / name))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Each test starts in an empty folder, with caches of its own that it shares with the others."""
    cache = common_folder(tmp_path_factory) / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    torch_home, cwd = tmp_path_factory.mktemp("torch"), tmp_path_factory.mktemp("cwd")
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    monkeypatch.chdir(cwd)
    yield
    for folder in (torch_home, cwd):  # an export is 90 MB, and there are hundreds of tests
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def empty_curves(request, monkeypatch):
    """Leave the learning curves of fits and reports empty, where no test looks at them: they take a second of each."""
    drawing = sys.modules.get("xray_fastai.evaluation.learning_curves")  # not imported for this alone
    if drawing is not None and request.node.get_closest_marker("curves") is None:
        monkeypatch.setattr(drawing, "_draw_curves", lambda axes, *_: axes.remove())


@pytest.fixture(scope="session")
def run():
    """Run the command line in this process."""
    small_network.register()
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args], prog_name="xray-fastai")


@pytest.fixture(scope="session")
def start():
    """Start the command line in a process of its own."""

    def start(*args, env=None, **kwargs):
        module = "xray_fastai" if args[0] in ("data", "--version") else "tests.small_network"
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, args)], env=with_tests() | (env or {}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs,
        )  # fmt: skip

    return start


@pytest.fixture(scope="session")
def forked():
    """Run fits and commands in processes of their own, which need not import anything (`forked.py`)."""
    if not hasattr(os, "fork"):
        pytest.skip("children are forked")
    forked = Forked("tests.forked")
    yield forked
    forked.close()


@pytest.fixture(scope="session")
def refused():
    """Check that a command was refused in one line with these words, by exit code 1, or `code` (None: 1 or 2)."""

    def refused(result, *words, code=1):
        assert result.exit_code in ((1, 2) if code is None else (code,)), result.output
        assert "Traceback" not in result.output and "unexpected" not in result.output
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("Error: ")
        for word in words:
            assert str(word) in line, line

    return refused


def draw_collection(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Noise around a disc, dark or bright by class: what a network learns at once. `counts` is by "split/CLASS"."""
    rng = np.random.default_rng(seed)
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pixels = rng.normal(110, 25, (48, 40))
            pixels[16:32, 12:28] += 60 if folder.endswith("PNEUMONIA") else -60
            name = f"{'person' if folder.endswith('PNEUMONIA') else 'IM-'}{folder.split('/')[0]}{i}.jpeg"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / folder / name, quality=90)
    return root


@pytest.fixture
def collection(tmp_path):
    """Forty images to train on; `val` is too small to be used alone."""
    counts = {"train/NORMAL": 16, "train/PNEUMONIA": 24, "val/NORMAL": 2, "val/PNEUMONIA": 2}
    return draw_collection(tmp_path / "data", counts)


@pytest.fixture(scope="session")
def export(tmp_path_factory, run):
    """An export of a two-epoch fit on the small collection, whose folder is gone; its rate leaves it in some doubt."""
    return made_export(tmp_path_factory, run, QUICK, "2e-3")


@pytest.fixture(scope="session")
def ensemble(tmp_path_factory, export):
    """An export of three networks, the first of which is that of `export`."""
    from tests.ensembles import joined

    return joined(export, tmp_path_factory.mktemp("ensemble") / "three")


@pytest.fixture(scope="session")
def resnet18_export(tmp_path_factory, run):
    """The same with a network that every process knows."""
    return made_export(tmp_path_factory, run, RESNET18, "2e-4")


def made_export(tmp_path_factory, run, options: list[str], rate: str) -> Path:
    def make(root: Path) -> None:
        data = draw_collection(root / "data", {"train/NORMAL": 16, "train/PNEUMONIA": 24})
        result = run(
            "fit", "--data", data, *options, "--weights", "none", "--epochs", 2, "--lr", rate, "--exports", root,
            "--name", "small"
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        data.rename(root / "moved")

    return made_once(tmp_path_factory, options[1], make) / "small"


@pytest.fixture(scope="session")
def an_image(export):
    return sorted((export.parent / "moved" / "train" / "PNEUMONIA").iterdir())[0]


@pytest.fixture
def few_drawings(tmp_path, monkeypatch):
    """The X-rays that the package draws where no data is given: 60 instead of 510, in a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(phantom, "write", partial(phantom.write, images=60))


@pytest.fixture(scope="session")
def real_images():
    """The real collection's folder, where XRAY_DATA names it."""
    folder = os.environ.get("XRAY_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("the real images are not here (set XRAY_DATA to their chest_xray folder)")
    return Path(folder)


def wait_for(condition, process=None, seconds=60):
    """What the condition gives, as soon as it is true; a failure where the process ends before, or time is up."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)
    return found


def settings_of(export: Path) -> dict:
    return json.loads((export / "model.json").read_text())
