"""Write the HTML report of an export as one file; its template is `report.html.jinja`.

The report reads only files of the export: `model.json`, `history.csv`, and where they exist `batch.png`,
`evaluation-*/` and `interpretation-*/`. For a missing part it names the command that makes it. It lists the files that
it cannot show.
"""

import contextlib
import csv
import json
import re
import shlex
from collections.abc import Callable
from datetime import datetime
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, UndefinedError

from xray_fastai.config.choices import MAX_MEMBERS, network_of
from xray_fastai.evaluation.embedded_pictures import embed_pictures
from xray_fastai.evaluation.groups import remarks_on
from xray_fastai.evaluation.learning_curves import LR_FIND, kept_epochs, svg_curves
from xray_fastai.export.model_json import read_settings
from xray_fastai.metrics.table import METRICS, title_at_prevalence, title_of
from xray_fastai.system.errors import UserError
from xray_fastai.system.files import atomic_write
from xray_fastai.system.text import count_of, format_number, shorten
from xray_fastai.system.untrusted import read_received

FORMAT = 1
"""The newest layout of `metrics.json` and `summary.json` that the report can read."""

PICTURE_BYTES = 4_000_000
"""Limit of all pictures together. Base64 adds a third, so the report stays below 6 MB."""

FILE_BYTES = 5_000_000
"""Limit of a table: an export may come from others."""
MAX_PHASES = 10

PLOTS = {
    "confusion.png": "Confusion matrix: the images of each true class by predicted class",
    "roc.png": "ROC curve: sensitivity against the false positive rate",
    "precision_recall.png": "Precision-recall curve: precision (PPV) against recall (sensitivity)",
    "reliability.png": "Reliability diagram: predicted probability against the share of images with the class",
    "predictive_values.png": "PPV and NPV against the prevalence of the class to detect",
    "decision_curve.png": "Decision curve: net benefit of acting on the model against the threshold probability",
    "scores.png": "Distribution of the predicted probabilities by outcome",
}
WRONG_SHAPE = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
"""The errors that a damaged or foreign JSON file causes."""
KEY_METRICS = ("roc_auc", "accuracy", "sensitivity", "specificity", "calibration_slope", "observed_expected")
"""The metrics at the top of the report: discrimination, decisions and calibration. F1 mixes them, so it is left
out (Van Calster et al., Lancet Digital Health 2025)."""


def write_report(export: str | Path, output: str | Path | None = None, name: str | None = None) -> Path:
    """Write `report.html`, one file that loads nothing from elsewhere.

    Args:
        export: the export's folder.
        output: the folder to write into, instead of the export. Its evaluations and interpretations are shown too;
            they replace those of the same name in the export.
        name: the name of the run, where the folder does not have its final name yet.

    Returns:
        The file's path. An earlier report is replaced in one step.

    Raises:
        UserError: not an export, a damaged `model.json`, or the file cannot be written.
    """
    export, folder = Path(export), Path(output or export)
    try:
        text = _render(_context(export, folder, name or export.resolve().name))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; give the folder of an export that fit wrote") from None
    except (OSError, *WRONG_SHAPE) as error:
        fault = f"{type(error).__name__}: {error}"
        raise UserError(f"{export / 'model.json'}: damaged ({fault}); get the export again") from None
    path = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:  # a file name may hold bytes that are no text
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another folder by output=") from None
    return path


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": format_number, "shorten": shorten}
    return environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))


def _render(context: dict[str, Any]) -> str:
    try:
        return _template().render(context)
    except UndefinedError as error:
        raise KeyError(str(error)) from None


