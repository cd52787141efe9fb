"""A fit that was killed, interrupted or out of memory resumes to the same result as an uninterrupted one."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.conftest import QUICK, draw_collection, settings_of
from tests.small_network import NAME as SMALL
from tests.training.forked_fits import ForkedFits
from tests.training.test_fit import history_of
from xray_fastai import load_learner
from xray_fastai.export.run_folder import reopen, reserve
from xray_fastai.training.checked_files import read_json, write_json

pytestmark = pytest.mark.slow

BATCH = "xray_fastai.training.stopping:StopOnNonFiniteLoss.after_batch"  # six an epoch, the sixth of validation
LOSS = "xray_fastai.model.learner:CalibratedCrossEntropy.__call__"
CHECKPOINTS = "xray_fastai.training.checkpoint:Checkpoints"
END = "xray_fastai.training.loop:save_between_phases@1"
# The longer it trains, the worse it becomes: early stopping ends the frozen phase after the rate was cut, and the best
# epoch is in it; the unfrozen phase reaches its last epoch.
SETTINGS = {
    "data": "data", "weights": "weights.pth", "valid": "folder", "arch": SMALL, "size": 32, "batch_size": 8,
    "workers": 0, "device": "cpu", "freeze_epochs": 20, "epochs": 2, "patience": 3, "lr": 0.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def fits(tmp_path_factory, forked):
    """Fits on a collection whose validation labels are swapped."""
    fits = ForkedFits(tmp_path_factory.mktemp("fits"), forked)
    counts = {"train/NORMAL": 16, "train/PNEUMONIA": 24, "val/NORMAL": 4, "val/PNEUMONIA": 4}
    val = draw_collection(fits.root / "data", counts) / "val"
    for name, other in [("NORMAL", "other"), ("PNEUMONIA", "NORMAL"), ("other", "PNEUMONIA")]:
        (val / name).rename(val / other)
    yield fits
    shutil.rmtree(fits.root)


@pytest.fixture(scope="module")
def whole(fits):
    """The export of an uninterrupted fit."""
    fits(**SETTINGS, name="whole")
    return fits.exports / "whole"


@pytest.fixture(scope="module")
def killed(fits):
    """The folder of a fit that was killed after its fourth epoch: two checkpoints of the frozen phase."""
    at = f"{CHECKPOINTS}._write@4"  # the earlier ones are written
    fits(-signal.SIGKILL, {"do": "kill", "at": at}, **SETTINGS, name="crashed")
    return (fits.exports / ".crashed.partial").rename(fits.root / ".crashed.partial")


@pytest.fixture
def crashed(killed, fits):
    """A copy of it in a separate folder of exports, which a test may change."""
    exports = Path("exports")
    shutil.copytree(killed, exports / ".crashed.partial", copy_function=os.link)
    for name in ("data", "weights.pth"):
        Path(name).symlink_to(fits.root / name)
    return exports


def resumed(output: str) -> str:
    return re.search(r"^resuming +(.*)$", output, re.M)[1]


def same(a: Path, b: Path) -> None:
    """Check that two exports have bit for bit the same history and weights, and the same results."""
    assert (a / "history.csv").read_bytes() == (b / "history.csv").read_bytes()
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    models = [settings_of(path) for path in (a, b)]
    for model in models:
        del model["data"]["contents"]  # each export has a salt of its own
    for key in ("status", "best", "temperature", "threshold", "calibration", "data"):
        assert models[0][key] == models[1][key]
    assert models[0]["training"]["phases"] == models[1]["training"]["phases"]
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())


KILLED = [  # when; the place in a process that resumes after the previous kill; where that process resumes
    ("before anything but the settings is written", "xray_fastai.training.fit:read_collection@1", None),
    ("in the first epoch", f"{BATCH}@3", "from the beginning: no epoch was completed"),
    (
        "while the second checkpoint is written",
        "xray_fastai.training.checked_files:checksum@5",
        "from the beginning: no epoch was completed",
    ),
    ("before a checkpoint gets its name", "os:replace@4", "after frozen epoch 1"),
    ("in the validation of the fourth epoch", f"{BATCH}@18", "after frozen epoch 1"),
    ("between the phases, before that checkpoint", END, "after frozen epoch 3"),
    ("in the next phase", f"{BATCH}@11", "after frozen epoch 3"),
    (
        "before old files are deleted",
        f"{CHECKPOINTS}._delete_all_but@1",
        "after the frozen phase",
    ),
    ("in the last epoch", f"{BATCH}@9", "after the frozen phase"),
    ("before the checkpoint of the end", END, "after unfrozen epoch 1"),
    ("while the export is written", "xray_fastai.training.write_export:plot_curves@1", "after unfrozen epoch 1"),
]


def test_a_fit_killed_many_times_gives_the_result_of_an_uninterrupted_one(fits, whole):
    for when, where, place in KILLED:
        settings = {"resume": "killed"} if place else SETTINGS | {"name": "killed"}
        output = fits(-signal.SIGKILL, {"do": "kill", "at": where}, **settings)
        assert place is None or resumed(output) == f"killed {place}", when
    assert resumed(fits(resume="killed")) == "killed after the unfrozen phase"
    same(whole, fits.exports / "killed")
    assert not list(fits.exports.glob(".killed*"))
    model = settings_of(whole)
    assert [phase["end"] for phase in model["training"]["phases"]] == ["early stopping", "reaching its last epoch"]
    assert model["best"]["phase"] == "unfrozen"
    rates = [float(row["lr"]) for row in history_of(whole) if row["phase"] == "frozen"]
    assert rates[-1] < rates[-2] < rates[0]  # the rate was cut


def test_epochs_without_a_checkpoint_are_trained_again(fits, whole):
    """The best epoch so far may be one of them, and so may one that is not the best."""
    at = {"do": "kill", "at": END, "seconds": 1000}  # between the phases
    fits(-signal.SIGKILL, at, **SETTINGS, name="sparse")
    assert resumed(fits(do={"seconds": 1000}, resume="sparse")) == "sparse after frozen epoch 1"
    same(fits.exports / "sparse", whole)


def test_a_terminated_fit_resumes_under_another_name(fits, whole):
    """As on a cluster that needs the machine for another job; meanwhile the interrupted export can be used."""
    at = {"do": "terminate", "at": f"{BATCH}@27"}  # in the unfrozen phase's first epoch
    output = fits(**{"do": at} | SETTINGS, name="preempted")
    path = fits.exports / "preempted"
    assert re.search(r"^resume: xray-fastai fit --resume preempted \(needs .*/checkpoint, \d+ MB; delete", output, re.M)
    assert settings_of(path)["status"] == "interrupted"
    load_learner(path)
    assert len({file.stat().st_mode for file in (path / "checkpoint").iterdir()}) == 1
    output = fits(resume="preempted")
    assert resumed(output) == "preempted after the frozen phase, as preempted-2"
    same(whole, fits.exports / "preempted-2")
    assert not (path / "checkpoint").exists()
    seconds = [settings_of(export)["training"]["seconds"] for export in (path, fits.exports / "preempted-2")]
    assert seconds[1] > seconds[0] / 2  # the frozen phase of the first process counts


def test_a_full_disk_at_a_checkpoint(fits, whole):
    """A limit on the size of files simulates it: Adam's averages of all layers do not fit."""
    output = fits(1, {"limit": 400_000}, **SETTINGS, name="full")
    (line,) = [line for line in output.splitlines() if "UserError" in line]
    assert "exports/.full.partial: a checkpoint could not be written (File too large); free space" in line
    assert "'xray-fastai fit --resume full', or delete exports/.full.partial" in output
    assert not list(fits.exports.glob(".full.partial/checkpoint/.*"))
    assert resumed(fits(resume="full")) == "full after the frozen phase"
    same(whole, fits.exports / "full")


