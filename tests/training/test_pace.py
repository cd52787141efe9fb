"""The row of an epoch, what an epoch takes, and the epochs that a time limit allows."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from fastai.vision.all import Callback, CancelFitException, L

from tests.conftest import settings_of
from tests.small_network import NAME as SMALL
from xray_fastai import FitConfig, fit
from xray_fastai.export.layout import HISTORY_COLUMNS
from xray_fastai.system.errors import UserError
from xray_fastai.training import epoch_log, state
from xray_fastai.training.callbacks import Schedule
from xray_fastai.training.epoch_log import EpochLog, columns_for
from xray_fastai.training.pace import Following, Pace, short_duration
from xray_fastai.training.stopping import EarlyStopping


def lines_of(history, early, losses, seconds, monkeypatch, capsys, epoch=0, **pace):
    """Train an epoch for each validation loss by a clock of its own; return what was printed under the titles."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(epoch_log.time, "perf_counter", lambda: clock.now)
    recorder = SimpleNamespace(history=[])
    pace = Pace(lambda: clock.now, **pace)
    log = EpochLog(history, "unfrozen", early, pace)
    log.learn = pace.learn = SimpleNamespace(n_epoch=10, metrics=L([None, None]))
    pace.before_fit()
    log.before_fit()
    for loss, length in zip(losses, seconds, strict=True):
        log.learn = pace.learn = SimpleNamespace(epoch=epoch, n_epoch=10, recorder=recorder)
        log.before_epoch()
        pace.before_epoch()
        clock.now += length
        recorder.history.append(dict.fromkeys(HISTORY_COLUMNS, 0.5) | {"valid_loss": loss})
        pace.after_validate()
        log.after_epoch()
        clock.now += 1  # a checkpoint is written
        epoch += 1
    title, *lines = capsys.readouterr().out.strip().splitlines()
    return title, lines


def rows_of(*args, **options):
    """Return what each row says after the AUC, and the sentence after the first."""
    title, (first, forecast, *rows) = lines_of(*args, **options)
    assert title.split()[-2:] == ["time", "left"] and {len(row) for row in (first, *rows)} <= {68, 80}
    return [row[60:].split() for row in (first, *rows)], forecast


def test_from_the_second_epoch_on_a_row_tells_the_least_and_the_most_time_left(monkeypatch, capsys):
    """The first epoch takes a minute more; another program slows the last ones; the lowest loss is the third."""
    losses, seconds = [3, 2, 1, 1, 2, 2, 2], [70, 9, 9, 9, 9, 19, 19]
    rows, forecast = rows_of([], EarlyStopping(patience=4), losses, seconds, monkeypatch, capsys)
    assert rows == [
        ["1:10"],
        ["0:09", "0:40-1:20"],
        ["0:09", "0:40-1:10"],
        ["0:09", "0:30-1:00"],
        ["0:09", "0:20-0:50"],
        ["0:19", "0:12-0:48"],
        ["0:19", "0:00"],
    ]
    assert forecast == "an epoch takes 1:10 min; the rest takes at most 10:30 min (9 epochs)"


def test_a_resumed_phase_counts_its_earlier_epochs_and_measures_anew(monkeypatch, capsys):
    history = [{"phase": "frozen", "valid_loss": 0.1}]
    history += [{"phase": "unfrozen", "valid_loss": loss} for loss in (3, 1, 2, 2)]
    early = EarlyStopping(patience=5)
    rows, forecast = rows_of(history, early, [2, 2, 0.5], [600, 599, 599], monkeypatch, capsys, epoch=4)
    assert rows == [["10:00"], ["9:59", "10:00-40:00"], ["9:59", "30:00"]]
    assert forecast == "an epoch takes 10:00 min; the rest takes at most 50:00 min (5 epochs)"


def test_the_frozen_phase_tells_what_the_unfrozen_one_takes_at_most(monkeypatch, capsys):
    following = Following(20, lambda seconds: 30 * seconds)
    early = EarlyStopping(patience=5)
    _, (_, *said) = lines_of([], early, [3], [4], monkeypatch, capsys, phase="frozen", following=following)
    assert " ".join(said) == (
        "an epoch takes 4 s; the rest takes at most 40:36 min (9 epochs, then at most 20 unfrozen of about 2:00 min "
        "each)"
    )


def test_nothing_is_said_of_a_rest_that_is_none(monkeypatch, capsys):
    following = Following(3, lambda seconds: seconds / 100)
    rest = "; the rest takes less than 1 s (at most 3 unfrozen of less than 1 s each)"
    for left, expected in ((None, ""), (following, rest)):
        _, (_, *said) = lines_of([], EarlyStopping(patience=5), [3], [4], monkeypatch, capsys, epoch=9, following=left)
        assert " ".join(said) == f"an epoch takes 4 s{expected}"


@pytest.mark.parametrize("width", [40, 50, 60, 79])
def test_a_row_fits_into_a_narrow_terminal(width, monkeypatch, capsys):
    monkeypatch.setattr(epoch_log, "terminal_width", lambda: width)
    title, lines = lines_of([], EarlyStopping(patience=4), [3, 2], [70, 9], monkeypatch, capsys)
    assert max(map(len, [title, *lines])) <= width
    assert title.split()[:2] == ["phase", "epoch"] and "valid loss" in title and "AUC" in title
    assert columns_for(80) == list(epoch_log.WIDTHS)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3599.4, "59:59"), (3599.6, "1h00"), (90059, "25h00")]
)
def test_durations(seconds, text):
    assert short_duration(seconds) == text