def _context(export: Path, output: Path, name: str) -> dict[str, Any]:
    """Return what the template shows; `problems` names each part that exists but cannot be shown."""
    model = read_settings(export)
    problems: list[str] = []
    kept = kept_epochs(model)
    parts = {part.name: part for root in (export, output) for part in root.glob("*-*") if part.is_dir()}
    evaluations = _read_parts(parts, "evaluation", "metrics.json", _evaluation, problems)
    interpretations = _read_parts(parts, "interpretation", "summary.json", _interpretation, problems)
    files = [export / "batch.png", export / LR_FIND]
    files += [part["folder"] / plot for part in evaluations for plot in PLOTS]
    files += [part["folder"] / "top_losses.png" for part in interpretations]
    pictures = embed_pictures([file for file in files if file.is_file()], PICTURE_BYTES)
    problems += [f"{file.parent.name}/{file.name}: {p['fault']}" for file, p in pictures.items() if p["fault"]]
    try:
        text = read_received(export, "history.csv", FILE_BYTES).decode("utf-8")
        history = [{key: _value(value) for key, value in row.items()} for row in csv.DictReader(StringIO(text))]
        if len({row["phase"] for row in history}) > MAX_PHASES:
            raise ValueError("too many phases")
        if len({row.get("member") for row in history}) > MAX_MEMBERS:
            raise ValueError("too many networks")
        curves = svg_curves(history, kept)
    except (UserError, csv.Error, *WRONG_SHAPE) as error:
        history, curves = [], []
        problems.append(f"history.csv: not readable ({type(error).__name__})")
    return {
        "name": name,
        "model": model,
        "network": network_of(model),
        "created": datetime.fromisoformat(model["created"]).strftime("%d %B %Y, %H:%M %Z").lstrip("0"),
        "bars": _bars(model["data"], evaluations),
        "recalibrated": _recalibrated(model),
        "known_by": _known_by(model["data"]["patients"].get("known_by")),
        "history": history,
        "is_kept": [any(_is_same_epoch(row, best) for best in kept) for row in history],
        "ensemble": _ensemble(model),
        "curves": curves,
        "evaluations": evaluations,
        "interpretations": interpretations,
        "pictures": {file: picture for file, picture in pictures.items() if not picture["fault"]},
        "batch": export / "batch.png",
        "search": export / LR_FIND,
        "plots": PLOTS,
        "metrics": METRICS.values(),
        "kaggle": model["classes"] == ["NORMAL", "PNEUMONIA"]
        and re.split(r"[\\/]", model["data"]["name"].rstrip("\\/"))[-1] == "chest_xray",
        "code": f"learn = load_learner({'exports/' + name!r})",
        "location": shlex.quote(f"exports/{name}"),
        "problems": problems,
    }


def _read_parts(
    parts: dict[str, Path], kind: str, file: str, read: Callable[[dict], dict], problems: list[str]
) -> list[dict]:
    """Read the evaluations or the interpretations that exist, those of the test split of the fit's data first."""
    contents = []
    for name in sorted(parts, key=lambda name: (name != f"{kind}-test", name)):
        if not name.startswith(f"{kind}-"):
            continue
        try:
            content = json.loads(read_received(parts[name], file, FILE_BYTES))
            if content["format"] > FORMAT:
                raise ValueError(f"written by a newer version, format {content['format']}")
            contents.append({"folder": parts[name], "name": name, **read(content)})
        except (UserError, *WRONG_SHAPE) as error:
            problems.append(f"{name}/{file}: not readable ({type(error).__name__}: {error})")
    return contents


def _evaluation(summary: dict) -> dict[str, Any]:
    """Return what the report shows of `metrics.json`."""
    points = dict(summary["operating_points"])
    if "0.5" in points and points["0.5"]["threshold"] == points["chosen"]["threshold"]:
        del points["0.5"]
    names = list(dict.fromkeys(name for point in points.values() for name in point["metrics"]))
    copied = ("split", "data", "images", "patients", "counts", "positive", "intervals")
    cells = {name: [_cell(point["metrics"].get(name)) for point in points.values()] for name in names}
    free = {name: _cell(metric) for name, metric in summary["metrics"].items()}
    at_prevalence = [
        (title_at_prevalence(name, summary["prevalence"]), [_cell(p["at_prevalence"][name]) for p in points.values()])
        for name in points["chosen"].get("at_prevalence") or ()
    ]
    last = {name: row[-1] for name, row in cells.items()} | free
    return {
        **{key: summary[key] for key in copied},
        "tta": summary.get("tta", False),
        "notes": summary.get("notes", []),
        "worst_group": summary.get("worst_group"),
        "of_patients": _of_patients(summary),
        "known_by": _known_by(summary.get("patients_known_by")),
        "called": _called(summary.get("called")),
        "groups": [_groups(column) for column in summary.get("groups") or []],
        "probabilities": summary.get("probabilities") or _earlier_words(summary),
        "points": [
            {"label": _point(key, point["threshold"]), "confusion": point["confusion"]} for key, point in points.items()
        ],
        "key_metrics": [(title_of(name), last[name]) for name in KEY_METRICS if name in last],
        "table": [(title_of(name), row) for name, row in cells.items()] + at_prevalence,
        "free": [(title_of(name), cell) for name, cell in free.items()],
    }


