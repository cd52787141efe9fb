"""What `xray-fastai fit` does, prints and writes."""

import csv
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from fastai.vision.all import Callback

from tests.conftest import QUICK, RESNET18, draw_collection, settings_of, wait_for
from tests.forked import members
from tests.small_network import NAME as SMALL
from tests.small_network import TORCHVISIONS
from xray_fastai import FitConfig, fit, load_learner
from xray_fastai.training.calibration import Calibration
from xray_fastai.training.callbacks import standard_error

HUB_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet50": "resnet50-11ad3fa6.pth",
}


def history_of(export):
    with (export / "history.csv").open() as stream:
        return list(csv.DictReader(stream))


def network(arch, seed=0):
    torch.manual_seed(seed)
    return torchvision.models.get_model(arch, weights=None)


def cached_weights(arch, tmp_path, monkeypatch):
    """Write random weights at the place of torchvision's in torch hub's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    state = network(arch).state_dict()
    torch.save(state, tmp_path / "hub" / "checkpoints" / HUB_FILES[arch])
    return state


@pytest.fixture
def weights(tmp_path):
    """A file of random weights, with which a fit has both phases."""
    torch.save(network(SMALL).state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.slow
@pytest.mark.curves
def test_a_fit_prints_its_choices_and_writes_a_complete_export(collection, run):
    result = run("fit", "--data", collection, *QUICK, "--weights", "none", "--epochs", 2, "--name", "first")
    assert result.exit_code == 0, result.output
    for words in (
        "36 images: 14 NORMAL, 22 PNEUMONIA",
        "held out of train/, by image, and val/, which is too small alone (4 images)",
        "no patient is known: each image counts as a patient of its own",
        "to detect: PNEUMONIA; for the other, give --positive NORMAL",
        "130 of 78,442 train in the frozen phase",
        "frozen phase  skipped",
        "export: exports/first",
    ):
        assert words in result.stdout, result.stdout
    rows = re.findall(r"^unfrozen +(\d)/2 +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +\d:\d\d(?: +0:00)?$", result.stdout, re.M)
    assert rows == ["1", "2"]
    export = Path("exports/first")
    assert sorted(file.name for file in export.iterdir()) == [
        "batch.png",
        "curves.png",
        "fit.log",
        "history.csv",
        "learner.pkl",
        "model.json",
        "model.safetensors",
        "report.html",
    ]
    assert [path.name for path in Path("exports").iterdir()] == ["first"]
    model = settings_of(export)
    assert model["status"] == "complete" and model["classes"] == ["NORMAL", "PNEUMONIA"]
    assert model["settings"]["epochs"] == 2 and model["settings"]["size"] == 32
    assert model["calibrated"] is False and model["calibration"].startswith("not calibrated: ")
    assert model["calibration_kind"] == "none" and model["intercepts"] is None
    assert len(history_of(export)) == 2


@pytest.mark.slow
@pytest.mark.curves
def test_frozen_then_unfrozen_from_weights_in_torch_hubs_cache(collection, run, tmp_path, monkeypatch):
    cached_weights("resnet18", tmp_path / "hub", monkeypatch)
    args = ["--batch-size", 18, "--weights", "imagenet", "--precision", "fp32", "--epochs", 1]
    result = run("fit", "--data", collection, *RESNET18, *args, "--freeze-epochs", 3, "--name", "both")
    assert result.exit_code == 0, result.output
    assert "resnet18-f37072fd.pth, cached" in result.stdout
    history = history_of(Path("exports/both"))
    assert [(row["phase"], row["epoch"]) for row in history] == [
        ("frozen", "1"),
        ("frozen", "2"),
        ("frozen", "3"),
        ("unfrozen", "1"),
    ]


@pytest.mark.slow
def test_pretrained_weights_without_a_frozen_phase(collection, run, weights):
    args = ["--weights", weights, "--epochs", 1, "--freeze-epochs", 0, "--name", "unfrozen"]
    result = run("fit", "--data", collection, *QUICK, *args)
    assert result.exit_code == 0, result.output
    assert {row["phase"] for row in history_of(Path("exports/unfrozen"))} == {"unfrozen"}


@pytest.mark.slow
def test_the_frozen_phase_does_not_change_the_backbone(collection, monkeypatch, tmp_path):
    """Neither its weights nor the statistics of batch norm; the head trains."""
    from fastai.vision.all import ProgressCallback

    from xray_fastai.data.dataset import check_files
    from xray_fastai.data.folders import read_split
    from xray_fastai.data.splits import assign_validation
    from xray_fastai.model.learner import build_learner, parameter_counts
    from xray_fastai.model.loaders import make_loaders
    from xray_fastai.training.callbacks import FrozenBody

    state = network("resnet50").state_dict()
    table = check_files(read_split(collection, "train"))[0]
    table = assign_validation(table, None, "0.2", 0)[0]
    dls = make_loaders(table, ["NORMAL", "PNEUMONIA"], 32, 8, torch.device("cpu"), 0)
    learn = build_learner(dls, "resnet50", pretrained=state)
    learn.remove_cb(ProgressCallback)
    assert parameter_counts(learn) == (23_512_130, 23_512_130)
    learn.freeze()
    assert parameter_counts(learn) == (23_512_130, 4_098)
    head = learn.model[1][-1].weight.detach().clone()
    with learn.no_logging():
        learn.fit(1, lr=1e-2, cbs=FrozenBody())
    assert not torch.equal(head, learn.model[1][-1].weight)
    body = list(learn.model[0].state_dict().values())
    expected = [tensor for name, tensor in state.items() if not name.startswith("fc.")]
    assert all(torch.equal(a, b) for a, b in zip(body, expected, strict=True))
    head = learn.model[1]
    assert isinstance(head[-2], torch.nn.Dropout) and head[-2].p == 0.5
    assert (head[-1].in_features, head[-1].out_features) == (2048, 2)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TORCHVISIONS)
def test_every_architecture_reads_torchvisions_weights_and_its_export_loads(arch, run, tmp_path):
    data = draw_collection(tmp_path / "data", {f"{split}/{name}": 4 for split in ("train", "val") for name in "AB"})
    torch.save(network(arch).state_dict(), tmp_path / "weights.pth")
    options = ["--valid", "folder", "--arch", arch, "--batch-size", 8, "--epochs", 1, "--name", arch]
    result = run("fit", "--data", data, *QUICK[2:], *options, "--weights", tmp_path / "weights.pth")
    assert result.exit_code == 0, result.output
    learn = load_learner(f"exports/{arch}")
    assert learn.arch == arch
    assert learn.predict(next((data / "train" / "A").iterdir()))[2].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_early_stopping_ends_each_phase_and_the_best_epoch_is_exported(collection, run, weights):
    args = [
        "--weights",
        weights,
        "--epochs",
        30,
        "--patience",
        2,
        "--lr",
        "0.05",
        "--batch-size",
        18,
        "--name",
        "early",
    ]
    result = run("fit", "--data", collection, *QUICK, *args)
    assert result.exit_code == 0, result.output
    history, model = history_of(Path("exports/early")), settings_of(Path("exports/early"))
    for phase in model["training"]["phases"]:
        losses = [float(row["valid_loss"]) for row in history if row["phase"] == phase["name"]]
        assert phase["end"] == "early stopping" and len(losses) == phase["epochs"] < 30
        assert losses.index(min(losses)) + 1 == phase["best_epoch"] == phase["epochs"] - 2
    lowest = min(range(len(history)), key=lambda i: float(history[i]["valid_loss"]))
    epochs = [(row["phase"], int(row["epoch"])) for row in history]
    kept = epochs.index((model["best"]["phase"], model["best"]["epoch"]))
    assert kept >= lowest and model["best"]["valid_loss"] >= float(history[lowest]["valid_loss"])
    assert "No improvement" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "margin", "kept"), [("adaptive", 0, "lowest"), ("adaptive", 99, "last"), ("constant", 99, "lowest")]
)
def test_the_weights_are_those_of_the_last_epoch_within_a_standard_error(
    schedule, margin, kept, collection, run, monkeypatch
):
    normal, other = (sorted(collection.glob(f"train/{name}/*"))[::2] for name in ("NORMAL", "PNEUMONIA"))
    for paths, folder in ((normal, other[0].parent), (other, normal[0].parent)):  # now the labels are random
        for path in paths:
            path.rename(folder / f"swapped-{path.name}")
    monkeypatch.setattr("xray_fastai.training.callbacks.standard_error", lambda *_: margin)
    options = ["--weights", "none", "--epochs", 4, "--lr", "1e-3", "--schedule", schedule, "--name", "kept"]
    result = run("fit", "--data", collection, *QUICK, "--batch-size", 36, *options)
    assert result.exit_code == 0, result.output
    losses = [float(row["valid_loss"]) for row in history_of(Path("exports/kept"))]
    best = settings_of(Path("exports/kept"))["best"]
    lowest = losses.index(min(losses)) + 1  # with random labels, rarely the last
    assert best["epoch"] == {"lowest": lowest, "last": 4}[kept]
    assert best["valid_loss"] == losses[best["epoch"] - 1]
    assert ("within a standard error of the lowest" in result.stdout) == (best["epoch"] != lowest)
    report = Path("exports/kept/report.html").read_text()
    assert ("within a standard error of the lowest" in report) == (schedule == "adaptive")


def test_the_standard_error_of_a_weighted_loss():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(4000, 2, generator=generator), torch.arange(4000) % 4 // 3
    weight = torch.tensor([1.0, 3.0])

    def loss(rows: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(logits[rows], targets[rows], weight).item()

    bootstrap = [loss(torch.randint(4000, (4000,), generator=generator)) for _ in range(400)]
    assert standard_error(logits, targets, weight) == pytest.approx(np.std(bootstrap), rel=0.12)
    assert standard_error(logits, targets, torch.ones(2)) == pytest.approx(standard_error(logits, targets, None))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_history_to_the_last_digit(collection, run):
    args = ["fit", "--data", collection, *QUICK, "--batch-size", 18, "--weights", "none", "--epochs", 2]
    for name, seed, workers in [("a", 7, 0), ("b", 7, 1), ("c", 8, 0)]:
        assert run(*args, "--seed", seed, "--workers", workers, "--name", name).exit_code == 0
    a, b, c = (Path("exports", name, "history.csv").read_text() for name in "abc")
    assert a == b != c


@pytest.mark.slow
def test_the_settings_in_an_export_repeat_its_fit(collection, run):
    args = ["--weights", "none", "--epochs", 2, "--batch-size", 18, "--name", "a"]
    assert run("fit", "--data", collection, *QUICK, *args).exit_code == 0
    rates = []

    class Rates(Callback):
        def before_fit(self):
            rates.append([hyper["lr"] for hyper in self.opt.hypers])

    settings = settings_of(Path("exports/a"))["settings"]
    again = fit(FitConfig(**(settings | {"name": "again"})), callbacks=[Rates()])
    assert rates == [[settings["lr"]] * 3]  # from scratch, all layers train at the same rate
    assert (again.path / "history.csv").read_text() == Path("exports/a/history.csv").read_text()


@pytest.mark.slow
def test_test_is_never_read(collection, run):
    (collection / "test").mkdir()
    (collection / "test" / "OTHER").write_text("a file where a folder is expected")
    assert run("fit", "--data", collection, *QUICK, "--weights", "none", "--epochs", 1).exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize(("valid", "words"), [("folder", "val/ (4 images)"), ("0.25", "held out of train/, by image")])
def test_valid(valid, words, collection, run):
    result = run("fit", "--data", collection, *QUICK, "--weights", "none", "--epochs", 1, "--valid", valid)
    assert result.exit_code == 0, result.output
    assert words in result.stdout


@pytest.mark.slow
def test_three_classes(tmp_path, run, refused):
    root = draw_collection(tmp_path, {f"train/{name}": 12 for name in ("BACTERIA", "NORMAL", "VIRUS")})
    result = run("fit", "--data", root, *QUICK, "--weights", "none", "--target-sensitivity", 0.9)
    refused(result, "--target-sensitivity 0.9: only two classes have a threshold, of 3 the most probable is predicted")
    args = ["--weights", "none", "--epochs", 1, "--class-weights", "1,2.5,1", "--name", "three"]
    result = run("fit", "--data", root, *QUICK, *args)
    assert result.exit_code == 0, result.output
    assert "loss weights  BACTERIA 1, NORMAL 2.5, VIRUS 1" in result.stdout
    assert settings_of(Path("exports/three"))["threshold"] is None
    assert load_learner("exports/three").predict(next((root / "train" / "VIRUS").iterdir()))[2].shape == (3,)


@pytest.mark.slow
def test_a_fit_without_what_linux_alone_has(collection, run, monkeypatch):
    """Windows writes no file to the disk that is open for reading only; it and macOS lack some functions of `os`."""
    fcntl = pytest.importorskip("fcntl")

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr("xray_fastai.system.files.sync_folder", lambda folder: None)
    monkeypatch.setattr("xray_fastai.export.run_folder.sync_folder", lambda folder: None)
    for name in ("sched_getaffinity", "posix_fallocate"):
        monkeypatch.delattr(os, name, raising=False)
    result = run("fit", "--data", collection, *QUICK, "--weights", "none", "--epochs", 1, "--name", "elsewhere")
    assert result.exit_code == 0, result.output
    assert settings_of(Path("exports/elsewhere"))["status"] == "complete"


@pytest.mark.slow
def test_a_batch_larger_than_the_training_set_is_reduced(collection, run):
    args = ["--weights", "none", "--epochs", 1, "--batch-size", 500]
    result = run("fit", "--data", collection, *QUICK, *args)
    assert result.exit_code == 0, result.output
    assert re.search(r"batch size +36, all training images, instead of 500", result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threshold", "called"), [(1.0, {"NORMAL": 4, "PNEUMONIA": 0}), (0.0, {"NORMAL": 0, "PNEUMONIA": 4})]
)
def test_a_fit_says_that_every_image_is_called_one_class(threshold, called, collection, run, monkeypatch):
    chosen = lambda *_, **__: Calibration(threshold=threshold)  # noqa: E731
    monkeypatch.setattr("xray_fastai.training.judgement.calibrate", chosen)
    options = ["--weights", "none", "--epochs", 1, "--valid", "folder", "--name", "one"]
    result = run("fit", "--data", collection, *QUICK, *options)
    assert result.exit_code == 0, result.output
    assert settings_of(Path("exports/one"))["called"] == called
    (name,) = (name for name, count in called.items() if count)
    assert f"every validation image is called {name}: " in result.stdout


@pytest.mark.slow
def test_skip_bad_leaves_images_out_and_counts_them(collection, run):
    for name in ("IM-a.jpeg", "IM-b.jpeg"):
        (collection / "train" / "NORMAL" / name).write_bytes(b"")
    result = run("fit", "--data", collection, *QUICK, "--weights", "none", "--epochs", 1, "--skip-bad")
    assert result.exit_code == 0, result.output
    assert (
        "left out, as they cannot be read: 2 images" in result.stdout
        and "IM-a.jpeg: the file is empty" in result.stdout
    )
    (model,) = Path("exports").glob("*/model.json")
    assert "IM-a" not in model.read_text()


BATCH = "xray_fastai.training.stopping:StopOnNonFiniteLoss.after_batch"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "code", "everyone"), [("interrupt", 130, True), ("terminate", 143, True), ("terminate", 143, False)]
)
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_a_signal_stops_after_the_batch_and_exports_the_best_weights(do, code, everyone, collection, forked):
    """A terminal sends it to the loading processes too; a user sends it to one process."""
    args = ["--weights", "none", "--epochs", 2000, "--patience", 2000, "--name", "stopped"]
    args += ["--no-cache", "--workers", 2, "--batch-size", 6]
    args = list(map(str, ["fit", "--data", collection, *QUICK, *args]))
    result = forked(
        args=args, do=do, at=f"{BATCH}@17", everyone=everyone
    )  # the first of the third epoch: 6 + 2 in each
    assert result["code"] == code, result["output"]
    assert "Traceback" not in result["output"]
    model = settings_of(Path("exports/stopped"))
    assert model["status"] == "interrupted" and model["best"]["epoch"] >= 1
    load_learner("exports/stopped")
    assert "resume: xray-fastai fit --resume stopped" in result["output"]
    processes = re.search(r"^processes: (.*)$", result["output"], re.M)[1].split()
    assert len(processes) >= 3  # two load images
    wait_for(lambda: not members(result["pid"]), seconds=5)
    shared = [file.name for file in Path("/dev/shm").glob("torch_*")]  # torch_<process>_...
    assert not [name for name in shared if name.split("_")[1] in processes]


def test_an_interrupt_in_python_exports_and_raises_keyboard_interrupt_with_the_result(collection):
    class Interrupt(Callback):
        def after_batch(self):
            if self.epoch == 1:
                signal.raise_signal(signal.SIGINT)

    settings = {"arch": SMALL, "size": 32, "batch_size": 8, "device": "cpu", "weights": "none", "epochs": 9}
    with pytest.raises(KeyboardInterrupt, match="the best weights so far were exported: exports/stopped; ") as stop:
        fit(collection, **settings, name="stopped", callbacks=[Interrupt()])
    result = stop.value.result
    assert (result.path, result.status, result.signal) == (Path("exports/stopped"), "interrupted", signal.SIGINT)
    assert len(result.history) == 1 and load_learner(result.path)
    assert f"fit(resume={str(result.path)!r})" in str(stop.value)
    assert fit(resume=str(result.path)).status == "complete"


@pytest.mark.slow
@pytest.mark.parametrize(("do", "code"), [("interrupt", 130), ("terminate", 143)])
def test_a_signal_before_training_leaves_no_files(do, code, collection, forked):
    args = list(map(str, ["fit", "--data", collection, *QUICK, "--weights", "none"]))
    result = forked(args=args, do=do, at="xray_fastai.training.fit:make_plan@1")
    assert result["code"] == code
    assert result["output"].strip().splitlines()[-1] == "Stopped; nothing was written."
    assert not list(Path("exports").iterdir())


@pytest.mark.slow
@pytest.mark.curves
def test_a_loss_that_becomes_infinite_keeps_the_best_weights(collection, run, refused, monkeypatch):
    from xray_fastai.training.callbacks import Schedule

    monkeypatch.setattr(Schedule, "scale", lambda self, epochs, step: 1.0 if epochs < 1 else 1e36)
    result = run("fit", "--data", collection, *QUICK, "--weights", "none", "--epochs", 4, "--name", "far")
    refused(result, "was not finite at epoch 2", "the best weights so far are in exports/far", "lower --lr")
    model = settings_of(Path("exports/far"))
    assert model["status"] == "diverged" and model["best"]["epoch"] == 1
    load_learner("exports/far")


@pytest.mark.slow
def test_a_loss_that_is_never_finite_leaves_no_files(collection, run, refused, tmp_path):
    state = network(SMALL).state_dict()
    state["conv1.weight"] *= 1e38
    torch.save(state, tmp_path / "huge.pth")
    args = ["--weights", tmp_path / "huge.pth", "--precision", "fp32", "--epochs", 1]
    refused(run("fit", "--data", collection, *QUICK, *args), "was not finite at epoch 1", "nothing is exported")
    assert not list(Path("exports").iterdir())


@pytest.mark.slow
def test_help_and_version_are_instant(start):
    """They import neither torch nor fastai."""
    code = (
        "import sys; from xray_fastai.cli.main import app\n"
        "try: app(sys.argv[1:], prog_name='xray-fastai')\n"
        "except SystemExit as e: code = e.code\n"
        "heavy = {'torch', 'fastai', 'matplotlib', 'pandas', 'numpy', 'sklearn'} & sys.modules.keys()\n"
        "assert not heavy, heavy; sys.exit(code)"
    )
    for args, expected in [(["--help"], 0), (["--version"], 0), (["fit", "--help"], 0), (["fit", "--epochs", "x"], 2)]:
        result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert result.returncode == expected, result.stderr
    assert start("--version").communicate()[0].startswith("xray-fastai ")
