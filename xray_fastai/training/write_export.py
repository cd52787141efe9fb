"""Writes the export of a fit; `model.json` records what is needed to rebuild the model and to trust it."""

import contextlib
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import Learner
from safetensors.torch import save

from xray_fastai import DISCLAIMER, __version__
from xray_fastai.config import FitConfig
from xray_fastai.data.dataset import Collection
from xray_fastai.data.labelled import contents_of, file_key
from xray_fastai.data.patients import unknown
from xray_fastai.evaluation.learning_curves import plot_batch, plot_curves
from xray_fastai.evaluation.report import write_report
from xray_fastai.evaluation.subgroups import Group, appearance, worst_group
from xray_fastai.export.run_folder import Reservation
from xray_fastai.export.schema import FORMAT, PICKLE, SETTINGS, WEIGHTS
from xray_fastai.export.weights_file import FACTS, facts_hash
from xray_fastai.model.augmentation import augmentation_values
from xray_fastai.model.learner import set_scaling
from xray_fastai.system.errors import ImageError, UserError, is_write_error, reason
from xray_fastai.system.files import sha256
from xray_fastai.training.calibration import Calibration, Validated, calibrate
from xray_fastai.training.loop import Trainer
from xray_fastai.training.messages import conclude

LIBRARIES = ("torch", "torchvision", "fastai", "numpy", "pillow", "scikit-learn", "safetensors")


