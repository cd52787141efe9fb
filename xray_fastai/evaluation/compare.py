"""Compare two models on the same images: each metric, the paired difference with its interval, tests, one picture.

comparison-<A>-<B>/comparison.json   all figures, and what they were computed on
                   comparison.png    both ROC curves, and the differences
"""

import json
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from xray_fastai import DISCLAIMER
from xray_fastai.config.choices import members_of, network_of
from xray_fastai.data.labelled import Labelled, Request, labelled_images, split_named
from xray_fastai.data.patients import note_on
from xray_fastai.data.table import Data
from xray_fastai.data.table_columns import Column
from xray_fastai.evaluation.comparison_plot import plot_comparison
from xray_fastai.evaluation.evaluate import SPLITS
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.stream import predict_all
from xray_fastai.metrics.comparison import Called, compare_metrics
from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import title_of
from xray_fastai.system.errors import UserError
from xray_fastai.system.files import replaced
from xray_fastai.system.text import count_of, format_interval, wrap

if TYPE_CHECKING:
    from fastai.learner import Learner

FORMAT = 1
"""The layout of `comparison.json`."""
COMPARISON_FILE, PICTURE_FILE = "comparison.json", "comparison.png"


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images. Prints as a table."""

    path: Path  # the folder that holds the files
    summary: dict[str, Any] = field(repr=False)  # comparison.json

    @property
    def differences(self) -> pd.DataFrame:
        """All metrics by name, with the columns a, b, difference (b less a), low, high, p and test."""
        return pd.DataFrame.from_dict(self.summary["metrics"], orient="index").rename_axis("metric")

    def to_json(self) -> str:
        """Return the content of `comparison.json`; an undefined value is null."""
        return json.dumps(self.summary, indent=2, allow_nan=False)

    def __str__(self) -> str:
        summary, lines = self.summary, [DISCLAIMER, ""]
        for key in ("a", "b"):
            model = summary[key]
            at = "" if model["threshold"] is None else f", threshold {model['threshold']:.4g}"
            lines += wrap(f"{model['model']}: {network_of(model)}{at}", f"{key.upper():<15}")
        counts = ", ".join(f"{name} {count:,}" for name, count in summary["counts"].items())
        images, patients = count_of(summary["images"], "image"), count_of(summary["patients"], "patient")
        lines += wrap(f"{summary['data']}, split {summary['split']}: {images}, {patients}", f"{'data':<15}")
        lines += wrap(counts, f"{'classes':<15}")
        for note in summary["notes"]:
            lines += wrap(note, f"{'note':<15}")
        lines += ["", f"{'':<28}{'A':<8}{'B':<8}{'B - A':<27}p"]
        for name, metric in summary["metrics"].items():
            a, b = ("-" if metric[key] is None else f"{metric[key]:.3f}" for key in ("a", "b"))
            interval = (metric["difference"], metric["low"], metric["high"])
            difference = "-" if metric["difference"] is None else format_interval(*interval)
            p = "" if metric["p"] is None else f"{metric['p']:.2g}"
            lines.append(f"{title_of(name):<28}{a:<8}{b:<8}{difference:<27}{p}".rstrip())
        lines += ["", *wrap(summary["intervals"])]
        return "\n".join([*lines, "", *wrap(str(self.path), f"{'written':<15}"), DISCLAIMER])


def compare(
    a: "str | Path | Model | Learner",
    b: "str | Path | Model | Learner",
    data: Data | None = None,
    split: str = "test",
    *,
    exclude: str | None = None,
    patients: str | None = None,
    images: str | Path | None = None,
    column: Column = None,
    output: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Comparison:
    """Compare two models on the same images, each at its own threshold, and write `comparison-<A>-<B>/`.

    Args:
        a: the first export's folder, an open model, or a learner that `load_learner` opened.
        b: the second, with the same classes in any order.
        data: the folder that holds the split, or folders of the model's classes without splits; or a table of images,
            a .csv file or a data frame (`data.table`); None is what both fits used.
        split: test, valid (the images that both fits validated on) or train.
        exclude: a list of files to leave out, as `data check --fix` writes it.
        patients: a .csv file with the columns file and patient; None is the one of a's fit, if `data` is None.
        images: the folder of the images of a table; None is the one that holds the table.
        column: the headers of a table's columns, as in {"label": "Finding"}; None finds them by their names.
        output: the folder to write `comparison-<A>-<B>/` into, instead of this one.
        device: auto, cpu, cuda or mps.
        precision: auto, fp32 or bf16 (`inference.model.open_model`).

    Raises:
        UserError: other classes, other data, no such images, or a folder that cannot be written to.

    Examples:
        >>> result = compare("exports/rehearsal", "exports/rehearsal", data="chest_xray", split="train")
        >>> float(result.differences.difference["accuracy"])
        0.0
    """
    split = split_named(split)
    models = [open_model(source, device, precision) for source in (a, b)]
    _check_classes(*models)
    wanted = Request(data, split, exclude, patients, images, column)
    labelled = _images_of_both(models, wanted)
    split = labelled.split
    called = [_called(model, labelled.table, models[0].classes) for model in models]
    names = [model.path.resolve().name for model in models]
    folder = Path("." if output is None else output) / f"comparison-{names[0]}-{names[1]}"
    source = wanted.name or models[0].settings["data"]["name"]
    with replaced(folder, COMPARISON_FILE) as partial:
        result = Comparison(folder, _summary(models, called, labelled, {"data": source, "split": split}))
        (partial / COMPARISON_FILE).write_text(result.to_json() + "\n", encoding="utf-8")
        plot_comparison(partial / PICTURE_FILE, result.summary, *(one.scored for one in called))
    return result


def _check_classes(a: Model, b: Model) -> None:
    if set(a.classes) != set(b.classes) or a.positive != b.positive:
        others = [f"{', '.join(model.classes)} (to detect: {model.positive or 'each'})" for model in (a, b)]
        raise UserError(
            f"{b.path}: has the classes {others[1]}, and {a.path} has {others[0]}; compare models of the same"
        )


def _images_of_both(models: list[Model], wanted: Request) -> Labelled:
    """List the images, and say which of them either fit has seen.

    Raises:
        UserError: the fits used other data, or the split has other images for each.
    """
    names = [model.settings["data"]["name"] for model in models]
    if wanted.data is None and names[0] != names[1]:
        raise UserError(f"the fits used {names[0]} and {names[1]}; say which images to compare on", option="data")
    listed = [labelled_images(model.settings, wanted) for model in models]
    if set(listed[0].table.path) != set(listed[1].table.path):
        message = "the fits used other images for it; compare on the test split"
        raise UserError(message, option="split", value=wanted.split)
    notes = [f"{name}: {note}" for name, images in zip("AB", listed, strict=True) for note in images.notes]
    return Labelled(listed[0].table, listed[0].split, notes, None)


def _called(model: Model, images: pd.DataFrame, classes: list[str]) -> Called:
    """Predict, and decide at the model's own threshold; the classes are in the order of `classes`."""
    y_prob = model.probabilities(predict_all(model, images.path))
    order = np.array([model.classes.index(name) for name in classes])
    y_pred = np.argsort(order)[model.decide(y_prob)]
    y_true = np.array([classes.index(label) for label in images.label])
    positive = classes.index(model.positive) if model.positive and len(classes) == 2 else None
    return Called(Scored(y_true, y_prob[:, order], pd.factorize(images.patient)[0], positive), y_pred)


