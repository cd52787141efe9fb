"""Several processes: they train and predict as one does, only the first writes and prints, and they end together."""

import os
import re
import signal
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pandas as pd
import pytest
import torch
import torchvision

from tests.conftest import QUICK, draw_collection, settings_of
from tests.forked import ROOT, Forked, with_tests
from tests.small_network import NAME as SMALL

pytest.importorskip("accelerate")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")]

BATCH = "xray_fastai.training.stopping:StopOnNonFiniteLoss.after_batch"  # five an epoch, two of validation
LOSS = "xray_fastai.model.learner:CalibratedCrossEntropy.__call__"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, whose number is not a multiple of the batch size, and weights for the small network."""
    place = tmp_path_factory.mktemp("distributed")
    draw_collection(place / "data", {"train/NORMAL": 10, "train/PNEUMONIA": 16, "val/NORMAL": 6, "val/PNEUMONIA": 5})
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(SMALL).state_dict(), place / "weights.pth")
    return place


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def torchrun(*args) -> str:
    """Standard output of the command in two processes."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.small_network"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *map(str, args)], env=with_tests(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FIT = ["fit", "--data", "data", "--valid", "folder", "--weights", "weights.pth", *QUICK]


@pytest.fixture(scope="module")
def exports(place, run, ranks):
    """The same fit in one process and in two; augmentation and dropout are off, as they differ by process."""
    before = Path.cwd()
    os.chdir(place)
    try:
        fit = [*FIT, "--augment", "none", "--dropout", "0", "--precision", "fp32", "--lr", "3e-4"]
        fit += ["--freeze-epochs", "1", "--epochs", "1"]
        result = run(*fit, "--name", "one")
        assert result.exit_code == 0, result.output
        output = ranks(0, *fit, "--name", "two")
    finally:
        os.chdir(before)
    return result.stdout, output


def test_two_processes_train_as_one(exports, there):
    """Both phases agree, also in batch norm, with unequal class weights and a last batch of three."""
    one, two = (pd.read_csv(f"exports/{name}/history.csv") for name in ("one", "two"))
    assert one.phase.tolist() == ["frozen", "unfrozen"]
    pd.testing.assert_frame_equal(two, one, rtol=1e-4, atol=1e-5)
    models = [settings_of(Path("exports") / name) for name in ("one", "two")]
    for model in models:
        del model["data"]["contents"]  # each export has a salt of its own
    for key in ("class_weights", "data", "status", "architecture"):
        assert models[1][key] == models[0][key]
    weights = [
        torch.cat([p.flatten() for p in _load(name).model.state_dict().values() if p.dtype == torch.float32])
        for name in ("one", "two")
    ]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def test_only_the_first_process_writes_and_prints(exports, there):
    one, two = exports
    assert two.count("export: exports/two\n") == 1
    new_lines = set(two.splitlines()) - set(one.splitlines())
    assert "processes     2, 4 images each of a batch of 8" in new_lines
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


class Ranks(Forked):
    """Runs commands in two forked processes (`forked_ranks.py`)."""

    def __call__(self, code: int, *args, **wrong) -> str:
        """Check the exit codes, and return what both printed.

        The code of the second may come from the SIGTERM that it got when the first had ended.
        """
        result = super().__call__(args=list(map(str, args)), **wrong)
        first, other = result["codes"]
        assert first == code and bool(other) == bool(code), result
        return result["output"]


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks("tests.training.forked_ranks")
    yield ranks
    ranks.close()


def errors(output: str) -> list[str]:
    assert "Traceback" not in output and "unexpected" not in output, output
    return [line for line in output.splitlines() if line.startswith("Error")]


def test_two_processes_find_the_rate_of_one(there, run, ranks):
    fit = [*FIT, "--augment", "none", "--dropout", "0", "--precision", "fp32", "--lr", "find"]
    fit += ["--freeze-epochs", "0", "--epochs", "1"]
    one, two = run(*fit, "--name", "found-one").stdout, ranks(0, *fit, "--name", "found-two")
    (line,) = re.findall(r"^learning rate  found .*$", one, re.M)
    assert two.count(line) == 1
    histories = [pd.read_csv(f"exports/found-{name}/history.csv") for name in ("one", "two")]
    pd.testing.assert_frame_equal(*histories, rtol=1e-3, atol=1e-4)


def test_two_processes_predict_what_one_does(exports, there, run, ranks):
    """The file is the same byte for byte, also when two processes resume what another run left."""
    (there / "data" / "val" / "NORMAL" / "broken.jpeg").write_bytes(b"no image")
    predict = ["predict", "data", "--recursive", "--model", "exports/one", "--batch-size", "3", "--device", "cpu"]
    result = run(*predict, "--output", "one.csv")
    assert result.exit_code == 3, result.output
    whole = Path("one.csv").read_bytes()
    Path("two.csv").write_bytes(whole[: len(whole) // 4])
    output = ranks(3, *predict, "--output", "two.csv", "--resume")
    assert Path("two.csv").read_bytes() == whole
    assert re.findall(r"^predicted +(\d+) files", output, re.M) == [str(38 - whole[: len(whole) // 4].count(b"\n") + 1)]
    assert len(errors(output)) == 1
    assert output.count("written       two.csv, 38 rows") == 1
    (there / "data" / "val" / "NORMAL" / "broken.jpeg").unlink()


def test_torchrun_starts_two_processes(exports, there, run):
    predict = ["predict", "data", "--recursive", "--model", "exports/one", "--batch-size", "3", "--device", "cpu"]
    output = torchrun(*predict, "--output", "launched.csv")
    assert output.count("written       launched.csv, 37 rows") == 1
    assert run(*predict, "--output", "alone.csv").exit_code == 0
    assert Path("launched.csv").read_bytes() == Path("alone.csv").read_bytes()


def test_a_killed_and_resumed_fit_gives_the_result_of_an_uninterrupted_one(ranks, there):
    """With augmentation and dropout, which are random in each process."""
    fit = [*FIT, "--freeze-epochs", 2, "--epochs", 1]
    ranks(0, *fit, "--name", "whole")
    output = ranks(1, *fit, "--name", "killed", rank=1, do="kill", at=f"{BATCH}@8")
    (line,) = errors(output)
    assert "another of the 2 processes ended" in line and "'xray-fastai fit --resume killed'" in line
    output = ranks(0, "fit", "--resume", "killed")
    assert "resuming      killed after frozen epoch 1" in output
    for name in ("history.csv", "model.safetensors"):
        assert Path("exports/killed", name).read_bytes() == Path("exports/whole", name).read_bytes()


def test_two_processes_train_several_networks_as_one_does(ranks, there, run):
    """Also if one is killed in the second network, and they resume."""
    fit = ["fit", "--data", "data", "--weights", "weights.pth", *QUICK, "--members", 2, "--augment", "none"]
    fit += ["--dropout", "0", "--precision", "fp32", "--lr", "3e-4", "--freeze-epochs", "1", "--epochs", "1"]
    assert run(*fit, "--name", "pair-one").exit_code == 0
    output = ranks(0, *fit, "--name", "pair")
    assert len(re.findall(r"^member \d of 2: ", output, re.M)) == 4  # at the start and at the end of each
    one, two = (pd.read_csv(f"exports/{name}/history.csv") for name in ("pair-one", "pair"))
    assert two.member.tolist() == [1, 1, 2, 2]
    pd.testing.assert_frame_equal(two, one, rtol=1e-3, atol=1e-4)
    one, two = (pd.read_csv(f"exports/{name}/out_of_fold.csv") for name in ("pair-one", "pair"))
    pd.testing.assert_frame_equal(two, one, rtol=1e-2, atol=1e-3)
    output = ranks(1, *fit, "--name", "pair-killed", rank=1, do="kill", at=f"{BATCH}@18")
    assert "'xray-fastai fit --resume pair-killed'" in output
    output = ranks(0, "fit", "--resume", "pair-killed")
    assert "resuming      pair-killed with 1 of 2 networks done" in output
    for name in ("history.csv", "model.safetensors", "out_of_fold.csv"):
        assert Path("exports/pair-killed", name).read_bytes() == Path("exports/pair", name).read_bytes()


def test_a_signal_to_one_process_stops_all_at_the_same_batch(ranks, there, run):
    """The first process writes one export, which one process can resume."""
    fit = [*FIT, "--freeze-epochs", 1, "--epochs", 1, "--name", "stopped"]
    output = ranks(143, *fit, rank=1, do="terminate", at=f"{BATCH}@7")
    assert output.count("Stopping after this batch") == 1 and output.count("Interrupted: ") == 1
    assert output.count("export: exports/stopped\n") == 1 and not errors(output)
    assert settings_of(Path("exports/stopped"))["status"] == "interrupted"
    result = run("fit", "--resume", "stopped")
    assert result.exit_code == 0, result.output
    assert "resuming      stopped after the frozen phase, as stopped-2" in result.stdout


def test_an_error_in_one_process_is_printed_once_and_ends_all(ranks, there):
    fit = [*FIT, "--freeze-epochs", 2, "--name", "starved"]
    output = ranks(1, *fit, rank=1, do="starve", at=f"{LOSS}@3", max_images=2)
    (line,) = errors(output)
    assert "--batch-size 8: out of memory on cpu, with 4 images in a batch of each of 2 processes" in line
    assert line.endswith("]") and "[process 2 of 2, on " in line
    assert not list(Path("exports").glob(".starved*")) and not Path("exports/starved").exists()
    output = ranks(1, "fit", "--data", "nowhere")
    (line,) = errors(output)
    assert line.startswith("Error: --data nowhere: no such folder") and "process" not in line
    output = ranks(2, "fit", "--epochs", "many")
    assert output.count("Error: --epochs many: give a whole number") == 1


@pytest.fixture
def launched(monkeypatch):
    """This process is the first of three."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_a_command_for_one_process_is_refused(launched, run, refused, monkeypatch):
    refused(run("evaluate"), "evaluate: runs in one process", "without torchrun")


def test_without_accelerate_the_message_names_the_command_to_install_it(launched, run, refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(run("fit"), 'pip install "xray-fastai[distributed]"')


def test_a_batch_that_cannot_be_shared_is_refused(launched):
    from xray_fastai.system.distributed import batch_size
    from xray_fastai.system.errors import UserError

    assert batch_size(9, 100) == 9 and batch_size(9, 8) == 6
    with pytest.raises(UserError, match=r"^batch_size 80: cannot be shared evenly by 3 processes; give 78 or 81$"):
        batch_size(80, 100)
    with pytest.raises(UserError, match=r"^2 images to train on are too few for 3 processes"):
        batch_size(9, 2)


GLOO = """
import os, signal, time
from datetime import timedelta
import torch
import torch.distributed as dist
from xray_fastai.system.distributed import _lost_process

os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if os.fork() else "1"
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
impatient = dist.new_group(timeout=timedelta(seconds=0.5))
if os.environ["RANK"] == "1":
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)
for group in (impatient, dist.group.WORLD):
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        print(type(error).__name__, _lost_process(error))
"""


def test_gloo_errors_are_recognised():
    """gloo raises plain RuntimeErrors: `_lost_process` needs no text where torch raises DistError instead.

    The other process is silent at first, for longer than the first group waits, and then ends.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", GLOO]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, env=environment, timeout=120)
    silent, killed = re.findall("^RuntimeError (another of the 2 processes .*)", done.stdout, re.M)
    assert re.match(r"another of the 2 processes ended, or was silent for 3 hours, .*\(Timed out waiting", silent)
    assert re.match(r"another of the 2 processes ended, or cannot be reached; see .*\(.*by peer", killed)


def test_other_errors_are_not_taken_for_a_lost_process(launched):
    from xray_fastai.system.distributed import _lost_process

    assert "can only be" in str(_lost_process(torch.distributed.DistBackendError("can only be NCCL")))
    assert _lost_process(RuntimeError("shapes do not match, as in gloo")) is None
    assert _lost_process(ValueError("[/gloo/x.cc:1] no")) is None


def test_the_others_wait_for_the_first_to_print_an_error(launched, monkeypatch, capsys):
    from xray_fastai.system import distributed

    monkeypatch.setattr(distributed, "_store", None)
    monkeypatch.setattr(distributed, "MAX_WAIT", 0.2)
    monkeypatch.setenv("RANK", "1")
    assert distributed._is_claimed() is False
    monkeypatch.setenv("RANK", "0")
    distributed.tell("Error: one")
    monkeypatch.setenv("RANK", "1")
    distributed.tell("Error: two")
    assert capsys.readouterr().err == "Error: one\n"
    assert distributed._is_claimed() is True


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
        assert all(batches)  # no empty batch, which a network refuses
        parts.append([batch[: loader.shares(i)[rank]] for i, batch in enumerate(batches)])
    assert [list(chain.from_iterable(batch)) for batch in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("answer", [True, False])
def test_gpus_reach_each_other_if_accelerate_says_so(answer, monkeypatch):
    from xray_fastai.training.data_parallel import gpus_reach_each_other

    monkeypatch.setattr("accelerate.utils.check_cuda_p2p_ib_support", lambda: answer)
    assert gpus_reach_each_other() is answer


def test_without_accelerates_undocumented_function_gpus_copy_through_memory(monkeypatch):
    from xray_fastai.training.data_parallel import gpus_reach_each_other

    monkeypatch.delattr("accelerate.utils.check_cuda_p2p_ib_support")
    with pytest.warns(UserWarning, match="slower: accelerate raises ImportError"):
        assert not gpus_reach_each_other()
