"""Fits an export to the place where it is used, with some labelled images of that place: the public function
`recalibrate`.

The network stays as it is. Slope and intercepts of its probabilities, and the decision threshold, are chosen anew.
`training.unlabelled` adapts a model to images without labels. The README of this folder says what was measured.
"""

import os
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from xray_fastai import DISCLAIMER
from xray_fastai.config.choices import network_of
from xray_fastai.data.labelled import Labelled, Request, labelled_images
from xray_fastai.data.patients import note_on
from xray_fastai.data.table import Data, is_table, name_of
from xray_fastai.data.table_columns import Column
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.stream import predict_all
from xray_fastai.metrics.scored import Scored
from xray_fastai.metrics.table import title_of
from xray_fastai.system.errors import OptionError, UserError
from xray_fastai.system.text import count_of, format_interval, wrap
from xray_fastai.training import unlabelled as without
from xray_fastai.training.calibration import Validated
from xray_fastai.training.derive_export import derive_export
from xray_fastai.training.gain import PARTS, Called, compared
from xray_fastai.training.local_fit import Rule, fit_locally

if TYPE_CHECKING:
    from fastai.learner import Learner

FEWEST = 10
"""With fewer labelled images nothing is fitted."""


@dataclass(frozen=True)
class Recalibration:
    """Describes the export that was written, and what it gained. Prints as a table."""

    path: Path  # the new export
    record: dict[str, Any] = field(repr=False)  # `recalibrated` of its model.json
    about: list[tuple[str, str]] = field(repr=False)  # what was done with what, for people: a term and a text

    @property
    def metrics(self) -> pd.DataFrame:
        """A row for each metric: value, low and high, before, after, and of the difference."""
        columns = pd.MultiIndex.from_product([PARTS, ["value", "low", "high"]])
        rows = {name: np.concatenate([found[part] for part in PARTS]) for name, found in self.record["metrics"].items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns, dtype=float).rename_axis("metric")

    def __str__(self) -> str:
        lines = [DISCLAIMER, ""]
        for name, text in self.about:
            lines += wrap(text, f"{name:<15}")
        if self.record["metrics"]:
            lines += ["", f"{'':<28}{'before':<10}{'after':<10}difference"]
        for name, found in self.record["metrics"].items():
            before, after = (f"{_cell([found[part][0], None, None]):<10}" for part in PARTS[:2])
            lines.append(f"{title_of(name):<28}{before}{after}{_cell(found[PARTS[2]])}")
        return "\n".join([*lines, "", *wrap(str(self.path), f"{'written':<15}"), DISCLAIMER])

    def _repr_html_(self) -> str:
        facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in self.about)
        table = self.metrics.rename(index=title_of).to_html() if self.record["metrics"] else ""
        return f"<p>{DISCLAIMER}</p><dl>{facts}<dt>written</dt><dd>{escape(str(self.path))}</dd></dl>{table}"


