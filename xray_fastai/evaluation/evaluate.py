"""Evaluate an export on images whose class is known: metrics with intervals, a table of predictions, plots.

evaluation-<split>/metrics.json      the metrics, and what they were computed on
                   predictions.csv   all images of the split
                   *.png             `evaluation.plots`
                   statement.md      on request (`evaluation.statement`)
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from xray_fastai.config.choices import members_of, network_of
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.data.labelled import Labelled, Request, labelled_images, split_named
from xray_fastai.data.patients import images_by_source, note_on, unknown
from xray_fastai.data.table import Data
from xray_fastai.data.table_columns import Column
from xray_fastai.evaluation import plots
from xray_fastai.evaluation.coverage import called_of
from xray_fastai.evaluation.evaluation_result import Evaluation, write_table
from xray_fastai.evaluation.groups import groups_of
from xray_fastai.evaluation.report import write_report
from xray_fastai.evaluation.result_folder import replaced_data, result_folder
from xray_fastai.evaluation.statement import FILE as STATEMENT_FILE
from xray_fastai.evaluation.statement import statement as statement_of
from xray_fastai.evaluation.subgroups import worst_group_of
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.rows import UNLIKE_DIGITS, DecisionRule
from xray_fastai.inference.stream import predict_and_compare
from xray_fastai.inference.tta import describe as describe_tta
from xray_fastai.metrics.comparison import Called
from xray_fastai.metrics.decision import THRESHOLDS, decision_curve
from xray_fastai.metrics.intervals import Interval, Measured, measure
from xray_fastai.metrics.predictive_values import predictive_values
from xray_fastai.metrics.scored import Scored, losses
from xray_fastai.system.device import describe
from xray_fastai.system.errors import OptionError
from xray_fastai.system.files import replaced
from xray_fastai.system.text import count_of, percent

if TYPE_CHECKING:
    from fastai.learner import Learner

FORMAT = 1
"""The layout of `metrics.json`."""
METRICS_FILE, PREDICTIONS_FILE = "metrics.json", "predictions.csv"
SPLITS = {
    "test": None,
    "valid": "fit chose its epoch, temperature and threshold on this split: expect less of new images",
    "train": "the model was trained on these images: expect less of new ones",
}
"""The splits that can be evaluated, each with the warning that its result is too good, or None."""


@dataclass(frozen=True)
class _Request:
    """What is evaluated, and how; checked."""

    model: Model
    data: str  # the folder, or the name of the data set that `fit` used
    split: str
    labelled: Labelled
    rule: DecisionRule  # of the chosen threshold, with the gate and the band that the user wants
    threshold: float | None  # given by the user; None is the one that `fit` chose
    tta: bool

    @property
    def images(self) -> pd.DataFrame:
        return self.labelled.table

    @property
    def calibrated(self) -> bool:
        """Whether temperature and intercepts are applied."""
        return self.rule.calibrated

    @property
    def operating_points(self) -> dict[str, float | None]:
        """The thresholds by name; of more than two classes, `chosen` without one."""
        if len(self.model.classes) != 2:
            return {"chosen": None}
        return {"0.5": 0.5, "chosen": self.rule.threshold}


def evaluate(
    model: "str | Path | Model | Learner | None" = None,
    data: Data | None = None,
    split: str = "test",
    threshold: str | float = "auto",
    *,
    uncalibrated: bool = False,
    prevalence: float | None = None,
    gate: bool = True,
    abstain: float = 0.0,
    tta: bool = False,
    exclude: str | None = None,
    patients: str | None = None,
    images: str | Path | None = None,
    column: Column = None,
    output: str | Path | None = None,
    statement: bool = False,
    device: str = "auto",
    precision: str = "auto",
) -> Evaluation:
    """Compute metrics with 95 % intervals, and write them with predictions and plots to `evaluation-<split>/`.

    Images of another folder than that of the fit get `evaluation-<split>-<folder>/`, beside it.

    Args:
        model: the export's folder, an open model, or a learner that `load_learner` opened; None is the
            default export (`xray-fastai default`), else the newest in ./exports.
        data: the folder that holds the split, or folders of the model's classes without splits; or a table of images,
            a .csv file or a data frame (`data.table`); None is what `fit` used.
        split: test, valid (the images that `fit` validated on) or train.
        threshold: an image is predicted positive from this probability on; auto is the one that `fit` chose.
        uncalibrated: leave out temperature and intercepts. The threshold that `fit` chose is then converted, so that
            it decides the same.
        prevalence: the share of the class to detect where the model is to be used. The probabilities are moved to it,
            and the threshold that `fit` chose with them, so that it decides the same; and PPV and NPV are given for it.
        gate: report which images are unlike the training images, so that `predict` would not call them, and the metrics
            on the others beside those on all images; if the export has a gate.
        abstain: the same of images whose probability of the class to detect is within this distance of the threshold.
        tta: test-time augmentation (`xray_fastai.inference.tta`): the mean over five views of each image.
        exclude: a list of files to leave out, as `data check --fix` writes it.
        patients: a .csv file with the columns file and patient; None is the one of `fit`, if `data` is None.
        images: the folder of the images of a table; None is the one that holds the table.
        column: the headers of a table's columns, as in {"label": "Finding"}; None finds them by their names.
        output: the folder to write `evaluation-<split>/` into, instead of the export, for images of any folder.
        statement: write `statement.md`, too: methods, results and two checklists for a manuscript.
        device: auto, cpu, cuda or mps.
        precision: auto, fp32 or bf16 (`inference.model.open_model`).

    Raises:
        UserError: no export, no such images, an image that cannot be read, or a folder that cannot be written to.

    Examples:
        >>> result = evaluate("exports/rehearsal", data="chest_xray", split="train", output="results")
        >>> list(result.metrics.columns)
        ['value', 'low', 'high']
        >>> "roc_auc" in result.metrics.index
        True
    """
    split = split_named(split)
    given = _threshold(threshold)
    config = PredictConfig(
        threshold=given, uncalibrated=uncalibrated, prevalence=prevalence, gate=bool(gate), abstain=abstain
    )
    opened = open_model(model, device, precision).at_prevalence(prevalence)
    wanted = Request(data, split, exclude, patients, images, column)
    labelled = labelled_images(opened.settings, wanted)
    split, wanted = labelled.split, replace(wanted, split=labelled.split)
    rule = DecisionRule.of(opened, config)
    source = wanted.name or opened.settings["data"]["name"]
    folder = result_folder("evaluation", opened.path, opened.settings, wanted, output)
    if (note := replaced_data(folder, METRICS_FILE, opened.settings, wanted)) is not None:
        labelled.notes.append(note)
    request = _Request(opened, source, split, labelled, rule, given, tta)
    with replaced(folder, METRICS_FILE) as partial:
        result = _evaluate(request, folder, partial)
        if statement:
            text = statement_of(opened.settings, result.summary)
            (partial / STATEMENT_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")
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
        raise OptionError("give auto, or a probability from 0 to 1", option="threshold", value=text)
    return value


def _evaluate(request: _Request, folder: Path, partial: Path) -> Evaluation:
    """Predict, measure, and write the files into `partial`, which becomes `folder`."""
    start = time.perf_counter()
    scored, unlike = _predict(request)
    seconds = time.perf_counter() - start
    y_pred = {name: request.model.decide(scored.y_prob, at) for name, at in request.operating_points.items()}
    measured = measure(scored, y_pred)
    called = called_of(request.rule, scored, y_pred["chosen"], unlike)
    summary = _summary(request, scored, y_pred, measured) | {"called": called and called.to_json(_plain)}
    about = _about(request, summary) | ({"tta": describe_tta(seconds)} if request.tta else {})
    predictions = _predictions(request, scored, y_pred["chosen"]).assign(
        unlike=np.nan if unlike is None else unlike.round(UNLIKE_DIGITS),
        uncertain=False if called is None else [reason is not None for reason in called.withheld],
    )
    result = Evaluation(folder, summary, predictions, about)
    (partial / METRICS_FILE).write_text(result.to_json() + "\n", encoding="utf-8")
    write_table(predictions, partial / PREDICTIONS_FILE)
    plots.plot_evaluation(partial, summary, scored, measured)
    return result


def _predict(request: _Request) -> tuple[Scored, np.ndarray | None]:
    """Return the images with their probabilities, and how unlike the training images they are (N,)."""
    model, images = request.model, request.images
    logits, unlike = predict_and_compare(model, images.path, request.tta)
    y_prob = model.probabilities(logits, request.calibrated)
    y_true = np.array([model.classes.index(label) for label in images.label])
    positive = model.classes.index(model.positive) if model.positive and len(model.classes) == 2 else None
    return Scored(y_true, y_prob, pd.factorize(images.patient)[0], positive), unlike


def _predictions(request: _Request, scored: Scored, y_pred: np.ndarray) -> pd.DataFrame:
    """Return a row for each image; `loss` is the negative log-likelihood of its true class."""
    classes, images = request.model.classes, request.images
    return pd.DataFrame(
        {
            "path": images.path,
            "patient": images.patient,
            "truth": images.label,
            "prediction": np.array(classes)[y_pred],
            **{f"p_{name}": scored.y_prob[:, k] for k, name in enumerate(classes)},
            "loss": losses(scored.y_prob, scored.y_true),
        }
    )


def _summary(request: _Request, scored: Scored, y_pred: dict[str, np.ndarray], measured: Measured) -> dict[str, Any]:
    """Return the content of `metrics.json`."""
    model, classes = request.model, range(scored.classes)
    worst = worst_group_of(list(request.images.path), scored)
    images, patients = len(scored.y_true), int(scored.patients.max()) + 1
    over = count_of(patients, "patient") + ("" if patients < images else ", an image each")
    missing = int(unknown(request.images).sum())
    if missing == images:
        over = f"{count_of(images, 'image')}, each as a patient of its own"
    intervals = f"95 % intervals by patient: {over}. The calibration error has none, nor has what rests on one patient."
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model.path.resolve().name,
        "architecture": model.settings["architecture"],
        "members": members_of(model.settings),  # networks whose outputs are averaged
        "split": request.split,
        "note": SPLITS[request.split],
        "data": request.data,
        "images": images,
        "patients": patients,
        "images_without_patient": missing,  # each counts as a patient of its own
        "patients_known_by": images_by_source(request.images),  # images by what names their patient
        "seen_in_fit": request.labelled.seen,  # images by their use; null: the export does not know it
        "counts": {model.classes[k]: int((scored.y_true == k).sum()) for k in classes},
        "calibrated": model.scaling.kind != "none" and request.calibrated,
        "calibration": model.scaling.kind if request.calibrated else "none",
        "probabilities": model.describe_probabilities(request.calibrated, request.tta),
        "prevalence": model.prevalence,  # that the probabilities were moved to; null: as the export's are
        "temperature": model.scaling.temperature,
        "intercepts": model.scaling.intercepts,
        "positive": None if scored.positive is None else model.positive,
        "intervals": intervals if patients > 1 else "no intervals: the images are of one patient",
        "operating_points": {
            name: {
                "threshold": threshold,
                "metrics": _plain(measured.points[name]),
                "confusion": confusion_matrix(scored.y_true, y_pred[name], labels=classes).tolist(),
                "at_prevalence": _at_prevalence(model, scored, y_pred[name]),
            }
            for name, threshold in request.operating_points.items()
        },
        "metrics": _plain(measured.free),
        "reliability": [
            {"images": of_bin.images, "probability": of_bin.probability, "share": _plain({"": of_bin.share})[""]}
            for of_bin in measured.reliability
        ],
        "worst_group": None if worst is None else asdict(worst),
        "groups": groups_of(request.images, Called(scored, y_pred["chosen"]), model.classes),
        "decision_curve": None if scored.positive is None else _decision_curve(scored, scored.positive),
        "tta": request.tta,
        "notes": _notes(request, scored, y_pred),
    }


def _at_prevalence(model: Model, scored: Scored, y_pred: np.ndarray) -> dict[str, dict] | None:
    """Return PPV and NPV at the model's prevalence; None where none was given."""
    if model.prevalence is None:
        return None
    return _plain(predictive_values(scored, y_pred, model.prevalence)._asdict())