def _recalibrated(model: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the metrics before and after `recalibrate`, and the differences, as titles and cells."""
    metrics = (model.get("recalibrated") or {}).get("metrics", {})
    return [
        (title_of(name), [_estimate(found[part]) for part in ("before", "after", "difference")])
        for name, found in metrics.items()
    ]


def _ensemble(model: dict) -> dict[str, Any] | None:
    """Return what the report shows of the networks of an ensemble; None of one network."""
    ensemble = model.get("ensemble")
    if ensemble is None:
        return None
    cells = {name: _estimate(numbers) for name, numbers in ensemble["metrics"].items()}
    return {
        **ensemble,
        "metrics": [(title_of(name), cell) for name, cell in cells.items()],
        "key_metrics": [(title_of(name), cells[name]) for name in KEY_METRICS if name in cells],
        "members": [
            member | {name: _estimate(member[name]) for name in ("roc_auc", "balanced_accuracy")}
            for member in model["training"].get("members") or []
        ],
    }


def _is_same_epoch(row: dict, best: dict) -> bool:
    return all(row.get(key) == best.get(key) for key in ("member", "phase", "epoch"))


def _estimate(numbers: list[float | None]) -> tuple[str, str]:
    return _cell(dict(zip(("value", "low", "high"), numbers, strict=True)))


def _called(called: dict | None) -> dict[str, Any] | None:
    """Return which images are called, and the metrics on these where others are not; None where nothing is withheld."""
    if called is None:
        return None
    metrics = called["metrics"] if any(called["withheld"].values()) else None
    return {
        "text": called["text"],
        "table": [(title_of(name), _cell(metric)) for name, metric in (metrics or {}).items()],
    }


def _of_patients(summary: dict) -> str:
    """Return the number of patients after that of images; nothing where no patient is known."""
    if summary.get("images_without_patient") == summary["images"]:
        return ""
    return f" of {count_of(summary['patients'], 'patient')}"


def _groups(column: dict) -> dict[str, Any]:
    """Return what the report shows of the metrics by one column of groups."""
    groups = column["groups"]
    names = list(dict.fromkeys(name for group in groups for name in group["metrics"]))
    return {
        "column": column["column"],
        "heads": [title_of(name) for name in names],
        "rows": [
            (group["name"], group["images"], group["patients"], [_cell_of_group(group["metrics"][n]) for n in names])
            for group in groups
        ],
        "remarks": remarks_on(column),
    }


def _cell_of_group(metric: dict) -> tuple[str, str]:
    return ("too few", "") if metric["value"] is None else _cell(metric)


def _known_by(images: dict[str, int] | None) -> str:
    """Say what named the patients of the images; nothing for an export or a `metrics.json` of an earlier version.

    >>> _known_by({"PatientID": 80, "the file names": 2})
    'Patients are known by PatientID (80 images) and by the file names (2 images).'
    """
    if images is None:
        return ""
    if not images:
        return "No patient is known: each image counts as a patient of its own."
    parts = [f"by {source} ({count_of(count, 'image')})" for source, count in images.items()]
    return f"Patients are known {' and '.join(parts)}."


def _earlier_words(summary: dict) -> str:
    """Return how the probabilities of a `metrics.json` without these words were calibrated."""
    words = f"temperature {format_number(summary['temperature'])} from validation images"
    return words if summary["calibrated"] else "not calibrated"


def _interpretation(summary: dict) -> dict[str, Any]:
    """Return what the report shows of `summary.json`."""
    worst = [
        {
            "file": "/".join(Path(row["path"]).parts[-3:]),
            **{key: row[key] for key in ("truth", "prediction")},
            "probability": format_number(row["probability"]),
            "loss": format_number(row["loss"]),
        }
        for row in summary["worst"]
    ]
    copied = ("split", "images", "errors", "causes", "selection")
    return {**{key: summary[key] for key in copied}, "data": summary.get("data"), "worst": worst}


def _point(key: str, threshold: float | None) -> str:
    if threshold is None:
        return "most probable class"
    return f"threshold {threshold:.4g}" + (" (chosen)" if key == "chosen" and threshold != 0.5 else "")


def _cell(metric: dict | None) -> tuple[str, str]:
    """Return a value and its interval as text."""
    if metric is None or metric["value"] is None:
        return "undefined", ""
    if metric.get("low") is None or metric.get("high") is None:
        return format_number(metric["value"]), ""
    return format_number(metric["value"]), f"{format_number(metric['low'])} to {format_number(metric['high'])}"


def _value(text: str) -> int | float | str | None:
    """Convert a cell of a CSV file."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text or None


def _bars(data: dict, evaluations: list[dict]) -> list[dict]:
    """Count images by split and class; `share` is relative to the longest bar."""
    groups = {"training": data["train"], "validation": data["valid"]}
    others = [e for e in evaluations if e["split"] not in ("train", "valid")]
    groups |= {f"{e['name'].removeprefix('evaluation-')} (evaluated)": e["counts"] for e in others}
    max_count = max([count for counts in groups.values() for count in counts.values()], default=0) or 1
    labels = list(data["train"])
    return [
        {
            "split": split, "label": label, "count": count, "share": count / max_count,
            "colour": labels.index(label) % 6 if label in labels else 5,
        }
        for split, counts in groups.items()
        for label, count in counts.items()
    ]  # fmt: skip