def recalibrate(
    model: "str | Path | Model | Learner | None" = None,
    data: Data | None = None,
    split: str | None = None,
    *,
    unlabelled: str | Path | None = None,
    match_scores: bool = False,
    prevalence: float | None = None,
    target_sensitivity: float | None = None,
    cost_ratio: float | None = None,
    exclude: str | None = None,
    patients: str | None = None,
    images: str | Path | None = None,
    column: Column = None,
    output: str | Path | None = None,
    device: str = "auto",
) -> Recalibration:
    """Fit the probabilities and the threshold of an export to local images, and write a new export.

    With labelled images, slope and intercept are fitted by penalised likelihood, which moves the probabilities no
    further than the images show. With fewer than 20 the slope stays. The figures after it are of images that it was not
    fitted to: cross-validation, all images of a patient in one fold. The new export holds numbers only, nothing of the
    local images; its `lineage` names the one that it comes from.

    Args:
        model: the export's folder, an open model, or a learner that `load_learner` opened; None is the
            default export (`xray-fastai default`), else the newest in ./exports.
        data: a folder of labelled local images, whose subfolders are the model's classes; or a table of images, as in
            `evaluate`.
        split: the subfolder of `data` that holds the folders of the classes, such as test; None: `data` itself.
        unlabelled: a folder of local images without labels, which batch norm is adapted to.
        match_scores: instead of that, move the operating point so that the share of `unlabelled` called positive fits
            validation's at `prevalence`.
        prevalence: the share of positive images in `unlabelled`, which `match_scores` needs.
        target_sensitivity: choose the threshold for this sensitivity.
        cost_ratio: choose it for this many false alarms being as bad as one missed image of the class to detect.
        exclude: a list of files in `data` to leave out, as `data check --fix` writes it.
        patients: a .csv file with the columns file and patient, of the images in `data`, or else in `unlabelled`.
        images: the folder of the images of a table; None is the one that holds the table.
        column: the headers of a table's columns, as in {"label": "Finding"}; None finds them by their names.
        output: the new export; None is the folder of the model with "-recalibrated" after its name.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: no export, no such images or too few of them, an image that cannot be read, or a folder that exists.

    Examples:
        >>> result = recalibrate("exports/rehearsal", "chest_xray/train", output="exports/local")
        >>> result.record["counts"]
        {'NORMAL': 16, 'PNEUMONIA': 24}
        >>> verify(result.path).ok
        True
    """
    rule = Rule(target_sensitivity, cost_ratio)
    _check_given(data, split, unlabelled, match_scores, prevalence, rule)
    opened = open_model(model, device, "fp32")
    if len(opened.classes) != 2 and rule != Rule():
        message = f"a model of {len(opened.classes)} classes predicts the most probable one; leave it out"
        raise UserError(message, option="cost_ratio" if target_sensitivity is None else "target_sensitivity")
    target = Path(os.path.expanduser(output)) if output is not None else _free(opened.path)
    if target.exists():
        raise UserError("it already exists; give another folder", option="output", value=target)
    about, adapted, unlabelled_images = [("model", f"{opened.path}: {network_of(opened.settings)}")], opened, 0
    if unlabelled is not None:
        listed = patients if data is None else None
        done = without.without_labels(opened, without.Request(unlabelled, match_scores, prevalence, listed))
        adapted, unlabelled_images = done.model, done.images
        about += [("unlabelled", line) for line in done.lines]
    record = _record(adapted, unlabelled=unlabelled_images)
    settings = adapted.settings
    if data is not None:
        labelled = _labelled(opened, Request(data, split, exclude, patients, images, column))
        about += _described(labelled, data, split)
        settings, record = _fitted(opened, adapted, labelled, rule, unlabelled_images)
    about.append(("probabilities", replace(adapted, settings=settings).describe_probabilities()))
    if settings["threshold"] is not None:
        about.append(("threshold", f"{settings['threshold']:.4g}, before {opened.settings['threshold']:.4g}"))
    about.append(("chosen", settings["calibration"]))
    if record["metrics"]:
        about.append(("figures", AFTER))
    if (warning := wrong_way(record["metrics"])) is not None:
        about.append(("WARNING", warning))
    path = derive_export(opened, adapted.network, settings | {"recalibrated": record}, target)
    return Recalibration(path, record, about)


AFTER = (
    "before: the export as it was; after: each image by a fit to the other patients, cross-validated; the difference "
    "with its 95 % interval by patient. The order of the images, and so the AUC, needs no label"
)


def wrong_way(metrics: dict[str, dict[str, list[float | None]]]) -> str | None:
    """Return a warning if the local images have the order of the probabilities the wrong way round; None if not.

    Args:
        metrics: see `gain.compared`.
    """
    if not metrics:
        return None
    slopes = [metrics["calibration_slope"][part][0] for part in PARTS[:2]]
    auc = metrics["roc_auc"][PARTS[1]][0]
    if (auc is None or auc >= 0.5) and all(slope is None or slope > 0 for slope in slopes):
        return None
    return (
        "on these images a higher probability goes with the class less often, not more: the labels may be swapped, or "
        "the model does not work here. No recalibration mends that: look at the labels, and do not use the new export"
    )


def _check_given(
    data: Data | None,
    split: str | None,
    unlabelled: str | Path | None,
    match_scores: bool,
    prevalence: float | None,
    rule: Rule,
) -> None:
    if data is None and unlabelled is None:
        raise OptionError("give a folder of local images: with labels by data=, without by unlabelled=", option="data")
    if unlabelled is None and match_scores:
        raise OptionError("needs images without labels, by unlabelled=", option="match_scores")
    if not match_scores and prevalence is not None:
        raise OptionError("is for match_scores=True; leave it out", option="prevalence")
    if prevalence is not None and not 0 < prevalence < 1:
        raise OptionError("give a share above 0 and below 1", option="prevalence", value=f"{prevalence:g}")
    if match_scores and data is not None:
        raise OptionError("labelled images say more; leave it out, or data=", option="match_scores")
    if data is None and (rule != Rule() or split is not None):
        name = (
            "split" if split is not None else "cost_ratio" if rule.target_sensitivity is None else "target_sensitivity"
        )
        raise OptionError("needs labelled images, by data=", option=name)


