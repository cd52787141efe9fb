"""What `model.json` says of a fit: all that is needed to rebuild its model and to trust it."""

import contextlib
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fastai.vision.all import Learner
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import save
from scipy.special import softmax

from xray_fastai import DISCLAIMER, __version__
from xray_fastai.config import FitConfig
from xray_fastai.data.dataset import Collection, file_key
from xray_fastai.evaluation.learning_curves import plot_batch, plot_curves
from xray_fastai.evaluation.report import write_report
from xray_fastai.evaluation.subgroups import Group, appearance, worst_group
from xray_fastai.export.run_folder import Reservation
from xray_fastai.export.schema import FORMAT, PICKLE, SETTINGS, WEIGHTS
from xray_fastai.model.augmentation import augmentation_values
from xray_fastai.model.learner import set_temperature
from xray_fastai.system.errors import ImageError, UserError, reason
from xray_fastai.system.files import sha256
from xray_fastai.training.calibration import Calibration, calibrate
from xray_fastai.training.callbacks import BestWeights, StopOnSignal
from xray_fastai.training.messages import conclude
from xray_fastai.training.plan import Plan

LIBRARIES = ("torch", "torchvision", "fastai", "numpy", "pillow", "scikit-learn", "safetensors")


def model_record(
    plan: Plan,
    status: str,
    history: list[dict],
    ends: list[str],
    best: dict | None,
    calibration: Calibration,
    worst: Group | None,
    seconds: float,
) -> dict[str, Any]:
    """The content of `model.json`, but for what `bundle.write` adds.

    Args:
        plan: what was trained, on what.
        status: complete, interrupted or diverged.
        history: a row an epoch.
        ends: what ended each phase.
        best: the row of the epoch whose weights are exported.
        calibration: as settled on the validation split.
        worst: the validation images that the model does worst on.
        seconds: that the fit took, in all its processes.
    """
    config, data = plan.config, plan.data
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": status,
        "disclaimer": DISCLAIMER,
        "architecture": config.arch,
        "classes": data.classes,
        "positive": data.positive,
        "dropout": config.dropout,
        "class_weights": plan.class_weights,
        "preprocessing": {
            "size": config.size,
            "channels": "grey",
            "resize": "whole image, bilinear",
            "contrast": config.contrast,
            "scale": "imagenet",
        },
        "augmentation": augmentation_values(config.augment),
        "temperature": calibration.temperature,
        "threshold": calibration.threshold,
        "calibration": calibration.note,
        "data": _summary(data),
        "settings": config.to_dict(),
        "training": {
            "device": plan.device_name,
            "precision": plan.precision,
            "weights": plan.origin,
            "parameters": {"total": plan.parameters[0], "frozen_phase": plan.parameters[1]},
            "seconds": round(seconds, 1),
            "phases": _phases(history, plan.phases, ends),
        },
        "best": best,
        "worst_group": None if worst is None else asdict(worst),
        "versions": {"xray-fastai": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _phases(history: list[dict], phases: list[tuple[str, int]], ends: list[str]) -> list[dict]:
    told = []
    for (name, _), end in zip(phases, ends, strict=False):
        rows = [row for row in history if row["phase"] == name]
        best = min(rows, key=lambda row: row["valid_loss"])["epoch"] if rows else None
        told.append({"name": name, "epochs": len(rows), "best_epoch": best, "end": end})
    return told


def _summary(data: Collection) -> dict:
    """What `model.json` says of the images."""
    return {
        "name": data.name,
        "rehearsal": data.rehearsal,
        "train": data.train.label.value_counts().sort_index().to_dict(),
        "valid": data.valid.label.value_counts().sort_index().to_dict(),
        "patients": {"train": int(data.train.patient.nunique()), "valid": int(data.valid.patient.nunique())},
        "notes": data.notes,
        "valid_files": sorted(file_key(file) for file in data.valid.file),
    }


def write_export(run: Reservation, learn: Learner, model: dict[str, Any], history: list[dict]) -> Path:
    """Write all files of an export, then give the folder its name.

    Args:
        run: from `runs.reserve`.
        learn: on any device; it is moved to the CPU.
        model: what goes into `model.json`; format and weights are added here.
        history: a row an epoch.

    Raises:
        UserError: the disk is full or the folder can't be written to; no half export is left behind.
    """

    folder = run.partial
    try:
        learn.model.to("cpu", memory_format=torch.contiguous_format)
        learn.dls.to("cpu")
        state = {name: tensor.detach().contiguous() for name, tensor in learn.model.state_dict().items()}
        (folder / WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))  # save_file would make it private
        weights = {"file": WEIGHTS, "sha256": sha256(folder / WEIGHTS), "tensors": len(state)}
        text = json.dumps({"format": FORMAT, **model, "weights": weights}, indent=2, allow_nan=False)
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
        pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
        plot_curves(history, folder / "curves.png", model["best"])
        with contextlib.suppress(ImageError):  # the images may be gone by now; the export is not to be lost for that
            images, targets = learn.dls.one_batch()
            plot_batch(images, [learn.dls.vocab[i] for i in targets], folder / "batch.png")
        write_report(folder, name=run.final.name)
        learn.export(folder.resolve() / PICKLE)
        for file in filter(Path.is_file, folder.iterdir()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        return run.publish(keep_checkpoint=model["status"] == "interrupted")
    except (OSError, SafetensorError, RuntimeError, UserError) as error:
        with contextlib.suppress(OSError):  # the checkpoint alone stays
            for file in filter(Path.is_file, folder.iterdir()):
                file.unlink()
        raise UserError(
            f"{run.final}: the export could not be written ({reason(error)}); "
            "free space, or see that the folder is there and can be written to"
        ) from None


@dataclass
class Result:
    """What a fit ended with."""

    path: Path  # the export
    status: str  # complete, interrupted or diverged
    history: list[dict] = field(repr=False)
    config: FitConfig = field(repr=False)
    signal: int | None = None  # the one that interrupted it
    error: str | None = None  # why it diverged


def export_learner(
    plan: Plan,
    run: Reservation,
    learn: Learner,
    progress: Progress,
    best: BestWeights,
    stop: StopOnSignal,
    error: str | None,
) -> Result:

    data, history = plan.data, progress.history
    if error and best.row is None:
        raise UserError(
            f"{error}; no epoch was completed, so nothing is exported; try a lower --lr than {plan.config.lr:g}"
        )
    # of more than two classes the most probable is called, so there is no threshold
    positive = data.classes.index(data.positive) if data.positive and len(data.classes) == 2 else None
    calibration = Calibration(threshold=None if positive is None else 0.5)
    if best.row is not None:
        outputs = best.logits.float().cpu().numpy(), best.targets.cpu().numpy()
        calibration = calibrate(*outputs, positive, plan.config.target_sensitivity)
    set_temperature(learn, calibration.temperature)
    status = "diverged" if error else "interrupted" if stop.received is not None else "complete"
    worst = None
    if best.row is not None and positive is not None:
        with contextlib.suppress(ImageError):  # the images may be gone by now; the export is not to be lost for that
            scores = softmax(outputs[0] / calibration.temperature, axis=1)[:, positive]
            looks = appearance(list(data.valid.path), list(data.valid.width / data.valid.height))
            positives = (data.valid.label == data.positive).to_numpy()
            worst = worst_group(looks, positives, data.valid.patient.to_numpy(), scores)
    model = model_record(plan, status, history, progress.ends, best.row, calibration, worst, progress.elapsed)
    path = write_export(run, learn, model, history)
    conclude(path, model, run)
    return Result(path, status, history, plan.config, stop.received, error)