def _decision_curve(scored: Scored, positive: int) -> list[dict[str, float | None]]:
    """Return the net benefit of the model at 0.05, 0.10, ... and that of acting on all images; on none it is 0."""
    curve = decision_curve(scored, positive)
    return [
        {"threshold": float(THRESHOLDS[i]), **_plain({"": curve.model[i]})[""], "all": float(curve.all[i])}
        for i in range(4, len(THRESHOLDS), 5)
    ]


def _notes(request: _Request, scored: Scored, y_pred: dict[str, np.ndarray]) -> list[str]:
    """Return what the reader of the figures has to know, a line each."""
    notes = [SPLITS[request.split], *request.labelled.notes, note_on(request.images)]
    notes.append(_one_class_note(request, scored, y_pred))
    if request.model.prevalence is not None:
        share = (scored.y_true == scored.positive).mean()
        notes.append(
            f"the probabilities are for a prevalence of {percent(request.model.prevalence)}, the images have "
            f"{percent(share)}: Brier score, likelihood and calibration on them say nothing about it"
        )
    if request.split == "test" and request.model.settings["data"]["rehearsal"]:
        notes.append("a rehearsal: trained on synthetic images")
    return [note for note in notes if note]


def _one_class_note(request: _Request, scored: Scored, y_pred: dict[str, np.ndarray]) -> str | None:
    """Say that every image is called one class, so that sensitivity and specificity are 0 and 1, if it is so."""
    for name in ("chosen", "0.5"):
        called = np.unique(y_pred.get(name, []))
        if len(called) != 1 or len(scored.present) == 1:
            continue
        threshold, label = request.operating_points[name], request.model.classes[int(called[0])]
        at = "" if threshold is None else f" at the threshold {threshold:.4g}"
        other = "" if threshold is None else ", or use another threshold"
        return f"every image is called {label}{at}: train for more epochs{other}"
    return None