@pytest.mark.parametrize(
    ("given", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("7200", 7200), (7200, 7200), (1.5, 1.5)]
)
def test_forms_of_a_time_limit(given, seconds):
    assert FitConfig(time_limit=given).seconds_allowed == seconds


@pytest.mark.parametrize("given", ["soon", "", "0", "2 h 3", "-5", "1d"])
def test_another_text_is_no_time_limit(given):
    with pytest.raises(UserError, match="give a time such as 90s, 30m, 2h") as error:
        FitConfig(time_limit=given)
    assert error.value.option == "time_limit"


def planned(seconds, limit=1000.0, n_epoch=100, cooldown=0.4):
    """Train epochs of these lengths, in turn, until the time limit ends the phase; return the plan after each."""
    clock, plans = SimpleNamespace(now=0.0), []
    schedule = Schedule(patience=100, cooldown=cooldown)
    pace = Pace(lambda: clock.now, limit=limit, schedule=schedule)
    pace.learn = schedule.learn = SimpleNamespace(n_epoch=n_epoch)
    pace.before_fit()
    for epoch in range(n_epoch):
        pace.learn = SimpleNamespace(epoch=epoch, n_epoch=n_epoch)
        pace.before_epoch()
        clock.now += seconds[min(epoch, len(seconds) - 1)]
        pace.after_validate()
        plans.append(pace.planned)
        try:
            pace.after_epoch()
        except CancelFitException:
            assert pace.stopped
            break
    return plans, clock.now, schedule


def test_epochs_are_planned_into_the_time_limit():
    plans, now, schedule = planned([100.0])
    assert plans == [9] * 9 and now == 900  # 50 s are kept for the export
    schedule.cut = 1.0
    assert schedule.scale(9 - 1 / 8, 1 / 8) < 0.01  # after the last batch but one


def test_a_plan_grows_before_the_rate_falls_and_shrinks_at_any_time():
    """The first epoch fills caches, the next are faster; then another program takes half of the processor."""
    plans, now, _ = planned([150.0, 50, 50, 50, 50, 50, 50, 50, 100])
    assert plans[0] == 6 and plans[1] == plans[2] == 17
    assert plans[-1] < 17 and len(plans) == plans[-1] and 850 <= now <= 1050
    plans, *_ = planned([100.0, 100, 100, 100, 100, 100, 10])
    assert plans == [9] * 9  # the rate would rise again


def test_a_limit_that_one_epoch_exceeds_and_one_that_all_epochs_meet():
    assert planned([2000.0])[:2] == ([1], 2000)
    assert planned([1.0], n_epoch=7)[:2] == ([7] * 7, 7)


def test_several_processes_use_the_plan_of_the_first(monkeypatch):
    monkeypatch.setattr("xray_fastai.system.distributed.share", lambda plan: 3)
    assert planned([100.0])[0] == [3] * 3


def test_the_frozen_phase_gets_a_share():
    pace = Pace(lambda: 10.0, "frozen", limit=1000.0)
    pace.before_fit()
    assert pace.end == 250
    pace = Pace(lambda: 600.0, "frozen", limit=1000.0)  # its features took long
    pace.before_fit()
    assert pace.end == 650


class Clock(Callback):
    "Lets a batch take a second, whatever it took."

    def __init__(self):
        self.now, self.rates = 0.0, []

    def perf_counter(self):
        return self.now

    monotonic = perf_counter

    def after_batch(self):
        self.now += 1
        self.rates.append(self.opt.hypers[-1]["lr"])


@pytest.fixture
def settings(collection, tmp_path, monkeypatch):
    """Settings of a fit with both phases, in which only batches take time."""
    torch.manual_seed(0)
    torch.save(torchvision.models.get_model(SMALL).state_dict(), tmp_path / "weights.pth")
    clock = Clock()
    monkeypatch.setattr(state, "time", clock)
    return {
        "data": collection, "weights": tmp_path / "weights.pth", "arch": SMALL, "size": 32, "batch_size": 8,
        "workers": 0, "device": "cpu", "patience": 1000, "callbacks": [clock],
    }  # fmt: skip


@pytest.mark.slow
def test_a_fit_with_a_time_limit_plans_both_phases(settings, capsys, monkeypatch):
    """An epoch has 4 batches to train on and 1 to validate."""
    (clock,) = settings["callbacks"]
    monkeypatch.setattr("xray_fastai.training.fit.time", clock)
    result = fit(**settings, time_limit="100s", name="limited")
    assert result.status == "complete" and clock.now <= 100
    phases = settings_of(result.path)["training"]["phases"]
    assert [(phase["name"], phase["epochs"], phase["end"]) for phase in phases] == [
        ("frozen", 5, "the time limit"),
        ("unfrozen", 14, "the time limit"),
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert "time limit 1:40 min for the whole fit, 25 s for the frozen phase" in printed
    assert (
        "an epoch takes 5 s; 5 of 100 epochs fit into the time limit; the rest takes at most 20 s (4 epochs," in printed
    )
    assert "14 of 100 epochs fit into the time limit; the rest takes at most 1:05 min (13 epochs)" in printed
    peak = max(clock.rates[5 * 5 :])
    assert clock.rates[-1] < 0.02 * peak
