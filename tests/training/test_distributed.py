"""Several processes: they train and predict what one would, one of them writes and speaks, and they end together."""

import json
import os
import re
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pandas as pd
import pytest
import torch
import torchvision

from tests.conftest import QUICK, draw_collection, settings_of

pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

ROOT = Path(__file__).parents[2]
BATCH = "xray_fastai.training.callbacks:StopOnNonFiniteLoss.after_batch"  # five an epoch, the last two in validation
LOSS = "xray_fastai.model.learner:CalibratedCrossEntropy.__call__"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, of which no split makes whole batches, and weights for ResNet18."""
    place = tmp_path_factory.mktemp("distributed")
    draw_collection(place / "data", {"train/NORMAL": 10, "train/PNEUMONIA": 16, "val/NORMAL": 6, "val/PNEUMONIA": 5})
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), place / "r18.pth")
    return place


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def torchrun(*args) -> str:
    """Standard output of the command in two processes."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "xray_fastai", *map(str, args)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FIT = ["fit", "--data", "data", "--valid", "folder", "--weights", "r18.pth", *QUICK]


@pytest.fixture(scope="module")
def exports(place, run):
    """The same fit in one process and in two; augmentation and dropout are off, as they differ by process."""
    before = Path.cwd()
    os.chdir(place)
    try:
        fit = [*FIT, "--augment", "none", "--dropout", "0", "--precision", "fp32", "--lr", "3e-4"]
        fit += ["--freeze-epochs", "1", "--epochs", "1"]
        result = run(*fit, "--name", "one")
        assert result.exit_code == 0, result.output
        told = torchrun(*fit, "--name", "two")
    finally:
        os.chdir(before)
    return result.stdout, told


