"""What `model.json` says of a fit: all that is needed to rebuild its model and to trust it."""

import importlib.metadata
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from xray_fastai import DISCLAIMER, __version__
from xray_fastai.data.dataset import Collection, file_key

if TYPE_CHECKING:
    from xray_fastai.evaluation.subgroups import Group
    from xray_fastai.training.calibration import Calibration
    from xray_fastai.training.plan import Plan

LIBRARIES = ("torch", "torchvision", "fastai", "numpy", "pillow", "scikit-learn", "safetensors")


def model_record(
    plan: "Plan",
    status: str,
    history: list[dict],
    ends: list[str],
    best: dict | None,
    calibration: "Calibration",
    worst: "Group | None",
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
