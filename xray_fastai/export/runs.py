"""Lists the runs in a folder of exports, and the settings in which two differ; neither torch nor pandas is imported."""

import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from xray_fastai.config.choices import network_of
from xray_fastai.export.layout import SETTINGS
from xray_fastai.export.model_json import read_settings
from xray_fastai.export.reader import default_export, find_export
from xray_fastai.export.run_folder import unfinished
from xray_fastai.system.errors import UserError
from xray_fastai.system.untrusted import read_received

METRICS_LIMIT = 5_000_000
"""Bytes of a `metrics.json`."""
SORTS = ("date", "name", "data", "network", "valid", "test", "status")
"""What the runs can be sorted by; dates and AUCs from the newest and the best."""


@dataclass(frozen=True)
class Auc:
    """A ROC AUC with its 95 % interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Run:
    """Describes one run; what it does not have is None."""

    name: str
    path: str
    date: str | None = None  # ISO 8601
    data: str | None = None  # the folder's name, without its path
    images: int | None = None  # of training and validation
    network: str | None = None  # architecture and size
    valid: Auc | None = None  # with an interval if `evaluate --split valid` was run, and of an ensemble
    valid_images: int | None = None  # that it was measured on
    out_of_fold: bool = False  # whether these are all images, each judged by a network that was not trained on it
    test: Auc | None = None  # of evaluation-test, if `evaluate` was run
    worst_group: str | None = None
    worst: Auc | None = None  # of the worst group
    status: str = "complete"  # or interrupted, diverged, unfinished, broken
    default: bool = False  # whether a command takes this one if none is given
    fault: str | None = None  # why the run is broken, or how to resume it


def list_runs(exports: str | Path = "exports", sort: str = "date") -> list[Run]:
    """List the exports and the unfinished runs in a folder. A damaged one is listed as broken, and is no error.

    Args:
        exports: the folder.
        sort: one of `SORTS`.

    Raises:
        UserError: there is no such folder.
    """
    exports = Path(exports)
    try:
        folders = [path for path in exports.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{exports}: {error.strerror}; make an export by 'xray-fastai fit'") from None
    try:
        chosen = default_export(exports)[0].resolve()
    except UserError:  # none yet, or a choice that is gone: `xray-fastai default` says it
        chosen = None
    runs = [_run(path, chosen) for path in folders if os.path.lexists(path / SETTINGS)]
    for crashed in unfinished(exports):
        if crashed.path.name.startswith("."):
            when = datetime.fromtimestamp(crashed.when).astimezone().isoformat(timespec="seconds")
            advice = f"xray-fastai fit --resume {crashed.name}" if crashed.usable else "no settings; delete it"
            runs.append(Run(crashed.name, str(crashed.path), when, status="unfinished", fault=advice))
    runs.sort(key=lambda run: run.name)
    if sort == "date":
        return sorted(
            runs, key=lambda run: datetime.fromisoformat(run.date).timestamp() if run.date else 0.0, reverse=True
        )
    if sort in ("valid", "test"):
        return sorted(runs, key=lambda run: auc.value if (auc := getattr(run, sort)) else -1.0, reverse=True)
    return sorted(runs, key=lambda run: str(getattr(run, sort) or ""))


def one_run(name: str | Path, exports: str | Path = "exports") -> tuple[Run, dict[str, Any]]:
    """Return one export as in the list, and what was set for its fit.

    Args:
        name: its folder, or its name in `exports`.
        exports: the folder of the runs.

    Raises:
        UserError: there is no such export, or it is damaged.
    """
    inside = Path(exports) / name
    path = find_export(inside if inside.is_dir() else name)
    settings = _settings(read_settings(path))
    try:
        chosen = default_export(exports)[0].resolve()
    except UserError:
        chosen = None
    return _run(path, chosen), settings


def to_json(runs: list[Run]) -> str:
    """Return runs as JSON, the intervals as value, low and high."""
    return json.dumps([asdict(run) for run in runs], indent=2)


def differing_settings(a: str | Path, b: str | Path) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two exports differ, by their names in Python.

    Raises:
        UserError: one is no export, or is damaged.
    """
    first, second = (_settings(read_settings(find_export(path))) for path in (a, b))
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _settings(model: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a fit without its name and folder, and what was chosen by its images and machine."""
    settings = {name: value for name, value in model["settings"].items() if name not in ("name", "exports")}
    counts = {f"{split} images": sum(model["data"][split].values()) for split in ("train", "valid")}
    return settings | counts | {"device used": model["training"]["device"]}


def _run(path: Path, chosen: Path | None) -> Run:
    name, is_default = path.name, path.resolve() == chosen
    try:
        model = read_settings(find_export(path))
    except UserError as error:
        return Run(name, str(path), status="broken", default=is_default, fault=str(error))
    data, ensemble = model["data"], model.get("ensemble")
    valid, test = _evaluated(path, "valid"), _evaluated(path, "test")
    worst = (test or {}).get("worst_group") or model["worst_group"]
    return Run(
        name,
        str(path),
        date=model["created"],
        data=data["name"].replace("\\", "/").rstrip("/").rpartition("/")[2],
        images=sum(data["train"].values()) + sum(data["valid"].values()),
        network=f"{network_of(model)} {model['preprocessing']['size']}",
        valid=_auc(valid) or _auc_of_fit(model),
        valid_images=(ensemble or {}).get("images") or sum(data["valid"].values()),
        out_of_fold=bool(ensemble) and ensemble["outputs"] == "out of fold",
        test=_auc(test),
        worst_group=worst["name"] if worst else None,
        worst=Auc(worst["roc_auc"], worst["low"], worst["high"]) if worst else None,
        status=model["status"],
        default=is_default,
    )


def _evaluated(export: Path, split: str) -> dict[str, Any] | None:
    """Return the content of an evaluation's metrics.json; None if there is none, or it is damaged."""
    try:
        content = json.loads(read_received(export / f"evaluation-{split}", "metrics.json", METRICS_LIMIT))
        _auc(content)
    except (UserError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return content


def _auc_of_fit(model: dict[str, Any]) -> Auc | None:
    """Return the AUC that a fit measured on its validation images; of an ensemble with its interval."""
    if ensemble := model.get("ensemble"):
        value, low, high = ensemble["metrics"].get("roc_auc") or (None, None, None)
        return None if value is None else Auc(value, low, high)
    return Auc(model["best"]["roc_auc"]) if model["best"] else None


def _auc(metrics: dict[str, Any] | None) -> Auc | None:
    """Return the AUC of the content of a metrics.json; None if it is undefined, as of images of one class."""
    if metrics is None or (found := metrics["metrics"]["roc_auc"])["value"] is None:
        return None
    return Auc(float(found["value"]), found.get("low"), found.get("high"))
