"""An export, predicting images whose truth is known, becomes metrics with intervals, a table of predictions, plots."""

import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from xray_fastai.data.dataset import labelled_images
from xray_fastai.evaluation import plots
from xray_fastai.evaluation.evaluation_result import Evaluation
from xray_fastai.evaluation.report import write_report
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.stream import predict_all
from xray_fastai.inference.tta import describe as describe_tta
from xray_fastai.metrics import RESAMPLES, Interval, Measured, Scored, measure
from xray_fastai.system.device import describe
from xray_fastai.system.errors import UserError
from xray_fastai.system.files import replaced

FORMAT = 1
"""The layout of `metrics.json`."""
METRICS, PREDICTIONS = "metrics.json", "predictions.csv"
SPLITS = {
    "test": None,
    "valid": "fit chose its epoch, temperature and threshold on this split: expect less of new images",
    "train": "the model was trained on these images: expect less of new ones",
}
"""What can be evaluated, and what to hold against it."""


def evaluate(
    model: str | Path | None = None,
    data: str | Path | None = None,
    split: str = "test",
    threshold: str | float = "auto",
    *,
    uncalibrated: bool = False,
    tta: bool = False,
    output: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Evaluation:
    """Metrics with 95 % intervals, predictions and plots, written to `evaluation-<split>/` in the export.

    Args:
        model: the export's folder; None is the newest in ./exports.
        data: the folder that holds the split; None is the one that `fit` used.
        split: test, valid (the images that `fit` validated on) or train.
        threshold: from which probability on an image is called positive; auto is the one that `fit` chose.
        uncalibrated: leave out the temperature. The threshold that `fit` chose is then moved with it.
        tta: test-time augmentation (`xray_fastai.inference.tta`): the mean over five views of each image.
        output: the folder to write `evaluation-<split>/` into instead of the export.
        device: auto, cpu, cuda or mps.
        precision: auto, fp32 or bf16 (`inference.open_model`).

    Raises:
        UserError: no export, no such images, one that can't be read, or nowhere to write to; by name.
    """
    if split not in SPLITS:
        raise UserError(f"choose one of {', '.join(SPLITS)}", option="split", value=split)
    given = _threshold(threshold)
    opened = open_model(model, device, precision)
    table = labelled_images(opened.settings, data, split)
    if table.empty:
        raise UserError("no image is left in it without those that fit validated on", option="split", value=split)
    thresholds = _operating_points(opened, given, uncalibrated)
    final = Path(opened.path if output is None else output) / f"evaluation-{split}"
    with replaced(final, METRICS) as folder:
        start = time.perf_counter()
        logits = predict_all(opened, table.path, tta)
        seconds = time.perf_counter() - start
        probabilities = opened.probabilities(logits, not uncalibrated)
        truth = np.array([opened.classes.index(label) for label in table.label])
        positive = opened.classes.index(opened.positive) if len(opened.classes) == 2 else None
        scored = Scored(truth, probabilities, pd.factorize(table.patient)[0], positive)
        called = {name: opened.decide(probabilities, at) for name, at in thresholds.items()}
        measured = measure(scored, called)
        summary = _summary(opened, data, split, uncalibrated, thresholds, scored, called, measured) | {"tta": tta}
        predictions = _predictions(opened.classes, table, scored, called["chosen"])
        about = _about(opened, summary, given) | ({"tta": describe_tta(seconds)} if tta else {})
        result = Evaluation(final, summary, predictions, about)
        (folder / METRICS).write_text(result.to_json() + "\n", encoding="utf-8")
        # a file name may hold bytes that are no text
        predictions.to_csv(folder / PREDICTIONS, index=False, encoding="utf-8", errors="backslashreplace")
        plots.plot_evaluation(folder, summary, scored, measured)
    write_report(opened.path, output)
    return result


def _threshold(text: str | float) -> float | None:
    if text == "auto":
        return None
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise UserError("give auto, or a probability from 0 to 1", option="threshold", value=text)
    return value


def _operating_points(model: Model, given: float | None, uncalibrated: bool) -> dict[str, float | None]:
    """The thresholds; one without a number where there are more than two classes."""
    if len(model.classes) != 2:
        if given is not None:
            raise UserError(
                f"of {len(model.classes)} classes the most probable is called", option="threshold", value=f"{given:g}"
            )
        return {"chosen": None}
    return {"0.5": 0.5, "chosen": model.threshold_of(not uncalibrated) if given is None else given}


def _predictions(classes: list[str], table: pd.DataFrame, scored: Scored, called: np.ndarray) -> pd.DataFrame:
    """An image a row; `loss` is the negative log-likelihood of its true class."""
    of_truth = scored.probabilities[np.arange(len(table)), scored.truth]
    return pd.DataFrame(
        {
            "path": table.path,
            "patient": table.patient,
            "truth": table.label,
            "prediction": np.array(classes)[called],
            **{f"p_{name}": scored.probabilities[:, k] for k, name in enumerate(classes)},
            "loss": -np.log(np.maximum(of_truth, np.finfo(np.float64).tiny)),
        }
    )


def _summary(
    model: Model,
    data: str | Path | None,
    split: str,
    uncalibrated: bool,
    thresholds: dict[str, float | None],
    scored: Scored,
    called: dict[str, np.ndarray],
    measured: Measured,
) -> dict[str, Any]:
    """What `metrics.json` holds."""
    classes = range(scored.classes)
    images, patients = len(scored.truth), int(scored.patients.max()) + 1
    over = f"{patients:,} patients" if patients < images else f"{patients:,} patients, an image each"
    intervals = f"95 % intervals: bootstrap over {over}, {RESAMPLES:,} resamples"
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model.path.resolve().name,
        "architecture": model.settings["architecture"],
        "split": split,
        "data": model.settings["data"]["name"] if data is None else str(data),
        "images": images,
        "patients": patients,
        "counts": {model.classes[k]: int((scored.truth == k).sum()) for k in classes},
        "calibrated": model.calibrated and not uncalibrated,
        "temperature": model.temperature,
        "positive": None if scored.positive is None else model.positive,
        "intervals": intervals if patients > 1 else "no intervals: the images are of one patient",
        "operating_points": {
            name: {
                "threshold": at,
                "metrics": _plain(measured.points[name]),
                "confusion": confusion_matrix(scored.truth, called[name], labels=classes).tolist(),
            }
            for name, at in thresholds.items()
        },
        "metrics": _plain(measured.free),
    }


