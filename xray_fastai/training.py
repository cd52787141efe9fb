"""A fit from split folders to an export: frozen phase, unfrozen phase, early stopping, best weights."""

import importlib.metadata
import platform
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from xray_fastai import __version__, bundle
from xray_fastai.audit import fit_notes
from xray_fastai.config import FitConfig
from xray_fastai.dataset import Collection, file_key, read_collection
from xray_fastai.errors import UserError

if TYPE_CHECKING:
    from fastai.vision.all import Learner

    from xray_fastai.callbacks import EpochLog

DISCLAIMER = "For research and teaching. It is no medical device; never diagnose by it."
LIBRARIES = ("torch", "torchvision", "fastai", "numpy", "pillow", "scikit-learn", "safetensors")


@dataclass
class Result:
    """What a fit ended with."""

    path: Path  # the export
    status: str  # complete, interrupted or diverged
    history: list[dict] = field(repr=False)
    signal: int | None = None  # the one that interrupted it
    error: str | None = None  # why it diverged


def fit(config: FitConfig | None = None, **settings) -> Result:
    """Train a classifier and export it; what is done is printed as it goes.

    Args:
        config: the settings; or give them by name, as in `fit(data="chest_xray", epochs=5)`.
        **settings: fields of `FitConfig`.

    Raises:
        UserError: bad input, by name; nothing is left behind.
    """
    config = FitConfig(**settings) if config is None else config
    started = time.perf_counter()
    with bundle.reserve(config.exports, config.name) as run:
        config, data = read_collection(config)
        data.notes.extend(fit_notes(data))
        return _fit(config, data, run, started)