def _free(parent: Path) -> Path:
    """Return the first free name for what comes from an export, beside it."""
    base = parent if parent.name not in ("", "..") else parent.resolve()
    stem = base.with_name(f"{base.name}-recalibrated")
    names = [stem, *(stem.with_name(f"{stem.name}-{i}") for i in range(2, 1000))]
    return next(path for path in names if not path.exists())


def _labelled(model: Model, request: Request) -> Labelled:
    """List the labelled images.

    Raises:
        UserError: there are too few, or none of a class.
    """
    labelled = labelled_images(model.settings, request)
    counts = labelled.table.label.value_counts()
    if missing := [name for name in model.classes if name not in counts]:
        raise UserError(f"no image of {', '.join(missing)}; label some", option="data", value=request.name)
    if len(labelled.table) < FEWEST:
        message = f"{count_of(len(labelled.table), 'labelled image')}; {FEWEST} or more are needed, better 50"
        raise UserError(message, option="data", value=request.name)
    return labelled


def _described(labelled: Labelled, data: Data, split: str | None) -> list[tuple[str, str]]:
    table = labelled.table
    counts = ", ".join(f"{name} {number:,}" for name, number in table.label.value_counts().sort_index().items())
    where = name_of(data) if split is None or is_table(data) else str(Path(str(data), split))
    patients = count_of(table.patient.nunique(), "patient")
    notes = [note for note in (*labelled.notes, note_on(table)) if note]
    return [("data", f"{where}: {counts}, of {patients}"), *(("note", note) for note in notes)]


def _record(model: Model, unlabelled: int, **facts: Any) -> dict[str, Any]:
    """Return `recalibrated` of `model.json`."""
    nothing = {"images": 0, "patients": 0, "counts": {}, "metrics": {}}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    method = model.settings["calibration"]
    return {"created": created, "method": method, **nothing, "unlabelled": unlabelled, **facts}


def _fitted(
    before: Model, model: Model, labelled: Labelled, rule: Rule, unlabelled: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit the scaling and choose the threshold.

    Args:
        before: the export as it was.
        model: the same, or adapted to images without labels.
        labelled: the local images.
        rule: of the threshold.
        unlabelled: how many images `model` was adapted to.

    Returns:
        The settings of the new export, and its record.
    """
    table, classes = labelled.table, len(model.classes)
    logits = predict_all(model, list(table.path))
    images = Validated(
        logits=model.scaling(logits),  # the fit starts from the export's own probabilities
        targets=np.array([model.classes.index(label) for label in table.label]),
        patients=pd.factorize(table.patient)[0],
        weights=np.ones(classes),
        trained=np.ones(classes),
    )
    positive = model.classes.index(model.positive) if classes == 2 and model.positive is not None else None
    fitted = fit_locally(images, positive, rule)
    first, scaling = model.scaling, fitted.scaling
    own = np.zeros(classes) if first.intercepts is None else np.asarray(first.intercepts)
    intercepts = np.asarray(scaling.intercepts) + own / scaling.temperature
    y_prob = before.probabilities(logits if before is model else predict_all(before, list(table.path)))
    old = Called(Scored(images.targets, y_prob, images.patients, positive), before.decide(y_prob))
    record = _record(
        model,
        unlabelled,
        method=fitted.note,
        images=len(table),
        patients=int(table.patient.nunique()),
        counts={name: int(number) for name, number in table.label.value_counts().sort_index().items()},
        metrics=compared(old, images, fitted, rule),
    )
    notes = [model.settings["calibration"]] if before is not model else []
    return model.settings | {
        "temperature": first.temperature * scaling.temperature,
        "intercepts": intercepts.tolist(),
        "prior": (images.counts / images.counts.sum()).tolist(),
        "threshold": fitted.threshold,
        "calibration": "; ".join([*notes, fitted.note]),
        "calibrated": True,
        "calibration_kind": "local",
        "scores": None,
        "called": None,
    }, record


def _cell(interval: list[float | None]) -> str:
    value, low, high = interval
    return "undefined" if value is None else format_interval(value, low, high)