def test_a_folder_that_vanishes(fits, whole):
    at = {"do": "vanish", "at": f"{BATCH}@9"}  # in the second epoch
    output = fits(1, at, **SETTINGS, name="gone")
    assert "exports/.gone.partial: a checkpoint could not be written (No such file or directory)" in output
    assert "fit --resume gone" in output
    (fits.root / "vanished").rename(fits.exports)
    assert resumed(fits(resume="gone")) == "gone after frozen epoch 1"
    same(whole, fits.exports / "gone")


def test_out_of_memory_the_batch_is_halved(fits):
    at = {"do": "starve", "at": f"{LOSS}@8", "max_images": 7}  # in the second epoch's second batch
    output = fits(**{"do": at} | SETTINGS | {"freeze_epochs": 2, "epochs": 1}, name="starved")
    assert re.findall(r"^out of memory in (.*)$", output, re.M) == [
        "training: batches of 4 instead of 8 images, gradients summed over 8 images for each step; "
        "resuming after frozen epoch 1",
        "validation: batches of 4 instead of 8 images; resuming after frozen epoch 1",
    ]
    model = settings_of(fits.exports / "starved")
    assert model["status"] == "complete" and model["settings"]["batch_size"] == 8
    history = history_of(fits.exports / "starved")
    assert [(row["phase"], row["epoch"]) for row in history] == [("frozen", "1"), ("frozen", "2"), ("unfrozen", "1")]