def _fit(config: FitConfig, data: Collection, run: bundle.Reservation, started: float) -> Result:
    from fastai.vision.all import ProgressCallback, set_seed

    from xray_fastai.calibration import Calibration, calibrate
    from xray_fastai.callbacks import BestWeights, EarlyStopping, EpochLog, StopOnNonFiniteLoss, StopOnSignal
    from xray_fastai.device import choose_device, choose_precision, describe, precision_callbacks
    from xray_fastai.learner import build_learner, class_weight_values, parameter_counts, set_temperature
    from xray_fastai.loaders import default_workers, make_loaders
    from xray_fastai.weights import pretrained_state

    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    config = config.with_choices(workers=default_workers(device))
    pretrained = None if config.weights == "none" else pretrained_state(config.arch, config.weights)
    class_weights = class_weight_values(config, data.train.label, data.classes)
    batch_size = min(config.batch_size, len(data.train))
    set_seed(config.seed, reproducible=device.type == "cpu")
    dls = make_loaders(data.table, data.classes, config.size, batch_size, device, config.workers)
    learn = build_learner(dls, config.arch, dropout=config.dropout, class_weights=class_weights, pretrained=pretrained)
    learn.remove_cb(ProgressCallback)  # `EpochLog` shows the progress
    learn.freeze()
    total, head = parameter_counts(learn)

    origin = "none: from scratch" if pretrained is None else pretrained[1]
    shown = class_weights or [1] * len(data.classes)
    weighed = ", ".join(f"{label} {weight:.3g}" for label, weight in zip(data.classes, shown, strict=True))
    phases = [("frozen", config.freeze_epochs), ("unfrozen", config.epochs)]
    if pretrained is None or config.freeze_epochs == 0:
        phases = phases[1:]
    _announce(data)
    print(f"network       {config.arch}, {config.size} x {config.size} px, weights {origin}")
    print(f"parameters    {head:,} of {total:,} train in the frozen phase, all in the unfrozen")
    loading = f"{config.workers} loading processes" if config.workers else "images loaded in the same process"
    print(f"device        {describe(device)}, precision {precision}, {loading}")
    print(f"loss weights  {weighed}")
    if batch_size < config.batch_size:
        print(f"batch size    {batch_size}, all training images, instead of {config.batch_size}")
    if pretrained is None:
        print("frozen phase  skipped: without pretrained weights the backbone's features are random")

    history: list[dict] = []
    best = BestWeights(history)
    ends: list[str] = []
    with StopOnSignal() as stop:
        for name, epochs in phases:
            log, early, finite = EpochLog(history, name), EarlyStopping(patience=config.patience), StopOnNonFiniteLoss()
            callbacks = [log, best, early, finite, stop, *precision_callbacks(precision, device)]
            try:
                _train_phase(learn, config, name, epochs, pretrained is not None, callbacks, log)
            except RuntimeError:  # a SIGTERM to the whole job ends torch's loading processes at once
                if stop.received is None:
                    raise
                best.restore()
            if stop.received is not None:
                ends.append("an interruption")
                break
            if finite.where:
                ends.append(f"the loss was not finite at {finite.where}")
                break
            ends.append("early stopping" if early.stopped else "reaching its last epoch")
    error = f"{name} phase: {ends[-1]}" if finite.where else None
    if error and best.row is None:
        raise UserError(f"{error}; no epoch was completed, so nothing is exported; try a lower --lr than {config.lr:g}")
    # of more than two classes the most probable is called, so there is no threshold
    positive = data.classes.index(data.positive) if data.positive and len(data.classes) == 2 else None
    calibration = Calibration(threshold=None if positive is None else 0.5)
    if best.row is not None:
        outputs = best.logits.float().cpu().numpy(), best.targets.cpu().numpy()
        calibration = calibrate(*outputs, positive, config.target_sensitivity)
    set_temperature(learn, calibration.temperature)
    status = "diverged" if error else "interrupted" if stop.received is not None else "complete"
    model = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": status,
        "disclaimer": DISCLAIMER,
        "architecture": config.arch,
        "classes": data.classes,
        "positive": data.positive,
        "dropout": config.dropout,
        "class_weights": class_weights,
        "preprocessing": {
            "size": config.size,
            "channels": "grey",
            "resize": "whole image, bilinear",
            "scale": "imagenet",
        },
        "temperature": calibration.temperature,
        "threshold": calibration.threshold,
        "calibration": calibration.note,
        "data": _summary(data),
        "settings": config.to_dict(),
        "training": {
            "device": describe(device),
            "precision": precision,
            "weights": origin,
            "parameters": {"total": total, "frozen_phase": head},
            "seconds": round(time.perf_counter() - started, 1),
            "phases": _phases(history, phases, ends),
        },
        "best": best.row,
        "versions": {"xray-fastai": __version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    path = bundle.write(run, learn, model, history)
    _conclude(path, model)
    return Result(path, status, history, stop.received, error)


def _train_phase(
    learn: "Learner", config: FitConfig, name: str, epochs: int, pretrained: bool, callbacks: list, log: "EpochLog"
) -> None:
    from fastai.callback.channelslast import ChannelsLast

    from xray_fastai.callbacks import Schedule
    from xray_fastai.learner import FrozenBody

    callbacks = [*callbacks, Schedule(patience=max(1, config.patience // 2)), ChannelsLast()]
    if name == "frozen":
        learn.freeze()
        callbacks.append(FrozenBody())
    else:
        learn.unfreeze()
    # as fastai's fine_tune: half the peak rate once unfrozen, a hundredth of that for the first layers
    lr = slice(config.lr / 200, config.lr / 2) if pretrained and name == "unfrozen" else config.lr
    try:
        with learn.no_logging():  # `log` prints the rows
            learn.fit(epochs, lr=lr, cbs=callbacks, reset_opt=True)
    finally:
        log.close()


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


def _announce(data: Collection) -> None:
    if data.rehearsal:
        print(
            "REHEARSAL on X-rays that this program draws itself: the model will know nothing of patients.\n"
            "For the real collection, get 'Chest X-Ray Images (Pneumonia)' (Kaggle, or\n"
            "doi:10.17632/rscbjbr9sj), unpack it here, or give its folder by --data.\n"
        )
    print(f"data          {data.name}")
    for title, table in [("training", data.train), ("validation", data.valid)]:
        counts = ", ".join(f"{count:,} {label}" for label, count in table.label.value_counts().sort_index().items())
        print(f"{title:<14}{len(table):,} images of {table.patient.nunique():,} patients: {counts}")
    for note in (*data.notes, *data.skipped):
        print(f"              {note}")
    print(f"classes       {', '.join(data.classes)}" + (f"; to detect: {data.positive}" if data.positive else ""))


def _conclude(path: Path, model: dict) -> None:
    print()
    for phase in model["training"]["phases"]:
        epochs = f"{phase['epochs']} epoch{'' if phase['epochs'] == 1 else 's'}"
        print(f"{phase['name']} phase: {epochs}, the best {phase['best_epoch']}; ended by {phase['end']}")
    if best := model["best"]:
        print(
            f"best weights: {best['phase']} epoch {best['epoch']}, validation loss {best['valid_loss']:.4f}, "
            f"accuracy {best['accuracy']:.3f}, AUC {best['roc_auc']:.3f}"
        )
    else:
        print("no epoch was completed: the weights are those of the moment")
    threshold = "" if model["threshold"] is None else f", decision threshold {model['threshold']:.3f}"
    print(f"temperature {model['temperature']:.3f}{threshold} ({model['calibration']})")
    print(f"export: {path}")
    print(f"report: {path / 'report.html'}")
    print(f"next: xray-fastai evaluate --model {path}\n      xray-fastai interpret --model {path}")
    print(DISCLAIMER)
