"""The one-file HTML report on an export; its template is `report.html.jinja`.

The report reads files of the export alone: `model.json`, `history.csv`, and what else is there of `batch.png`,
`evaluation-*/` and `interpretation-*/`. It names the command that makes what is missing, and what can't be shown.
"""

import base64
import contextlib
import csv
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import cache
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xray_fastai.evaluation.learning_curves import number, svg_curves
from xray_fastai.export.schema import read_settings
from xray_fastai.metrics import TITLES
from xray_fastai.system.errors import UserError
from xray_fastai.system.untrusted import read_received

if TYPE_CHECKING:
    from jinja2 import Template

FORMAT = 1
"""The newest layout of `metrics.json` and `summary.json` that is understood."""

PICTURE_BYTES = 4_000_000
"""What all pictures of a report may take; a third more in base64, which leaves room for the text below 6 MB."""

FILE_BYTES, PICTURE_FILE_BYTES, PICTURE_PIXELS = 5_000_000, 100_000_000, 100_000_000
"""What a table, and a picture as a file, may have: an export may come from others."""
MOST_PHASES = 10

PLOTS = {
    "confusion.png": "Confusion matrix: how many images of each true class were called what",
    "roc.png": "ROC curve: sensitivity against the share of false alarms",
    "precision_recall.png": "Precision against recall",
    "reliability.png": "Reliability: the predicted probability against how often it came true",
}
WRONG_SHAPE = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
"""What reading a damaged or foreign JSON file ends in."""


def write_report(export: str | Path, output: str | Path | None = None, name: str | None = None) -> Path:
    """Write `report.html` on an export: one file that loads nothing.

    Args:
        export: its folder.
        output: the folder to write into, in place of the export; evaluations and interpretations in it are read too,
            before the export's of the same name.
        name: of the run, where the folder does not have its final name yet.

    Returns:
        The file's path. It is replaced in one step: who reads it meanwhile gets the old one or the new.

    Raises:
        UserError: not an export, a damaged `model.json`, or the file can't be written.
    """
    export, folder = Path(export), Path(output or export)
    try:
        text = _render(_context(export, folder, name or export.resolve().name))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; give the folder of an export that fit wrote") from None
    except (OSError, *WRONG_SHAPE) as error:
        raise UserError(f"{export / 'model.json'}: damaged ({type(error).__name__}: {error}); get it anew") from None
    path, partial = folder / "report.html", folder / f".report.html.{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("x", encoding="utf-8", errors="backslashreplace") as stream:  # a file name may hold no text
            stream.write(text)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: can't be written ({error.strerror}); give another folder by --output") from None
    return path


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    return environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))


def _render(context: dict[str, Any]) -> str:
    from jinja2 import UndefinedError

    try:
        return _template().render(context)
    except UndefinedError as error:
        raise KeyError(str(error)) from None


def _context(export: Path, output: Path, name: str) -> dict[str, Any]:
    """What the template shows; `problems` holds a sentence for each part that is there and can't be shown."""
    model = read_settings(export)
    problems: list[str] = []
    parts = {part.name: part for root in (export, output) for part in root.glob("*-*") if part.is_dir()}
    evaluations = _read_parts(parts, "evaluation", "metrics.json", _evaluation, problems)
    interpretations = _read_parts(parts, "interpretation", "summary.json", _interpretation, problems)
    files = [export / "batch.png"]
    files += [part["folder"] / plot for part in evaluations for plot in PLOTS]
    files += [part["folder"] / "top_losses.png" for part in interpretations]
    pictures = embed_pictures([file for file in files if file.is_file()], PICTURE_BYTES)
    problems += [f"{file.parent.name}/{file.name}: {p['fault']}" for file, p in pictures.items() if p["fault"]]
    try:
        text = read_received(export, "history.csv", FILE_BYTES).decode("utf-8")
        history = [{key: _value(value) for key, value in row.items()} for row in csv.DictReader(StringIO(text))]
        if len({row["phase"] for row in history}) > MOST_PHASES:
            raise ValueError("too many phases")
        curves = svg_curves(history, model["best"])
    except (UserError, csv.Error, *WRONG_SHAPE) as error:
        history, curves = [], []
        problems.append(f"history.csv: not readable ({type(error).__name__})")
    return {
        "name": name,
        "model": model,
        "created": datetime.fromisoformat(model["created"]).strftime("%d %B %Y, %H:%M %Z").lstrip("0"),
        "bars": _bars(model["data"], evaluations),
        "history": history,
        "curves": curves,
        "evaluations": evaluations,
        "interpretations": interpretations,
        "pictures": {file: picture for file, picture in pictures.items() if not picture["fault"]},
        "batch": export / "batch.png",
        "plots": PLOTS,
        "kaggle": model["classes"] == ["NORMAL", "PNEUMONIA"]
        and re.split(r"[\\/]", model["data"]["name"].rstrip("\\/"))[-1] == "chest_xray",
        "code": f"learn = load_learner({'exports/' + name!r})",
        "location": shlex.quote(f"exports/{name}"),
        "problems": problems,
    }


