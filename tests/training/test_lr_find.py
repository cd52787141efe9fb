"""`fit --lr find` searches the rate of each phase as fastai's `lr_find`, and leaves everything else as it was."""

import re
import signal
from pathlib import Path

import pytest
import torch
import torchvision
from fastai.vision.all import Callback, accuracy

from tests.conftest import draw_collection, settings_of
from tests.small_network import NAME as SMALL
from tests.training.test_fit import history_of
from tests.training.test_resume import resumed, same
from xray_fastai import FitConfig, dataloaders, fit, learner, verify
from xray_fastai.model.learner import CalibratedCrossEntropy
from xray_fastai.system.errors import UserError
from xray_fastai.training import lr_find, state
from xray_fastai.training.loop import Trainer
from xray_fastai.training.messages import _conclude_search, report_search
from xray_fastai.training.state import random_states

BATCH = "fastai.callback.schedule:LRFinder.after_batch"  # of the searches alone
SETTINGS = {
    "data": "data", "weights": "weights.pth", "valid": "folder", "arch": SMALL, "size": 32, "batch_size": 8,
    "workers": 0, "device": "cpu", "freeze_epochs": 2, "epochs": 2, "lr": "find", "augment": "none",
}  # fmt: skip


@pytest.fixture
def settings():
    """Settings of a quick fit with pretrained weights, which are random ones."""
    draw_collection(Path("data"), {"train/NORMAL": 16, "train/PNEUMONIA": 24, "val/NORMAL": 4, "val/PNEUMONIA": 4})
    torch.manual_seed(1)
    torch.save(torchvision.models.get_model(SMALL).state_dict(), "weights.pth")
    return SETTINGS


def found(output: str) -> list[float]:
    return [float(rate) for rate in re.findall(r"^learning rate  found (\S+) \(valley; plot in lr_find", output, re.M)]


class Spy(Callback):
    """Records the peak rates of each phase: the first epoch ends at them."""

    def __init__(self):
        self.peaks = []

    def before_train(self):
        if self.epoch == 1:
            self.peaks.append([hyper["lr"] for hyper in self.opt.hypers])


@pytest.mark.parametrize(
    ("found", "steps", "said"),
    [
        (0.0099, 30, None),
        (0.02, 30, "10.0 times the default;"),
        (0.006, 4.5, "3.0 times the default, found in epochs of 5"),
    ],
)
def test_a_rate_far_above_the_default_is_pointed_out(found, steps, said, capsys):
    report_search({"fault": None, "peak": found}, 0.002, steps)
    output = capsys.readouterr().out
    assert f"found {found:g}" in output and (said or "") in output
    assert ("if the fit ends badly, give --lr 0.002" in output) == (said is not None)


@pytest.mark.parametrize(("auc", "lr", "warned"), [(0.55, 0.05, True), (0.95, 0.05, False), (0.55, None, False)])
def test_a_fit_that_learned_nothing_at_a_found_rate_names_a_lower_one(auc, lr, warned, capsys):
    phase = {"name": "unfrozen"} | ({} if lr is None else {"lr": lr})
    _conclude_search({"training": {"phases": [phase]}, "best": {"roc_auc": auc}})
    assert ("try a lower one, --lr 0.005\n" in capsys.readouterr().out) == warned


def test_each_phase_trains_at_the_rate_that_was_found(settings, capsys):
    """The earlier layers keep their share of the head's rate; model.json repeats the fit, and has the rates."""
    spy = Spy()
    result = fit(**settings, name="both", callbacks=[spy])
    output = capsys.readouterr().out
    assert "augmentation none, learning rate searched in each phase, adaptive" in output
    assert output.count("\nsearching the learning rate: 100 batches\n") == 2
    frozen, unfrozen = found(output)
    assert spy.peaks[0][-1] == frozen and result.lr == unfrozen
    assert spy.peaks[1] == pytest.approx([unfrozen / 100, unfrozen / 10, unfrozen])
    model = settings_of(result.path)
    assert [phase["lr"] for phase in model["training"]["phases"]] == [frozen, unfrozen]
    assert FitConfig(**model["settings"]).lr == "find" and verify(result.path).ok
    assert (result.path / "lr_find.png").stat().st_size > 10_000
    assert 'alt="The loss of each search' in (result.path / "report.html").read_text()