def _summary(models: list[Model], called: list[Called], images: Labelled, about: dict[str, str]) -> dict[str, Any]:
    """Return the content of `comparison.json`."""
    scored, differences = called[0].scored, compare_metrics(*called)
    patients = int(scored.patients.max()) + 1
    tests = list(dict.fromkeys(one.test for one in differences.values() if one.test))
    words = f"95 % intervals of the paired difference, by patient: {count_of(patients, 'patient')}."
    words += f" p by {' and '.join(tests)}, of each metric alone." if tests else ""
    notes = [SPLITS[about["split"]], *images.notes, note_on(images.table)]
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **{
            key: {
                "model": model.path.resolve().name,
                "architecture": model.settings["architecture"],
                "members": members_of(model.settings),
                "threshold": model.threshold_of(),
                "probabilities": model.describe_probabilities(),
            }
            for key, model in zip("ab", models, strict=True)
        },
        **about,
        "images": len(scored.y_true),
        "patients": patients,
        "counts": {name: int((scored.y_true == k).sum()) for k, name in enumerate(models[0].classes)},
        "positive": None if scored.positive is None else models[0].positive,
        "metrics": {
            name: {
                key: None if isinstance(number, float) and math.isnan(number) else number
                for key, number in one._asdict().items()
            }
            for name, one in differences.items()
        },
        "intervals": words,
        "notes": [note for note in notes if note],
    }