def model_record(trainer: Trainer, status: str, calibration: Calibration, worst: Group | None) -> dict[str, Any]:
    """Return the content of `model.json`, except what `write_export` adds.

    Args:
        trainer: after training.
        status: complete, interrupted or diverged.
        calibration: as chosen on the validation split.
        worst: the group of validation images with the lowest ROC AUC.
    """
    plan, progress = trainer.plan, trainer.progress
    config, data = plan.config, plan.data
    total, in_frozen_phase = trainer.parameters
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
        "temperature": calibration.scaling.temperature,
        "intercepts": calibration.scaling.intercepts,
        "threshold": calibration.threshold,
        "calibration": calibration.note,
        "calibrated": calibration.scaling.kind != "none",
        "calibration_kind": calibration.scaling.kind,
        "data": _summary(data),
        "settings": config.to_dict(),
        "training": {
            "device": plan.device_name,
            "precision": plan.precision,
            "weights": plan.origin.name,
            "parameters": {"total": total, "frozen_phase": in_frozen_phase},
            "seconds": round(progress.elapsed, 1),
            "phases": _phases(progress.history, plan.phases, progress.ends),
        },
        "best": trainer.best.row,
        "worst_group": None if worst is None else asdict(worst),
        "versions": {"xray-fastai": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def _phases(history: list[dict], phases: list[tuple[str, int]], ends: list[str]) -> list[dict]:
    phases_trained = []
    for (name, _), end in zip(phases, ends, strict=False):
        rows = [row for row in history if row["phase"] == name]
        best = min(rows, key=lambda row: row["valid_loss"])["epoch"] if rows else None
        phases_trained.append({"name": name, "epochs": len(rows), "best_epoch": best, "end": end})
    return phases_trained


def _summary(data: Collection) -> dict:
    """Return what `model.json` records about the images."""
    return {
        "name": data.name,
        "rehearsal": data.rehearsal,
        "train": data.train.label.value_counts().sort_index().to_dict(),
        "valid": data.valid.label.value_counts().sort_index().to_dict(),
        "patients": {
            "train": int(data.train.patient.nunique()),
            "valid": int(data.valid.patient.nunique()),
            "images_without": int(unknown(data.table).sum()),
        },
        "notes": data.notes,
        "valid_files": sorted(file_key(file) for file in data.valid.file),
        "contents": contents_of(data),
    }


def write_export(run: Reservation, learn: Learner, model: dict[str, Any], history: list[dict]) -> Path:
    """Write all files of an export, then rename the folder to its final name.

    Args:
        run: from `run_folder.reserve`.
        learn: on any device; it is moved to the CPU.
        model: the content of `model.json`; format and weights are added here.
        history: one row an epoch.

    Returns:
        The export's folder.

    Raises:
        UserError: the disk is full or the folder is not writable; the files are deleted, a checkpoint is kept.
    """
    folder = run.partial
    try:
        _move_to_cpu(learn)
        state = {name: tensor.detach().contiguous() for name, tensor in learn.model.state_dict().items()}
        # `save_file` would make the file readable by its owner only
        (folder / WEIGHTS).write_bytes(save(state, metadata={"format": "pt", FACTS: facts_hash(model)}))
        weights = {"file": WEIGHTS, "sha256": sha256(folder / WEIGHTS), "tensors": len(state)}
        text = json.dumps({"format": FORMAT, **model, "weights": weights}, indent=2, allow_nan=False)
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
        pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
        plot_curves(history, folder / "curves.png", model["best"])
        with contextlib.suppress(ImageError):  # the images may have been deleted; the export is written without them
            images, targets = learn.dls.one_batch()
            plot_batch(images, [learn.dls.vocab[i] for i in targets], folder / "batch.png")
        write_report(folder, name=run.final.name)
        learn.export(folder.resolve() / PICKLE)
        for file in filter(Path.is_file, folder.iterdir()):
            with file.open("rb+") as stream:  # Windows writes no file to the disk that is open for reading only
                os.fsync(stream.fileno())
        return run.publish(keep_checkpoint=model["status"] == "interrupted")
    except Exception as error:
        with contextlib.suppress(OSError):  # the checkpoint is kept
            for file in filter(Path.is_file, folder.iterdir()):
                file.unlink()
        # the report's own message is for an export that was given, not for one that is being written
        cause = (error.__context__ or error) if isinstance(error, UserError) else error
        if not is_write_error(cause):
            raise cause from None
        raise UserError(
            f"{run.final}: the export could not be written ({reason(cause)}); "
            "free space, or check that the folder exists and is writable"
        ) from None


def _move_to_cpu(learn: Learner) -> None:
    """Move all tensors that `learner.pkl` will hold; `learn.export` leaves out the optimizer and the last batch."""
    learn.model.to("cpu", memory_format=torch.contiguous_format)
    learn.dls.to("cpu")
    learn.loss_func.to("cpu")
    learn.loss_grad = learn.smooth_loss = None  # the last batch's
    for metric in (*learn.metrics, learn.recorder.loss, learn.recorder.smooth_loss):
        metric.reset()  # sums of the last epoch


@dataclass
class Result:
    """Holds the result of a fit."""

    path: Path  # the export
    status: str  # complete, interrupted or diverged
    history: list[dict] = field(repr=False)
    config: FitConfig = field(repr=False)
    signal: int | None = None  # the signal that interrupted it
    error: str | None = None  # why it diverged, or None


def export_learner(trainer: Trainer, run: Reservation) -> Result:
    """Calibrate the trained model, write its export, and print how the fit ended.

    Raises:
        UserError: the loss was not finite before the first epoch ended, or the export cannot be written.
    """
    plan, best, history = trainer.plan, trainer.best, trainer.progress.history
    if trainer.error and best.row is None:
        raise UserError(
            f"{trainer.error}; no epoch was completed, so nothing is exported; try a lower --lr than {plan.config.lr:g}"
        )
    calibration, worst, called = Calibration(threshold=None if _positive(plan.data) is None else 0.5), None, None
    if best.row is not None:
        images = _validated(trainer)
        config = plan.config
        calibration = calibrate(images, config.calibration, _positive(plan.data), config.target_sensitivity)
        probabilities = calibration.probabilities(images.logits)
        worst = _worst_group(plan.data, probabilities)
        called = _called(plan.data, probabilities, calibration.threshold)
    set_scaling(trainer.learn, calibration.scaling.temperature, calibration.scaling.intercepts)
    received = trainer.stop.received
    status = "diverged" if trainer.error else "interrupted" if received is not None else "complete"
    model = model_record(trainer, status, calibration, worst) | {"called": called}
    path = write_export(run, trainer.learn, model, history)
    conclude(path, model, run)
    return Result(path, status, history, plan.config, received, trainer.error)


def _validated(trainer: Trainer) -> Validated:
    """Return what the best epoch's calibration is chosen from."""
    plan, best = trainer.plan, trainer.best
    data, classes = plan.data, plan.data.classes
    return Validated(
        logits=best.logits.float().cpu().numpy(),
        targets=best.targets.cpu().numpy(),
        patients=pd.factorize(data.valid.patient)[0],
        weights=np.array(plan.class_weights or [1.0] * len(classes)),
        trained=data.train.label.value_counts().loc[classes].to_numpy(),
    )


def _positive(data: Collection) -> int | None:
    """Return the index of the class to detect; None with more than two classes: the most probable is predicted."""
    return data.classes.index(data.positive) if data.positive and len(data.classes) == 2 else None


def _called(data: Collection, probabilities: np.ndarray, threshold: float | None) -> dict[str, int]:
    """Count the validation images by the class that is predicted for them."""
    positive, predicted = _positive(data), probabilities.argmax(axis=1)
    if positive is not None:
        predicted = np.where(probabilities[:, positive] >= threshold, positive, 1 - positive)
    return dict(zip(data.classes, np.bincount(predicted, minlength=len(data.classes)).tolist(), strict=True))


def _worst_group(data: Collection, probabilities: np.ndarray) -> Group | None:
    """Return the group of validation images with the lowest ROC AUC, or None where it cannot be determined."""
    if _positive(data) is None:
        return None
    with contextlib.suppress(ImageError):  # the images may have been deleted; the export is written without them
        looks = appearance(list(data.valid.path), list(data.valid.width / data.valid.height))
        positives = (data.valid.label == data.positive).to_numpy()
        return worst_group(looks, positives, data.valid.patient.to_numpy(), probabilities[:, _positive(data)])
    return None