def _about(request: _Request, summary: dict[str, Any]) -> dict[str, str]:
    """Return what is evaluated on what, for the first lines on the terminal."""
    model, positive = request.model, summary["positive"]
    counts = ", ".join(f"{c} {n:,}{' (positive)' if c == positive else ''}" for c, n in summary["counts"].items())
    patients = f", {count_of(summary['patients'], 'patient')}"
    about = {
        "model": f"{model.path}: {network_of(summary)}",
        "device": f"{describe(model.device)}, precision {model.precision}",
        "data": f"{summary['data']}, split {summary['split']}: {count_of(summary['images'], 'image')}"
        + ("" if summary["images_without_patient"] == summary["images"] else patients),
        "classes": counts,
        "probabilities": summary["probabilities"],
    }
    if positive is None:
        about["metrics"] = "mean over the classes in the split, each against the rest"
    else:
        threshold, given = summary["operating_points"]["chosen"]["threshold"], request.threshold is not None
        about["threshold"] = f"{threshold:.4g}, " + ("given" if given else model.settings["calibration"])
        own = model.settings["threshold"]
        if not given and threshold != own:
            about["threshold"] += f" ({own:.4g} on the export's own probabilities)"
    return about


def _plain(intervals: dict[str, Interval]) -> dict[str, dict[str, float | None]]:
    """Return intervals for JSON, which has no NaN: null instead."""
    return {
        name: {key: None if math.isnan(number) else number for key, number in interval._asdict().items()}
        for name, interval in intervals.items()
    }
