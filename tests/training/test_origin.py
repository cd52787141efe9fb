"""`fit --weights EXPORT` continues from a model of one's own: weights, settings, lineage, learning rates."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from fastai.vision.all import Callback
from safetensors.torch import load_file

from tests.conftest import QUICK, draw_collection, settings_of
from tests.small_network import NAME as SMALL
from xray_fastai import FitConfig, fit, verify
from xray_fastai.export.model_json import read_settings
from xray_fastai.export.reader import export_in_weights
from xray_fastai.system.errors import UserError
from xray_fastai.training import state

SAME = {"train/NORMAL": 16, "train/PNEUMONIA": 24}
OTHER = {"train/COVID": 12, "train/NORMAL": 12, "train/PNEUMONIA": 12}
OPTIONS = [option for option in QUICK if option not in ("--arch", SMALL, "--size", "32")]


def sha_of(export: Path) -> str:
    return settings_of(export)["weights"]["sha256"]


@pytest.fixture(scope="module")
def start_of(export, run, tmp_path_factory):
    """Return what a fit that continues from `export` prints, and its model before the first step."""

    def start_of(counts, *args):
        seen = {}

        class Look(Callback):
            def before_fit(self):
                seen.setdefault("state", {k: t.clone() for k, t in self.model.state_dict().items()})
                seen.setdefault("rates", []).append([hyper["lr"] for hyper in self.opt.hypers])

        data = draw_collection(tmp_path_factory.mktemp("second") / "data", counts)
        result = fit(data=data, weights=export, batch_size=8, workers=0, device="cpu", epochs=1, callbacks=[Look()])
        return result, seen

    return start_of


def test_the_same_classes_continue_with_all_weights(start_of, export, capsys):
    result, seen = start_of(SAME)
    parent = load_file(export / "model.safetensors")
    assert all(torch.equal(seen["state"][name], tensor) for name, tensor in parent.items())
    said = capsys.readouterr().out
    assert f"network       {SMALL}, 32 x 32 px, weights of the export small\n" in said
    model = settings_of(result.path)
    assert [phase["name"] for phase in model["training"]["phases"]] == ["frozen", "unfrozen"]
    assert len(set(seen["rates"][1])) == 3 and seen["rates"][1] == sorted(seen["rates"][1])
    created = settings_of(export)["created"]
    assert model["lineage"] == [{"name": "small", "sha256": sha_of(export), "created": created}]
    assert model["settings"]["weights"] == str(export)
    assert verify(result.path).ok

    again, _ = start_of(SAME)
    assert settings_of(again.path)["lineage"] == model["lineage"]


def test_other_classes_get_a_new_head_and_say_so(start_of, export, capsys):
    result, seen = start_of(OTHER)
    parent = load_file(export / "model.safetensors")
    assert all(torch.equal(seen["state"][k], tensor) for k, tensor in parent.items() if not k.startswith("1."))
    assert seen["state"]["1.3.weight"].shape[0] == 3
    line = "weights of the export small, but a new head: its classes are NORMAL, PNEUMONIA\n"
    assert line in capsys.readouterr().out
    assert settings_of(result.path)["classes"] == ["COVID", "NORMAL", "PNEUMONIA"]


def test_the_lineage_grows_by_each_fit(export, run, collection):
    for parent, name in [(export / "model.safetensors", "second"), ("second", "third"), ("exports/third", "fourth")]:
        args = ["fit", "--data", collection, *OPTIONS, "--weights", parent, "--epochs", 1, "--name", name]
        result = run(*args)
        if name == "third":  # named without its folder
            assert "Error: second: not an export: no such folder; did you mean exports/second?" in result.stderr
            result = run(*[f"exports/{arg}" if arg == "second" else arg for arg in args])
        assert result.exit_code == 0, result.output
    lineage = read_settings(Path("exports/fourth"))["lineage"]
    assert [ancestor["name"] for ancestor in lineage] == ["third", "second", "small"]
    assert [ancestor["sha256"] for ancestor in lineage] == [*(sha_of(Path("exports") / n) for n in ("third", "second")),
                                                            sha_of(export)]  # fmt: skip


def test_a_resumed_fit_needs_no_parent_and_keeps_the_lineage(export, collection, tmp_path, monkeypatch):
    class Interrupt(Callback):
        def before_epoch(self):
            if self.epoch == 1 and len(self.opt.hypers) == 3:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(state, "SECONDS", 0)
    parent = Path(shutil.copytree(export, tmp_path / "parent"))
    options = {"batch_size": 8, "workers": 0, "device": "cpu", "epochs": 2, "name": "first"}
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(collection, weights=parent, **options, callbacks=[Interrupt()])
    lineage = settings_of(stop.value.result.path)["lineage"]
    assert [ancestor["sha256"] for ancestor in lineage] == [sha_of(export)]
    shutil.rmtree(parent)
    again = fit(resume=True)
    model = settings_of(again.path)
    assert again.status == "complete" and model["lineage"] == lineage
    assert model["training"]["weights"] == "of the export parent"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, (SMALL, 32, "equalize")), ({"size": 40, "contrast": "none", "arch": SMALL}, (SMALL, 40, "none"))],
)
def test_the_settings_are_the_exports_unless_others_are_given(given, expected, export):
    from xray_fastai.training.origin import with_parents_choices

    config = with_parents_choices(FitConfig(weights=str(export), **given)).with_recipe()
    assert (config.arch, config.size, config.contrast) == expected
    assert config.augment == "strong"


def test_another_network_than_the_exports(export, run, refused, collection):
    result = run("fit", "--data", collection, "--weights", export, "--arch", "resnet50")
    refused(result, "--arch resnet50: ", f"{export} is a {SMALL}; leave it out, or give other weights")
    assert not list(Path("exports").glob("*"))


def test_a_folder_that_is_no_export(run, refused, collection, tmp_path):
    refused(run("fit", "--data", collection, "--weights", collection), f"{collection}: not an export")
    with pytest.raises(UserError, match="weights nowhere: no such file or export"):
        fit(data=collection, weights="nowhere")


def test_which_weights_are_an_export(export, tmp_path):
    assert export_in_weights("imagenet") is export_in_weights("none") is export_in_weights(None) is None
    for name in (".", "model.safetensors", "learner.pkl", "model.json"):
        assert export_in_weights(str(export / name)) == export
    shutil.copy(export / "model.safetensors", tmp_path)  # without its settings: a file of weights
    assert export_in_weights(str(tmp_path / "model.safetensors")) is None