def _read_parts(
    parts: dict[str, Path], kind: str, file: str, read: Callable[[dict], dict], problems: list[str]
) -> list[dict]:
    """The evaluations or the interpretations that are there, the test split's first."""
    found = []
    for name in sorted(parts, key=lambda name: (not name.endswith("-test"), name)):
        if not name.startswith(f"{kind}-"):
            continue
        try:
            told = json.loads(read_received(parts[name], file, FILE_BYTES))
            if told["format"] > FORMAT:
                raise ValueError(f"written by a newer version, format {told['format']}")
            found.append({"folder": parts[name], "name": name, **read(told)})
        except (UserError, *WRONG_SHAPE) as error:
            problems.append(f"{name}/{file}: not readable ({type(error).__name__}: {error})")
    return found


def _evaluation(told: dict) -> dict[str, Any]:

    points = dict(told["operating_points"])
    if "0.5" in points and points["0.5"]["threshold"] == points["chosen"]["threshold"]:
        del points["0.5"]
    names = list(dict.fromkeys(name for point in points.values() for name in point["metrics"]))
    return {
        **{key: told[key] for key in ("split", "data", "images", "patients", "counts", "calibrated", "temperature")},
        **{key: told[key] for key in ("positive", "intervals")},
        "tta": told.get("tta", False),
        "points": [
            {"label": _point(key, point["threshold"]), "confusion": point["confusion"]} for key, point in points.items()
        ],
        "table": [(TITLES.get(name, name), [_cell(p["metrics"].get(name)) for p in points.values()]) for name in names],
        "free": [(TITLES.get(name, name), _cell(m)) for name, m in told["metrics"].items()],
    }


def _interpretation(told: dict) -> dict[str, Any]:
    worst = [
        {
            "file": "/".join(Path(row["path"]).parts[-3:]),
            **{key: row[key] for key in ("truth", "prediction")},
            "probability": number(row["probability"]),
            "loss": number(row["loss"]),
        }
        for row in told["worst"]
    ]
    rest = {key: told[key] for key in ("split", "images", "errors", "causes", "selection")}
    return {**rest, "worst": worst}


def _point(key: str, threshold: float | None) -> str:
    if threshold is None:
        return "most probable class"
    return f"threshold {threshold:.4g}" + (" (chosen)" if key == "chosen" and threshold != 0.5 else "")


def _cell(metric: dict | None) -> tuple[str, str]:
    """A value and its interval, as text."""
    if metric is None or metric["value"] is None:
        return "undefined", ""
    if metric.get("low") is None or metric.get("high") is None:
        return number(metric["value"]), ""
    return number(metric["value"]), f"{number(metric['low'])} to {number(metric['high'])}"


def _value(text: str) -> int | float | str | None:
    """What a CSV file or a key means."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text or None


def _bars(data: dict, evaluations: list[dict]) -> list[dict]:
    """Images by split and class; `share` is of the longest bar."""
    groups = {"training": data["train"], "validation": data["valid"]}
    groups |= {f"{e['split']} (evaluated)": e["counts"] for e in evaluations if e["split"] not in ("train", "valid")}
    longest = max([count for counts in groups.values() for count in counts.values()], default=0) or 1
    labels = list(data["train"])
    return [
        {
            "split": split, "label": label, "count": count, "share": count / longest,
            "colour": labels.index(label) % 6 if label in labels else 5,
        }
        for split, counts in groups.items()
        for label, count in counts.items()
    ]  # fmt: skip


def embed_pictures(files: Iterable[Path], budget: int) -> dict[Path, dict[str, Any]]:
    """PNG files as data URIs that together take no more than `budget` bytes before base64.

    Small files stay as they are, and leave what they don't need to the large ones; these become smaller JPEGs.

    Returns:
        For each file `uri`, `width` and `height` (of the file itself), `reduced` (whether it became smaller), and
        `fault`: why it can't be shown, or None.
    """
    shares = {file: {"top_losses.png": 8, "batch.png": 3}.get(file.name, 1) for file in files}
    left, shares_left = budget, sum(shares.values())
    pictures = {}
    for file in sorted(shares, key=lambda file: file.stat().st_size / shares[file]):
        try:
            data, kind, (width, height) = _fit_into(file, left * shares[file] // shares_left)
            uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            pictures[file] = {"uri": uri, "width": width, "height": height, "reduced": kind == "jpeg", "fault": None}
            left -= len(data)
        except Exception as error:  # Pillow raises many kinds on a damaged file
            pictures[file] = {"fault": f"can't be shown ({type(error).__name__}: {error})"}
        shares_left -= shares[file]
    return pictures


def _fit_into(file: Path, limit: int) -> tuple[bytes, str, tuple[int, int]]:
    """A PNG's bytes where they are within the limit, else those of the largest JPEG that is; and its own size."""
    from PIL import Image

    data = read_received(file.parent, file.name, PICTURE_FILE_BYTES)
    with Image.open(BytesIO(data), formats=["PNG"]) as image:
        size = image.size
        if size[0] * size[1] > PICTURE_PIXELS:
            raise ValueError(f"{size[0]} x {size[1]} pixels")
        if len(data) <= limit:
            image.verify()
            return data, "png", size
        image = image.convert("RGB")
    scale = min(1.0, 65000 / max(size))  # of a JPEG's side, 65,535 is the most
    while min(size) * scale >= 64:
        stream = BytesIO()
        smaller = image.resize([round(side * scale) for side in size], Image.Resampling.LANCZOS, reducing_gap=3.0)
        smaller.save(stream, "JPEG", quality=82, optimize=True, progressive=True)
        if stream.tell() <= limit:
            return stream.getvalue(), "jpeg", size
        scale *= min(0.9, math.sqrt(limit / stream.tell()))
    raise ValueError(f"{len(data):,} bytes can't be brought below {limit:,}")