def test_out_of_memory_while_features_are_computed_the_batch_is_halved(fits):
    at = {"do": "starve", "at": "torch.nn:Flatten.forward@2", "max_images": 7}  # in the second batch
    output = fits(**{"do": at} | SETTINGS | {"freeze_epochs": 2, "epochs": 1}, name="starved-early")
    assert re.findall(r"^out of memory in (.*)$", output, re.M) == [
        "training: batches of 4 instead of 8 images, gradients summed over 8 images for each step; "
        "resuming from the beginning",
        "validation: batches of 4 instead of 8 images; resuming from the beginning",
    ]
    assert settings_of(fits.exports / "starved-early")["status"] == "complete"


def test_out_of_memory_with_one_image_is_an_error(fits):
    at = {"do": "starve", "at": f"{LOSS}@1"}
    output = fits(**{"do": at} | SETTINGS, code=1, name="starved-out")
    assert "out of memory on cpu (1 thread) even with one image in a batch; try a size= below 32" in output
    assert not list(fits.exports.glob(".starved*"))


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]], ids=["alike", "weighted"])
def test_parts_of_a_batch_give_the_step_of_the_whole(weights):
    """With a network without batch norm; the last 6 of 22 images make no batch of eight."""
    from fastai.vision.all import SGD, DataLoader, DataLoaders, Learner

    from xray_fastai.model.learner import CalibratedCrossEntropy
    from xray_fastai.training.out_of_memory import AccumulateGradients, smaller

    torch.manual_seed(0)
    images, targets = torch.randn(22, 5), torch.arange(22) % 3 % 2
    items = list(zip(images, targets, strict=True))
    start = torch.nn.Linear(5, 2).state_dict()
    ends = []
    for at_once in (8, 4, 2, 1):
        dls = DataLoaders(DataLoader(items, bs=at_once), DataLoader(items, bs=8), device=torch.device("cpu"))
        network = torch.nn.Linear(5, 2)
        network.load_state_dict(start)
        loss = CalibratedCrossEntropy(weight=None if weights is None else torch.tensor(weights))
        learn = Learner(dls, network, loss_func=loss, opt_func=SGD, wd=0)
        if at_once == 8:
            dls.train.drop_last = True
        with learn.no_bar(), learn.no_logging():
            learn.fit(3, lr=0.5, cbs=[] if at_once == 8 else AccumulateGradients(8))
        ends.append(torch.cat([network.weight.flatten(), network.bias]).detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-6)
    assert [smaller(80, n) for n in (80, 40, 20, 10, 5, 1)] == [40, 20, 10, 5, 2, 0]
    assert smaller(36, 9) == 4 and smaller(97, 97) == 1


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # other tests need the file that it links to
    path.write_bytes(content)


def test_resume_takes_the_newest_run_and_its_last_undamaged_checkpoint(crashed, run):
    """Without the name of a run, and with the same images in another folder."""
    checkpoint = shutil.copytree(crashed / ".crashed.partial", crashed / ".newer.partial") / "checkpoint"
    os.utime(checkpoint / "settings.json")
    (crashed / ".gone.lock").touch()
    damage(checkpoint / "00003.head.safetensors")
    Path("data").rename("moved")
    result = run("fit", "--resume", "--data", "moved")
    assert result.exit_code == 0, result.output
    assert (
        "00003.json: damaged (00003.head.safetensors has changed since it was written); resuming from" in result.stdout
    )
    assert resumed(result.stdout) == "newer after frozen epoch 2"
    assert sorted(path.name for path in crashed.iterdir()) == [".crashed.partial", "newer"]
    assert settings_of(crashed / "newer")["settings"]["data"] == "moved"


def test_resume_from_another_folder_finds_the_images(crashed, fits, run, refused, monkeypatch):
    """`model.json` has a relative path again, which names no folder above the data's."""
    exports, images = crashed.resolve(), Path("images").absolute()
    path = crashed / ".crashed.partial" / "checkpoint" / "settings.json"
    kept = read_json(path)
    assert kept["folder"] == str(fits.root / "data") and kept["settings"]["data"] == "data"
    path.unlink()  # it is a hard link
    write_json(path, kept | {"folder": str(images)})
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    resume = ["fit", "--resume", exports / ".crashed.partial"]
    refused(run(*resume), f"the images of crashed were in {images}, where there is nothing now", "--data")
    images.symlink_to(fits.root / "data")
    Path("weights.pth").symlink_to(fits.root / "weights.pth")
    result = run(*resume)
    assert result.exit_code == 0, result.output
    assert settings_of(exports / "crashed")["settings"]["data"] == "../images"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--resume", "crashed", "--epochs", 5, "--lr", 1],
            ["--epochs: cannot change when crashed is resumed, nor can --lr; leave it out"],
        ),
        (["--resume", "nosuch"], ["--resume nosuch: no such run in exports", "unfinished runs: crashed"]),
        (["--resume", "done"], ["--resume done: exports/done is finished", "unfinished runs in exports: crashed"]),
        (["--resume", "--exports", "other"], ["--resume: no unfinished run in other"]),
        (["--resume", "empty"], ["exports/.empty.partial stopped before its settings were written", "delete it"]),
        (["--name", "crashed"], ["exports/.crashed.partial", "resume it by 'xray-fastai fit --resume crashed'"]),
        (["--resume", "crashed", "--data", "other"], ["--data other: no such folder"]),
    ],
)
def test_what_cannot_be_resumed_is_refused(args, words, crashed, run, refused):
    (crashed / "done").mkdir()
    (crashed / ".empty.partial").mkdir()
    refused(run("fit", *args), *words)
    assert sorted(path.name for path in crashed.glob("*")) == [".crashed.partial", ".empty.partial", "done"]