@pytest.mark.slow
def test_a_fit_with_the_found_rate_trains_the_same(settings, monkeypatch):
    """Bit for bit, in both phases: weights, batch norm, random states, callbacks and metrics are as before."""
    monkeypatch.setattr(lr_find, "suggestion", lambda *_: (3e-3, None))
    monkeypatch.setattr(lr_find, "STEPS", 12)
    spies, exports = (Spy(), Spy()), []
    for lr, spy in zip(("find", 3e-3), spies, strict=True):
        given = settings | {"lr": lr, "schedule": "constant", "augment": "strong", "name": f"lr-{lr}"}
        exports.append(fit(**given, callbacks=[spy], metrics=[accuracy]).path)
    assert spies[0].peaks == spies[1].peaks == [[3e-3] * 3] * 2
    a, b = exports
    assert (a / "lr_find.png").is_file() and not (b / "lr_find.png").exists()
    (a / "lr_find.png").unlink()
    for phase in (model := settings_of(a))["training"]["phases"]:
        del phase["lr"]
    assert model["training"]["phases"] == settings_of(b)["training"]["phases"]
    assert (a / "history.csv").read_bytes() == (b / "history.csv").read_bytes()
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.fixture
def learn(settings):
    """A function that makes the same learner each time."""

    def make():
        dls = dataloaders("data", valid="folder", size=32, batch_size=8, workers=0, device="cpu", augment="light")
        learn = learner(dls, SMALL, weights="weights.pth")
        learn.remove_cb(learn.progress)
        learn.unfreeze()
        return learn

    return make


def test_the_search_is_fastais_and_leaves_the_learner_as_it_was(learn):
    fastais, ours = learn(), learn()
    with fastais.no_logging():
        suggested = fastais.lr_find(show_plot=False).valley
    Path("models").rmdir()  # where its temporary file was
    fastais_losses = [float(loss) for loss in fastais.recorder.losses]
    weights = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}
    ours.dls = learn().dls  # whose images are drawn in the same order again
    random, head = random_states(ours), ours.model[1][-1]
    head.weight.grad = torch.zeros_like(head.weight)  # as after an earlier phase
    with ours.no_logging():
        search = lr_find.search(ours, 1e-3, [])
    assert search["losses"] == pytest.approx(fastais_losses, rel=1e-5)
    assert search["rates"][:2] == pytest.approx([1e-7, 1.2e-7], rel=0.01) and search["fault"] is None
    assert search["peak"] == pytest.approx(suggested, rel=0.05)
    assert all(torch.equal(weights[name], tensor) for name, tensor in ours.model.state_dict().items())
    assert random_states(ours) == random
    assert [p is head.weight for p in ours.model.parameters() if p.grad is not None] == [True]
    assert not ours.recorder.history and not Path("models").exists()


def test_a_search_that_suggests_nothing():
    rates = [1e-7 * 10 ** (8 * i / 100) for i in range(101)]
    falling = [1.0] * 40 + [1 - i / 50 for i in range(40)] + [0.2 + i for i in range(21)]
    rate, fault = lr_find.suggestion(rates, falling, 100)
    assert fault is None and rates[45] < rate < rates[70]
    assert lr_find.suggestion(rates[:14], falling[:14], 100) == (None, "the loss diverged at once")
    assert lr_find.suggestion(rates, falling[:8], 100) == (None, "the loss diverged at once")
    for losses in ([1.0] * 101, [1 + i / 9 for i in range(101)]):
        assert lr_find.suggestion(rates, losses, 100) == (None, "the loss did not fall")


@pytest.mark.slow
def test_the_default_is_taken_where_no_rate_is_found(settings, monkeypatch, capsys):
    monkeypatch.setattr(lr_find, "suggestion", lambda *_: (None, "the loss did not fall"))
    monkeypatch.setattr(lr_find, "STEPS", 12)
    spy = Spy()
    result = fit(**settings, name="none", callbacks=[spy])
    (frozen, unfrozen), output = spy.peaks, capsys.readouterr().out
    why = "learning rate  none found: the loss did not fall (plot in lr_find.png); "
    assert re.findall(f"^{re.escape(why)}(.*)$", output, re.M) == [
        "0.002 is taken, the default",
        "0.001 is taken, the default",
    ]
    assert frozen[-1] == 2e-3 and unfrozen == pytest.approx([1e-5, 1e-4, 1e-3])
    assert [phase["lr"] for phase in settings_of(result.path)["training"]["phases"]] == [2e-3, 1e-3]


