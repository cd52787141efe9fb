"""Checkpoints on disk: what is kept, what is damaged, and what an earlier version wrote."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from xray_fastai.config.fit_config import FitConfig
from xray_fastai.export.run_folder import reserve
from xray_fastai.system.errors import UserError
from xray_fastai.training.checkpoint import Best, Checkpoints, kept_settings
from xray_fastai.training.members import read_checkpoints
from xray_fastai.training.origin import Origin, origin_of

IMAGES = {"train": 3, "valid": 2, "digest": "x"}


@pytest.fixture
def checkpoints():
    """Three checkpoints, the second of which is the best epoch's; written without the key "pretrained", as by 0.1.0."""
    with reserve("exports", "run") as run, Checkpoints(run) as checkpoints:
        checkpoints.keep({"settings": FitConfig().to_dict(), "data": IMAGES, "origin": "weights.pth"})
        best = None
        for epoch in (1, 2, 3):
            weights = {"model": {"w": torch.full((2,), float(epoch))}}
            if epoch == 2:
                best = Best(1, weights, {"logits": torch.zeros(1, 2), "targets": torch.zeros(1)})
            checkpoints.save({"epoch": epoch}, None if epoch == 2 else weights, {"0.avg": torch.ones(2)}, best)
        checkpoints.wait()
        yield checkpoints


def test_a_best_epoch_without_a_checkpoint_comes_with_the_next_one(checkpoints):
    """It is another epoch than the one that is saved, and has its own files; the backbone is written once."""
    parts = [{"backbone": {"0.w": torch.ones(1)}, "head": {"1.w": torch.full((1,), value)}} for value in (7.0, 8.0)]
    outputs = {"logits": torch.zeros(1, 2), "targets": torch.zeros(1)}
    checkpoints.save({"epoch": 8}, parts[1], {}, Best(6, parts[0], outputs))
    checkpoints.wait()
    assert {"00004.head.safetensors", "00004.best.head.safetensors"} < set(names(checkpoints.folder))
    saved, _ = Checkpoints(checkpoints.run).load()
    assert (saved.weights["1.w"], saved.best["1.w"], saved.best_row) == (8, 7, 6)
    assert saved.weights["0.w"] == saved.best["0.w"] == 1
    assert sum("backbone" in name for name in names(checkpoints.folder)) == 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_two_newest_checkpoints_and_the_best_weights_are_kept(checkpoints):
    kinds = ("json", "model.safetensors", "optimizer.safetensors")
    kept = {f"0000{n}.{kind}" for n in (2, 3) for kind in kinds} | {"00002.outputs.safetensors", "settings.json"}
    assert set(names(checkpoints.folder)) == kept
    saved, faults = Checkpoints(checkpoints.run).load()
    assert (saved.state["epoch"], saved.best_row, faults) == (3, 1, [])
    assert saved.weights["w"].tolist() == [3, 3] and saved.best["w"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("name", "part", "damaged"),
    [("00003.model.safetensors", b"\x40", b"\x41"), ("00003.json", b'"epoch": 3', b'"epoch": 7')],
)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(checkpoints, name, part, damaged):
    path = checkpoints.folder / name  # the last byte of the number 3.0 is 0x40
    path.write_bytes(damaged.join(path.read_bytes().rsplit(part, 1)))
    saved, faults = Checkpoints(checkpoints.run).load()
    assert saved.state["epoch"] == 2 and len(faults) == 1 and "00003.json: damaged" in faults[0]


def test_files_of_a_killed_process_are_deleted_and_a_failed_write_leaves_none(checkpoints, monkeypatch):
    (checkpoints.folder / ".00003.json.1.partial").touch()
    checkpoints.save({"epoch": 4}, {"model": {"w": torch.zeros(2)}}, {}, None)
    checkpoints.wait()
    assert not list(checkpoints.folder.glob(".*"))

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("xray_fastai.training.checked_files.checksum", fails)
        checkpoints.save({"epoch": 5}, {"model": {"w": torch.zeros(2)}}, {}, None)
        with pytest.raises(
            UserError, match=r"a checkpoint could not be written \(No space left on device\); free space"
        ):
            checkpoints.wait()
    assert not list(checkpoints.folder.glob(".*"))
    assert Checkpoints(checkpoints.run).load()[0].state["epoch"] == 4


def test_a_bug_in_writing_is_not_called_a_full_disk(checkpoints, monkeypatch):
    def fails(*_):
        raise SafetensorError("the header is wrong")

    monkeypatch.setattr("xray_fastai.training.checked_files.save_file", fails)
    checkpoints.save({"epoch": 4}, {"model": {"w": torch.zeros(2)}}, {}, None)
    with pytest.raises(SafetensorError, match="the header is wrong"):
        checkpoints.wait()


@pytest.mark.parametrize(("weights", "pretrained"), [("imagenet", True), ("none", False)])
def test_a_checkpoint_without_the_field_pretrained_is_resumed(checkpoints, weights, pretrained):
    folder = checkpoints.folder
    saved = read_checkpoints([Checkpoints(checkpoints.run)], folder)[0]
    assert saved.state["epoch"] == 3
    assert origin_of(kept_settings(folder), FitConfig(weights=weights)) == Origin("weights.pth", pretrained)