def _about(model: Model, summary: dict[str, Any], given: float | None) -> dict[str, str]:
    positive = summary["positive"]
    counts = ", ".join(f"{c} {n:,}{' (positive)' if c == positive else ''}" for c, n in summary["counts"].items())
    about = {
        "model": f"{model.path}: {summary['architecture']}",
        "device": f"{describe(model.learn.dls.device)}, precision {model.precision}",
        "data": f"{summary['data']}, split {summary['split']}: {summary['images']:,} images, "
        f"{summary['patients']:,} patients",
        "classes": counts,
        "probabilities": f"calibrated, temperature {model.temperature:.3g}"
        if summary["calibrated"]
        else "uncalibrated",
    }
    if positive is None:
        about["metrics"] = "mean over the classes that the split has, each against the rest"
    else:
        threshold = summary["operating_points"]["chosen"]["threshold"]
        about["threshold"] = f"{threshold:.4g}, " + ("given" if given is not None else model.settings["calibration"])
        if given is None and model.calibrated and threshold != model.threshold:
            about["threshold"] += f" ({model.threshold:.4g} on calibrated probabilities)"
    if warning := SPLITS[summary["split"]]:
        about["note"] = warning
    elif model.settings["data"]["rehearsal"]:
        about["note"] = "a rehearsal: trained on synthetic images"
    return about


def _plain(intervals: dict[str, Interval]) -> dict[str, dict[str, float | None]]:
    return {
        name: {key: None if math.isnan(number) else number for key, number in interval._asdict().items()}
        for name, interval in intervals.items()
    }
