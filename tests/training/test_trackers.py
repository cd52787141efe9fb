"""The tools that record a fit: none is imported unasked, a missing one is named, and TensorBoard's files are read."""

import sys
from pathlib import Path

import pytest

from tests.small_network import NAME as SMALL
from xray_fastai import FitConfig, fit
from xray_fastai.config.choices import TOOLS
from xray_fastai.system.errors import UserError
from xray_fastai.training import trackers


@pytest.fixture
def settings(collection):
    return {
        "data": collection, "weights": "none", "arch": SMALL, "size": 32, "batch_size": 8, "workers": 0,
        "device": "cpu", "epochs": 2, "name": "recorded",
    }  # fmt: skip


@pytest.mark.parametrize("log", ["tensorboards", "mlflow,", "wandb,wandb", ""])
def test_another_tool_is_refused(log):
    with pytest.raises(UserError, match="give one or more of tensorboard, mlflow, wandb") as error:
        FitConfig(log=log)
    assert error.value.option == "log"


def test_a_tool_that_is_not_installed(settings, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else name)
    with pytest.raises(UserError) as error:
        fit(**settings, log="tensorboard,mlflow")
    assert str(error.value) == 'log mlflow: not installed; pip install "xray-fastai[mlflow]"'
    assert not list(Path("exports").iterdir())


@pytest.mark.slow
def test_without_the_option_none_is_imported(settings, monkeypatch):
    for name in TOOLS:
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    assert fit(**settings).status == "complete"
    assert not any(Path(name).exists() for name in ("runs", "mlruns", "mlflow.db", "wandb"))


@pytest.mark.slow
def test_tensorboard_gets_both_the_history_and_the_export(settings):
    pytest.importorskip("tensorboard", reason="tensorboard is an extra that is not installed here")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(**settings, log="tensorboard")
    events = EventAccumulator("runs/recorded/unfrozen").Reload()
    losses = [event.value for event in events.Scalars("valid_loss")]
    assert losses == pytest.approx([row["valid_loss"] for row in result.history])
    events = EventAccumulator("runs/recorded").Reload()
    assert events.Scalars("export/roc_auc")[0].value == pytest.approx(result.best["roc_auc"])
    assert events.Tags()["images"] == ["curves"]


@pytest.mark.slow
def test_mlflow_gets_both_the_history_and_the_export(settings):
    """Its files lie beside the folder of exports, wherever the fit ran."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is an extra that is not installed here")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny keeps no database")
    result = fit(**settings, log="mlflow", exports="kept/exports")
    (run,) = mlflow.search_runs(experiment_names=["xray-fastai"], output_format="list")
    assert run.info.status == "FINISHED" and run.data.params["epochs"] == "2"
    assert run.data.metrics["export_roc_auc"] == pytest.approx(result.best["roc_auc"])
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "valid_loss")
    assert [entry.value for entry in history] == pytest.approx([row["valid_loss"] for row in result.history])
    assert {path.name for path in Path("kept/mlruns").rglob("*.*")} == {"curves.png", "history.csv"}
    assert Path("kept/mlflow.db").is_file() and not Path("mlruns").exists()


@pytest.mark.slow
def test_wandb_gets_both_the_history_and_the_export(settings, monkeypatch):
    """It has no reader of what it writes offline, so its calls are watched, too."""
    wandb = pytest.importorskip("wandb", reason="wandb is an extra that is not installed here")
    rows, ends, log, finish = [], [], wandb.Run.log, wandb.Run.finish

    def logged(run, values, step=None):
        rows.append(values)
        log(run, values, step=step)

    def finished(run, exit_code):
        ends.append((exit_code, run.offline, run.config["epochs"], run.summary["export_roc_auc"]))
        finish(run, exit_code)

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb.Run, "log", logged)
    monkeypatch.setattr(wandb.Run, "finish", finished)
    result = fit(**settings, log="wandb", exports="kept/exports")
    assert ends == [(0, True, 2, result.best["roc_auc"])]
    assert [row["valid_loss"] for row in rows[:-1]] == [row["valid_loss"] for row in result.history]
    (folder,) = Path("kept/wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb")) and list(folder.rglob("curves*.png"))
