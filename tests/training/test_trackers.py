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
    mlflow = pytest.importorskip("mlflow", reason="mlflow is an extra that is not installed here")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny keeps no database")
    result = fit(**settings, log="mlflow")
    (run,) = mlflow.search_runs(experiment_names=["xray-fastai"], output_format="list")
    assert run.info.status == "FINISHED" and run.data.params["epochs"] == "2"
    assert run.data.metrics["export_roc_auc"] == pytest.approx(result.best["roc_auc"])
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "valid_loss")
    assert [entry.value for entry in history] == pytest.approx([row["valid_loss"] for row in result.history])


@pytest.mark.slow
def test_wandb_writes_offline(settings):
    pytest.importorskip("wandb", reason="wandb is an extra that is not installed here")
    fit(**settings, log="wandb")
    (folder,) = Path("wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