def test_a_learner_is_not_made_with_a_search(settings):
    dls = dataloaders("data", valid="folder", size=32, batch_size=8, workers=0, device="cpu")
    with pytest.raises(UserError, match=r"^lr find: search it by learn\.lr_find\(\), and give the rate"):
        learner(dls, SMALL, weights="none", lr="find")


@pytest.mark.slow
def test_a_killed_fit_goes_on_with_the_rates_it_found(settings, forked):
    """In the frozen phase its rate comes from the checkpoint; killed in the next search, it searches again."""
    exports = Path("exports")
    whole = forked(fit=settings | {"name": "whole"})
    assert whole["code"] == 0, whole["output"]
    rates = found(whole["output"])
    at = "xray_fastai.training.loop:save_between_phases@1"
    forked(fit=settings | {"name": "killed"}, do="kill", at=at)
    again = forked(fit={"resume": "killed"}, do="kill", at=f"{BATCH}@30")["output"]
    assert resumed(again) == "killed after frozen epoch 1" and found(again) == []
    last = forked(fit={"resume": "killed"})["output"]
    assert resumed(last) == "killed after the frozen phase" and found(last) == rates[1:]
    same(exports / "whole", exports / "killed")
    pictures = [(exports / name / "lr_find.png").read_bytes() for name in ("whole", "killed")]
    assert pictures[0] == pictures[1]


class WorseAndStopped(Callback):
    "Spoil the second epoch, and interrupt the third."

    def after_train(self):
        if self.epoch == 1:
            with torch.no_grad():
                self.model[1][-1].bias[0] += 50

    def before_epoch(self):
        if self.epoch == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_resumed_phase_whose_time_is_up_ends_with_the_best_weights(settings, monkeypatch):
    """The features are computed again, so the time may be up where the phase has epochs already."""
    monkeypatch.setattr(state, "SECONDS", 0.0)
    monkeypatch.setattr(lr_find, "STEPS", 12)
    with pytest.raises(KeyboardInterrupt):
        fit(**settings | {"name": "late", "freeze_epochs": 4, "epochs": 1}, callbacks=[WorseAndStopped()])
    asked, begun = [], []

    def is_up(trainer, name):
        if name == "unfrozen" and name not in asked:
            own, best = trainer.learn.model.state_dict(), trainer.best.state
            begun.append((trainer.best.row["epoch"], all(torch.equal(own[key], best[key]) for key in own)))
        asked.append(name)
        return asked == ["frozen", "frozen"]  # after the search, not when the phase begins

    monkeypatch.setattr(Trainer, "_time_is_up", is_up)
    result = fit(resume="late")
    assert begun == [(1, True)]
    assert settings_of(result.path)["training"]["phases"][0]["end"] == "the time limit"


@pytest.mark.slow
def test_a_signal_during_the_search_ends_the_fit(settings, forked):
    stopped = forked(fit=settings | {"name": "stopped"}, do="interrupt", at=f"{BATCH}@50")
    assert stopped["code"] == 0 and "Stopping after this batch" in stopped["output"], stopped["output"]
    assert "no epoch was completed" in stopped["output"] and not found(stopped["output"])
    assert "train loss" not in stopped["output"]  # the phase did not begin
    path = Path("exports/stopped")
    model = settings_of(path)
    assert model["status"] == "interrupted" and not history_of(path) and not (path / "lr_find.png").exists()
    (phase,) = model["training"]["phases"]
    assert phase == {"name": "frozen", "epochs": 0, "best_epoch": None, "end": "an interruption"}


@pytest.mark.slow
def test_out_of_memory_during_the_search(settings, monkeypatch, capsys):
    """It is repeated with batches of half the size, twice as many."""
    forward, search, searches = CalibratedCrossEntropy.__call__, lr_find.search, []

    def starve(loss, outputs, targets):
        if torch.is_grad_enabled() and len(outputs) > 7:
            raise torch.OutOfMemoryError("no memory, for a test")
        return forward(loss, outputs, targets)

    monkeypatch.setattr(CalibratedCrossEntropy, "__call__", starve)
    monkeypatch.setattr(lr_find, "STEPS", 50)
    monkeypatch.setattr(lr_find, "search", lambda *args: searches.append(search(*args)) or searches[-1])
    fit(**settings | {"name": "starved", "freeze_epochs": 0, "epochs": 1})
    output = capsys.readouterr().out
    assert "out of memory in training: batches of 4 instead of 8 images" in output and len(found(output)) == 1
    (rates,) = (search["rates"] for search in searches)
    assert rates[2] / rates[0] == pytest.approx(10 ** (8 / 50))  # two parts are a step