def test_two_processes_train_as_one(exports, there):
    """Both phases, batch norm included: frozen and trained, with unequal class weights and a last batch of three."""
    one, two = (pd.read_csv(f"exports/{name}/history.csv") for name in ("one", "two"))
    assert one.phase.tolist() == ["frozen", "unfrozen"]
    pd.testing.assert_frame_equal(two, one, rtol=1e-4, atol=1e-5)
    models = [settings_of(Path("exports") / name) for name in ("one", "two")]
    for key in ("class_weights", "data", "status", "architecture"):
        assert models[1][key] == models[0][key]
    weights = [
        torch.cat([p.flatten() for p in _load(name).model.state_dict().values() if p.dtype == torch.float32])
        for name in ("one", "two")
    ]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def test_one_process_writes_and_speaks(exports, there):
    one, two = exports
    assert two.count("export: exports/two\n") == 1
    news = set(two.splitlines()) - set(one.splitlines())
    assert "processes     2, 4 images each of a batch of 8" in news
    assert sorted(p.name for p in Path("exports").iterdir() if p.name in (".two.lock", ".two.partial", "two")) == [
        "two"
    ]
    files = [sorted(path.name for path in Path("exports", name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]
    assert "2 processes" in settings_of(Path("exports/two"))["training"]["device"]


def test_the_pickle_holds_plain_batch_norm(exports, there):
    from fastai.vision.all import load_learner

    modules = {type(module) for module in load_learner("exports/two/learner.pkl").model.modules()}
    assert torch.nn.BatchNorm2d in modules and not any("Sync" in module.__name__ for module in modules)


def _load(name: str):
    from xray_fastai import load_learner

    return load_learner(Path("exports") / name)


class Ranks:
    """Runs commands in two forked processes (`forked_ranks.py`)."""

    def __init__(self, place: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forked_ranks"], cwd=place, text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __call__(self, code: int, *args, **wrong) -> str:
        """What both wrote on the terminal. The exit code of the first is checked; that of the other may also be of the
        SIGTERM that came when the first had ended."""
        print(json.dumps({"args": list(map(str, args))} | wrong), file=self.process.stdin, flush=True)
        result = json.loads(self.process.stdout.readline())
        first, other = result["codes"]
        assert first == code and bool(other) == bool(code), result
        return result["output"]


@pytest.fixture(scope="module")
def ranks(place):
    ranks = Ranks(place)
    yield ranks
    ranks.process.stdin.close()
    assert ranks.process.wait(60) == 0


def errors(output: str) -> list[str]:
    assert "Traceback" not in output and "unexpected" not in output, output
    return [line for line in output.splitlines() if line.startswith("Error")]


def test_two_processes_predict_what_one_does(exports, there, run, ranks):
    """Byte for byte; on from where another was cut short, in any number of processes."""
    (there / "data" / "val" / "NORMAL" / "broken.jpeg").write_bytes(b"no image")
    predict = ["predict", "data", "--recursive", "--model", "exports/one", "--batch-size", "3", "--device", "cpu"]
    result = run(*predict, "--output", "one.csv")
    assert result.exit_code == 1, result.output
    whole = Path("one.csv").read_bytes()
    Path("two.csv").write_bytes(whole[: len(whole) // 4])
    told = ranks(1, *predict, "--output", "two.csv", "--resume")
    assert Path("two.csv").read_bytes() == whole
    assert re.findall(r"^predicted +(\d+) files", told, re.M) == [str(38 - whole[: len(whole) // 4].count(b"\n") + 1)]
    assert len(errors(told)) == 1
    assert told.count("written       two.csv, 38 rows") == 1
    (there / "data" / "val" / "NORMAL" / "broken.jpeg").unlink()


def test_killed_and_gone_on_with_it_is_as_if_nothing_had_been(ranks, there):
    """With what is random in each process: augmentation and dropout."""
    fit = [*FIT, "--freeze-epochs", 2, "--epochs", 1]
    ranks(0, *fit, "--name", "whole")
    told = ranks(1, *fit, "--name", "killed", rank=1, do="kill", at=f"{BATCH}@8")
    (line,) = errors(told)
    assert "another of the 2 processes ended" in line and "resume it by 'xray-fastai fit --resume killed'" in line
    told = ranks(0, "fit", "--resume", "killed")
    assert "going on      with killed after frozen epoch 1" in told
    for name in ("history.csv", "model.safetensors"):
        assert Path("exports/killed", name).read_bytes() == Path("exports/whole", name).read_bytes()


def test_a_signal_to_one_process_stops_all_at_the_same_batch(ranks, there, run):
    """One export, that of the first process; one process can go on with it."""
    fit = [*FIT, "--freeze-epochs", 1, "--epochs", 1, "--name", "stopped"]
    told = ranks(143, *fit, rank=1, do="terminate", at=f"{BATCH}@7")
    assert told.count("Stopping after this batch") == 1 and told.count("Interrupted: ") == 1
    assert told.count("export: exports/stopped\n") == 1 and not errors(told)
    assert settings_of(Path("exports/stopped"))["status"] == "interrupted"
    result = run("fit", "--resume", "stopped")
    assert result.exit_code == 0, result.output
    assert "going on      with stopped after the frozen phase, as stopped-2" in result.stdout


def test_an_error_in_one_process_is_told_once_and_ends_all(ranks, there):
    fit = [*FIT, "--freeze-epochs", 2, "--name", "starved"]
    told = ranks(1, *fit, rank=1, do="starve", at=f"{LOSS}@3", most=2)
    (line,) = errors(told)
    assert "--batch-size 8: out of memory on cpu, with 4 images at once in each of 2 processes" in line
    assert line.endswith("]") and "[process 2 of 2, on " in line
    assert not list(Path("exports").glob(".starved*")) and not Path("exports/starved").exists()
    told = ranks(1, "fit", "--data", "nowhere")
    (line,) = errors(told)
    assert line.startswith("Error: --data nowhere: no such folder") and "process" not in line
    told = ranks(2, "fit", "--epochs", "many")
    assert told.count("Error: Invalid value for '--epochs'") == 1


@pytest.fixture
def launched(monkeypatch):
    """This process is the first of three."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_what_several_processes_can_not_do_is_told(launched, run, refused, monkeypatch):
    refused(run("evaluate"), "evaluate: runs in one process", "without torchrun")


def test_without_accelerate_the_command_to_install_it_is_told(launched, run, refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(run("fit"), 'pip install "xray-fastai[distributed]"')


def test_a_batch_that_can_not_be_shared_is_told(launched):
    from xray_fastai.system.distributed import batch_size
    from xray_fastai.system.errors import UserError

    assert batch_size(9, 100) == 9 and batch_size(9, 8) == 6
    with pytest.raises(UserError, match=r"^--batch-size 80: can't be shared evenly by 3 processes; give 78 or 81$"):
        batch_size(80, 100)
    with pytest.raises(UserError, match=r"^2 images to train on are too few for 3 processes"):
        batch_size(9, 2)


def test_variables_of_another_program_change_nothing(monkeypatch):
    from xray_fastai.system import distributed

    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert (distributed.world_size(), distributed.rank()) == (1, 0)


@pytest.mark.parametrize("images", [1, 2, 5, 6, 7, 13])
@pytest.mark.parametrize("drop_last", [False, True])
def test_each_image_of_each_batch_goes_to_one_process(images, drop_last, monkeypatch, launched):
    from fastai.vision.all import DataLoader

    from xray_fastai.training import data_parallel

    monkeypatch.setattr(data_parallel, "share", lambda value: value)
    items = torch.arange(images)
    whole = [batch.tolist() for batch in DataLoader(items, bs=6, drop_last=drop_last)]
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        loader = data_parallel.SharedLoader(DataLoader(items, bs=6, drop_last=drop_last))
        assert len(loader) == len(whole)
        batches = [batch.tolist() for batch in loader]
        assert all(batches)  # none is empty: a network takes none
        parts.append([batch[: loader.shares(i)[rank]] for i, batch in enumerate(batches)])
    assert [list(chain.from_iterable(batch)) for batch in zip(*parts, strict=True)] == whole