@pytest.mark.parametrize(
    ("name", "given", "there", "new"),
    [
        ("seed-2", "seed-2", ["seed-1"], "seed-2-2"),  # the user's own number
        ("seed-2", "seed", ["seed"], "seed-3"),  # the number of a fit that was resumed already
        ("seed", "seed", [], "seed-2"),
        ("2026-11-23_12-34-05", None, [], "2026-11-23_12-34-05-2"),
        ("2026-11-23_12-34-05-2", None, [], "2026-11-23_12-34-05-3"),
    ],
)
def test_a_resumed_export_takes_the_next_free_name(name, given, there, new):
    for other in there:
        Path("exports", other).mkdir(parents=True)
    kept = Path("exports", name, "checkpoint")
    kept.mkdir(parents=True)
    (kept / "settings.json").write_text(json.dumps({"settings": {"name": given}}))
    (kept.parent / "model.json").write_text('{"status": "interrupted"}')
    with reopen("exports", name) as (run, found):
        assert (run.name, found.name) == (new, name)


def test_changed_images_are_refused(crashed, run, refused):
    shutil.copytree("data", "changed")
    run_it = ["fit", "--resume", "crashed", "--data", "changed"]
    image = sorted(Path("changed/train/NORMAL").iterdir())[0]
    image.unlink()
    refused(run(*run_it), "not the images that crashed was trained on", "40 to train on and 8 to", "39 to train on")
    shutil.copy(sorted(Path("changed/train/NORMAL").iterdir())[0], image)
    refused(run(*run_it), "not the images", "a name, label or content changed")


@pytest.mark.parametrize("suffix", ["json", "optimizer.safetensors", "head.safetensors"])
def test_damaged_checkpoints_are_refused(suffix, crashed, run, refused):
    folder = crashed / ".crashed.partial" / "checkpoint"
    assert len(list(folder.glob(f"[0-9]*.{suffix}"))) == (3 if suffix == "head.safetensors" else 2)
    for path in folder.glob(f"[0-9]*.{suffix}"):
        damage(path)
    refused(
        run("fit", "--resume", "crashed"),
        "damaged",
        "no undamaged checkpoint is left",
        "delete exports/.crashed.partial",
    )
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("version", "words"), [(1, "an older version (format 1), which cannot be resumed"), (99, "a newer version")]
)
def test_a_checkpoint_of_another_version_is_refused(version, words, crashed, run, refused):
    settings = crashed / ".crashed.partial" / "checkpoint" / "settings.json"
    kept = read_json(settings)
    settings.unlink()  # other tests need the file that it links to
    write_json(settings, kept | {"format": version})
    refused(run("fit", "--resume"), str(settings), words)


def test_a_checkpoint_that_would_run_code_is_not_unpickled(crashed, run, refused):
    folder = crashed / ".crashed.partial" / "checkpoint"
    for path in folder.iterdir():
        path.unlink()
        path.write_bytes(b"cbuiltins\nexit\n(I7\ntR.")
    refused(run("fit", "--resume", "crashed"), "settings.json: damaged", "delete exports/.crashed.partial")


def test_a_run_that_another_fit_uses_is_refused(crashed, run, refused):
    link = crashed / ".crashed.partial"
    with reserve("exports", "other") as other:
        shutil.copytree(link / "checkpoint", other.checkpoint, copy_function=os.link)
        refused(run("fit", "--resume", "other"), "--resume other: a fit is running under this name")
        refused(run("fit", "--name", "other"), "--name other", "a running fit writes")
        other.resumable = True
        Path("empty/train").mkdir(parents=True)
        result = run("fit", "--data", "empty")
        assert "unfinished    exports/.crashed.partial of 2" in result.stdout and "other" not in result.stdout
        assert "resume it with 'xray-fastai fit --resume crashed', or delete it" in result.stdout


def test_too_little_space_is_refused_before_training(fits, crashed, run, refused, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    result = run("fit", "--data", "data", *QUICK, "--weights", "weights.pth", "--valid", "folder", "--name", "big")
    refused(result, "exports: 10 MB are free", "need 19 MB", "--exports")
    assert [path.name for path in crashed.iterdir()] == [".crashed.partial"]
