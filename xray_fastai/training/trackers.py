"""Records a fit in the tools that people look at: TensorBoard, MLflow, Weights & Biases.

Each gets the losses, rates and metrics while the fit trains, and at its end the settings, the figures of the exported
epoch and the learning curves. Files are written beside the folder of exports, under the tools' own default names.
Nothing is sent to a server, unless the tools' own variables (`MLFLOW_TRACKING_URI`, `WANDB_MODE`) say so.

The tools are extras: this module imports one only where `log` names it.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from fastai.vision.all import Callback, Recorder
from PIL import Image

from xray_fastai.config.fit_config import FitConfig
from xray_fastai.export.reader import read
from xray_fastai.export.run_folder import Reservation
from xray_fastai.system.errors import UserError

CURVES, HISTORY = "curves.png", "history.csv"
PROJECT = "xray-fastai"
"""The name of the experiment or project that the runs belong to."""


class Tracker(Protocol):
    """Records one fit in one tool."""

    callback: Callback  # records while the fit trains

    def begin(self, member: int) -> None:
        """Record the next network of an ensemble from now on, numbered from 0."""

    def finish(self, figures: dict[str, float], export: Path) -> None:
        """Record the figures of an export, and its learning curves."""

    def close(self, failed: bool) -> None:
        """End the record of a fit, also after an error."""


def trains_all(callback: Callback) -> bool:
    """Return whether the phase that a callback sees is the unfrozen one."""
    return next(callback.model.parameters()).requires_grad


class TensorBoard:
    """Writes `runs/RUN`, for `tensorboard --logdir runs`, by fastai's callback."""

    def __init__(self, run: Reservation, settings: dict[str, Any]):
        from fastai.callback.tensorboard import TensorBoardCallback

        folder = run.exports.parent / "runs" / run.name

        class OfPhase(TensorBoardCallback):
            """Writes each phase into a folder of its own, because each begins with step 0."""

            name = "tensor_board"
            of_member = ""

            def before_fit(self):
                self.log_dir = folder / self.of_member / ("unfrozen" if trains_all(self) else "frozen")
                super().before_fit()

        self.folder, self.settings = folder, settings
        self.callback = OfPhase(trace_model=False, log_preds=False)  # both would change the random states

    def begin(self, member: int) -> None:
        self.callback.of_member = f"member-{member + 1}"

    def finish(self, figures: dict[str, float], export: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(log_dir=self.folder) as writer:
            for name, value in figures.items():
                writer.add_scalar(f"export/{name}", value)
            writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in self.settings.items()))
            writer.add_image("curves", np.asarray(Image.open(export / CURVES).convert("RGB")), dataformats="HWC")

    def close(self, failed: bool) -> None:
        """Do nothing: fastai's callback closes its file at the end of each phase."""


class LogEpochs(Callback):
    "Record the losses, metrics and rate of each epoch; a step is an epoch of either phase, and of any network."

    order = Recorder.order + 1
    prefix = ""  # of the names, for the networks of an ensemble
    steps = 0  # of the networks before

    def __init__(
        self,
        record: Callable[..., Any],  # takes numbers by name, and the step
    ):
        self.record, self.step = record, 0

    def after_epoch(self):
        row = self.recorder.history[-1]
        values = {name: value for name, value in row.items() if name not in ("phase", "epoch")}
        values |= {"unfrozen": float(trains_all(self))}
        self.step = self.steps + len(self.recorder.history)
        self.record({f"{self.prefix}{name}": value for name, value in values.items()}, step=self.step)

    def begin(self, member: int) -> None:
        "Record the next network of an ensemble, numbered from 0."
        self.prefix, self.steps = f"member_{member + 1}/", self.step


class MLflow:
    """Writes `mlflow.db` and `mlruns`, for `mlflow ui --backend-store-uri sqlite:///mlflow.db`."""

    def __init__(self, run: Reservation, settings: dict[str, Any]):
        import mlflow

        self.mlflow = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            folder = run.exports.parent.absolute()
            mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
            if mlflow.get_experiment_by_name(PROJECT) is None:  # by default, files go into the current folder
                mlflow.create_experiment(PROJECT, artifact_location=(folder / "mlruns").as_uri())
        mlflow.set_experiment(PROJECT)
        mlflow.start_run(run_name=run.name)
        mlflow.log_params(settings)

        self.callback = LogEpochs(mlflow.log_metrics)
        self.begin = self.callback.begin

    def finish(self, figures: dict[str, float], export: Path) -> None:
        self.mlflow.log_metrics({f"export_{name}": value for name, value in figures.items()})
        for name in (CURVES, HISTORY):
            self.mlflow.log_artifact(str(export / name))

    def close(self, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


class WeightsAndBiases:
    """Writes `wandb`, for `wandb sync`; offline unless `WANDB_MODE` is set.

    fastai 2.8.12's `WandbCallback` fails where it reads the learner's arguments ("vars() argument must have __dict__
    attribute").
    """

    def __init__(self, run: Reservation, settings: dict[str, Any]):
        import wandb

        self.wandb = wandb
        mode = os.environ.get("WANDB_MODE", "offline")
        self.run = wandb.init(project=PROJECT, name=run.name, dir=run.exports.parent, mode=mode, config=settings)
        self.callback = LogEpochs(self.run.log)
        self.begin = self.callback.begin

    def finish(self, figures: dict[str, float], export: Path) -> None:
        self.run.summary.update({f"export_{name}": value for name, value in figures.items()})
        self.run.log({"curves": self.wandb.Image(str(export / CURVES))})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


TRACKERS: dict[str, Callable[[Reservation, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


def check_trackers(config: FitConfig) -> None:
    """Check that the tools which `log` names are installed.

    Raises:
        UserError: one is not.
    """
    for name in config.tools:
        if importlib.util.find_spec(name) is None:
            raise UserError(f'not installed; pip install "xray-fastai[{name}]"', option="log", value=name)


@contextmanager
def tracking(config: FitConfig, run: Reservation) -> Iterator[list[Tracker]]:
    """Open the tools that `log` names, with the settings of the fit, and close them at the end."""
    trackers: list[Tracker] = []
    failed = True
    try:
        for name in config.tools:
            trackers.append(TRACKERS[name](run, config.to_dict()))
        yield trackers
        failed = False
    finally:
        for tracker in trackers:
            tracker.close(failed)


def figures_of(export: Path) -> dict[str, float]:
    """Return the figures of an export: those of its best epoch and worst group, calibration, threshold."""
    model = read(export)
    figures = {name: model[name] for name in ("temperature", "threshold") if model[name] is not None}
    best = model["best"] or {}
    figures |= {name: value for name, value in best.items() if name != "phase"}
    measured = (model.get("ensemble") or {}).get("metrics", {})
    figures |= {name: value for name, (value, *_) in measured.items() if value is not None}
    if model["worst_group"] is not None:
        figures["worst_group_roc_auc"] = model["worst_group"]["roc_auc"]
    return {name: float(value) for name, value in figures.items()} | {"seconds": model["training"]["seconds"]}
