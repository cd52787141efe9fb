"""Show where a model errs and what it looks at: the images of largest loss with Grad-CAM, and error patterns.

interpretation-<split>/top_losses.png   the images of largest loss beside their heat maps
                       top_losses.csv   all images of the split, the largest loss first
                       summary.json     the images of largest loss, and what the errors have in common
"""

import html
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from xray_fastai import DISCLAIMER
from xray_fastai.config.choices import network_of
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.data.image_keys import file_key
from xray_fastai.data.images import size_of
from xray_fastai.data.labelled import Request, has_folds, labelled_images, split_named
from xray_fastai.data.patients import note_on
from xray_fastai.data.table import Data
from xray_fastai.data.table_columns import Column
from xray_fastai.evaluation.contact_sheet import LIMIT, draw_sheet
from xray_fastai.evaluation.error_patterns import suspicious_causes
from xray_fastai.evaluation.evaluate import SPLITS
from xray_fastai.evaluation.evaluation_result import write_table
from xray_fastai.evaluation.out_of_fold import JUDGED, cells, out_of_fold
from xray_fastai.evaluation.report import write_report
from xray_fastai.evaluation.result_folder import replaced_data, result_folder
from xray_fastai.inference.gradcam import describe as describe_map
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.rows import UNLIKE_DIGITS, DecisionRule, Withheld
from xray_fastai.inference.stream import predict_and_compare
from xray_fastai.metrics.scored import losses
from xray_fastai.system.device import describe
from xray_fastai.system.errors import OptionError, UserError
from xray_fastai.system.files import replaced
from xray_fastai.system.imports import without_fastais_warning
from xray_fastai.system.parallel import map_in_threads
from xray_fastai.system.progress import track
from xray_fastai.system.text import count_of, data_uri, shorten, wrap

if TYPE_CHECKING:
    from fastai.learner import Learner

    from xray_fastai.evaluation.interpretation import XrayInterpretation

FORMAT = 1
"""The layout of `summary.json`."""

PICTURE, LOSSES, SUMMARY = "top_losses.png", "top_losses.csv", "summary.json"
NOT_CALLED = "?"
"""Marks the prediction of an image that `predict` would not call."""
WORST = 16
"""Images in `summary.json` and in the table on the terminal."""


@dataclass(frozen=True)
class Interpreted:
    """The result of `interpret`. Prints as a summary; shows the picture in a notebook."""

    path: Path  # the folder that holds the files
    table: pd.DataFrame = field(repr=False)  # top_losses.csv: path, patient, truth, ..., loss
    shown: pd.DataFrame = field(repr=False)  # the rows in the picture, in its order
    head: list[tuple[str, str]] = field(repr=False)  # which model and data: a term and a text for each line
    selection: str
    remarks: list[str] = field(repr=False)
    causes: list[str]
    model: Model = field(repr=False)
    images: pd.DataFrame = field(repr=False)  # of the split: path, patient, label, loss, predicted (index of the class)

    @cached_property
    def interpretation(self) -> "XrayInterpretation":
        """fastai's interpretation of the split, for its methods; the first use imports fastai and reads the export."""
        # fastai takes seconds to import, and the command does without it
        with without_fastais_warning():
            from xray_fastai.evaluation.interpretation import interpretation_of

        return interpretation_of(self.model.path, self.images, self.model.device)

    def __str__(self) -> str:
        files = [self.path / name for name in (PICTURE, LOSSES, SUMMARY)]
        paragraphs = [
            [DISCLAIMER],
            [line for term, text in self.head for line in wrap(text, f"{term:<7}")],
            [*wrap(_capitalized(self.selection) + (":" if len(self.shown) else ".")), *_table(self.shown)],
            [line for remark in self.remarks for line in wrap(remark)],
            ["What the errors have in common:", *(line for cause in self.causes for line in wrap(cause, "- "))],
            ["Files:", *(f"  {file}" for file in files if file.is_file())],
            [DISCLAIMER],
        ]
        return "\n\n".join("\n".join(lines) for lines in paragraphs if lines)

    def _repr_html_(self) -> str:
        head = [*(f"{term} {text}" for term, text in self.head), self.selection]
        parts = [f"<p>{DISCLAIMER}</p>", f"<p>{'<br>'.join(map(html.escape, head))}</p>"]
        if (self.path / PICTURE).is_file():
            uri = data_uri((self.path / PICTURE).read_bytes(), "image/png")
            names = html.escape(", ".join(Path(path).name for path in self.shown.path.head(WORST)))
            parts.append(f'<img style="max-width:100%" alt="{names}" src="{uri}">')
        parts.append(self.shown.head(WORST).to_html(index=False, float_format="{:.4f}".format))
        parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in [*self.remarks, *self.causes]))
        return "\n".join([*parts, "</ul>", f"<p>{DISCLAIMER}</p>"])


@dataclass(frozen=True)
class _Selection:
    """Which images to draw."""

    top: int
    label: str | None
    only_errors: bool
    confident: bool


@dataclass(frozen=True)
class _Ranking:
    """The images of a split by falling loss, and what the model predicts for them."""

    model: Model
    split: str
    images: pd.DataFrame  # in the order of the folder: path, patient, label, loss, predicted
    # path, patient, truth, prediction, p_<class> ..., loss, wrong, unlike, uncertain (whether it would not be called),
    # probability (of the prediction); with folds `member`, the number of the network that judges the image
    table: pd.DataFrame
    causes: list[str]

    @property
    def errors(self) -> int:
        return int(self.table.wrong.sum())

    @property
    def images_are(self) -> str:
        """What the images are, in words."""
        return "training images, out of fold" if "member" in self.table else f"{self.split} split"


def interpret(
    model: "str | Path | Model | Learner | None" = None,
    data: Data | None = None,
    split: str = "valid",
    top: int = 16,
    *,
    label: str | None = None,
    only_errors: bool = False,
    confident: bool = False,
    exclude: str | None = None,
    patients: str | None = None,
    images: str | Path | None = None,
    column: Column = None,
    output: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Interpreted:
    """Find the images of a split with the largest losses, and where the model looked.

    Args:
        model: as in `evaluate`.
        data: the folder that holds the split, or folders of the model's classes without splits; or a table of images,
            a .csv file or a data frame (`data.table`); None is what `fit` used.
        split: valid (exactly what `fit` validated on; of an ensemble on folds all training images, each judged and
            mapped by the network that was not trained on it), test or train (without what it validated on).
        top: how many images to draw, at most `contact_sheet.LIMIT`.
        label: draw only images whose true class is this.
        only_errors: draw only misclassified images, and list only these in `top_losses.csv`.
        confident: draw the correctly classified images with the highest probability, instead of the largest losses.
        exclude: as in `evaluate`.
        patients: as in `evaluate`.
        images: the folder of the images of a table; None is the one that holds the table.
        column: the headers of a table's columns, as in {"label": "Finding"}; None finds them by their names.
        output: the folder to write `interpretation-<split>` into; None is the export. An earlier one is replaced.
        device: auto, cpu, cuda or mps.
        precision: auto, fp32 or bf16 of the probabilities, as in `evaluate`; heat maps are computed in fp32.

    Raises:
        UserError: bad input, an image that cannot be read, or a folder that cannot be written to. Then nothing is
            written, and an earlier result stays.

    Examples:
        >>> result = interpret("exports/rehearsal", data="chest_xray", split="train", top=4, output="results")
        >>> result.selection
        'the 4 images with the largest loss'
    """
    selection = _Selection(top, label, only_errors, confident)
    _check(selection)
    opened = open_model(model, device, precision)
    _check_class(opened, selection)
    wanted = Request(data, split_named(split), exclude, patients, images, column)
    folds = out_of_fold(opened) if wanted.split == "valid" and has_folds(opened.settings) else None
    if folds is not None:
        wanted = replace(wanted, out_of_fold=frozenset(folds.index))
    labelled = labelled_images(opened.settings, wanted)
    split, wanted = labelled.split, replace(wanted, split=labelled.split)
    source = wanted.name or opened.settings["data"]["name"]
    folder = result_folder("interpretation", opened.path, opened.settings, wanted, output)
    note = replaced_data(folder, SUMMARY, opened.settings, wanted)
    with replaced(folder, SUMMARY) as partial:
        ranking = _rank(opened, split, labelled.table, folds if split == "valid" else None)
        shown, description, remarks = _select(ranking.table, selection)
        if len(shown):
            _draw(ranking, shown, description, partial / PICTURE)
        _write(partial, ranking, shown, only_errors, {"data": source, "selection": description})
    write_report(opened.path, output)
    if "member" in ranking.table:
        remarks.append(JUDGED)
    remarks += filter(None, [*labelled.notes, note, note_on(labelled.table)])
    head = _head(ranking, source)
    table = ranking.table.drop(columns="probability")
    return Interpreted(folder, table, shown, head, description, remarks, ranking.causes, opened, ranking.images)


def _check(selection: _Selection) -> None:
    if selection.top < 1:
        raise OptionError("give 1 or more", option="top", value=selection.top)
    if selection.only_errors and selection.confident:
        message = "shows correctly classified images, only_errors= the misclassified ones; give one of them"
        raise OptionError(message, option="confident")


def _check_class(model: Model, selection: _Selection) -> None:
    if selection.label is not None and selection.label not in model.classes:
        message = f"no such class; the classes are {', '.join(model.classes)}"
        raise UserError(message, option="label", value=selection.label)


def _rank(model: Model, split: str, images: pd.DataFrame, folds: pd.DataFrame | None) -> _Ranking:
    """Predict the images, sort them by falling loss, and look for what the errors have in common.

    Args:
        model: an export.
        split: the name of the images.
        images: path, patient, label, file.
        folds: from `out_of_fold`, whose probabilities count instead of those of all networks; None without folds.
    """
    logits, unlike = predict_and_compare(model, images.path)
    y_prob = model.probabilities(logits)
    if folds is not None:
        judged = folds.loc[images.file.map(file_key)]
        y_prob = judged[model.classes].to_numpy()
    sizes = _sizes(images.path)
    y_true = np.array([model.classes.index(name) for name in images.label])
    rule = DecisionRule.of(model, PredictConfig())
    distances = [None] * len(images) if unlike is None else unlike.tolist()
    withheld = [rule.withheld(distance, None) is not None for distance in distances]
    y_pred, loss = model.decide(y_prob), losses(y_prob, y_true)
    table = images[["path", "patient"]].assign(truth=images.label, prediction=np.array(model.classes)[y_pred])
    table = table.assign(**{f"p_{name}": y_prob[:, i] for i, name in enumerate(model.classes)}, loss=loss)
    table = table.assign(wrong=table.truth != table.prediction)
    table = table.assign(unlike=np.nan if unlike is None else unlike.round(UNLIKE_DIGITS), uncertain=withheld)
    causes = suspicious_causes(table.assign(width=sizes[:, 0], height=sizes[:, 1]))
    table = table.assign(probability=y_prob[np.arange(len(table)), y_pred])
    if folds is not None:
        table = table.assign(member=judged.member.to_numpy())
    table = table.sort_values("loss", ascending=False, kind="stable", ignore_index=True)
    return _Ranking(model, split, images.assign(loss=loss, predicted=y_pred), table, causes)


def _select(table: pd.DataFrame, selection: _Selection) -> tuple[pd.DataFrame, str, list[str]]:
    """Return the rows to draw, what they are in words, and remarks for the user."""
    rows, kind = table, "image"
    if selection.label is not None:
        rows, kind = rows[rows.truth == selection.label], f"{selection.label} image"
    if selection.only_errors:
        rows, kind = rows[rows.wrong], f"misclassified {kind}"
    if selection.confident:
        rows, kind = rows[~rows.wrong], f"correctly classified {kind}"
        rows = rows.sort_values("probability", ascending=False, kind="stable")
    top = selection.top
    shown = rows.head(min(top, LIMIT)).reset_index(drop=True)
    if not len(shown):
        return shown, f"no {kind} in this split, so there is no picture", []
    counted = kind if len(shown) == 1 else f"{len(shown)} {kind}s"
    order = "highest confidence" if selection.confident else "largest loss"
    remarks = []
    if top > len(rows):
        remarks.append(f"{top} images were asked for, and there are only {len(rows)}: all are shown.")
    elif top > LIMIT:
        remarks.append(f"{top} images were asked for; the picture shows the first {LIMIT}, and {LOSSES} lists all.")
    if marked := int(shown.uncertain.sum()):
        remarks.append(f"{marked} of these images are {Withheld.UNLIKE.value}, and are not called ({NOT_CALLED}).")
    return shown, f"the {counted} with the {order}", remarks


def _draw(ranking: _Ranking, shown: pd.DataFrame, description: str, path: Path) -> None:
    """Draw images beside their heat maps."""
    drawn = list(track(cells(ranking.model, shown), "heat maps", len(shown)))
    name = shorten(ranking.model.path.resolve().name, 40)
    notes = [
        f"{_capitalized(ranking.images_are)}: {count_of(len(ranking.table), 'image')}, {ranking.errors} misclassified. "
        f"Model: {name}.",
        f"Beside each image what speaks for the class that is called{_and_to_detect(ranking.model)}.",
        f"{describe_map(next(iter(drawn[0].maps.values())))}.",
    ]
    draw_sheet(drawn, _capitalized(description), notes, DISCLAIMER, path)


def _and_to_detect(model: Model) -> str:
    return "" if model.positive is None else f", and, where that is another, for {model.positive}"


def _write(folder: Path, ranking: _Ranking, shown: pd.DataFrame, only_errors: bool, about: dict[str, str]) -> None:
    """Write `top_losses.csv`, and `summary.json`, which names the data and the selection."""
    # a file name may hold bytes that are no text
    table = ranking.table.drop(columns="probability")
    write_table(table[table.wrong] if only_errors else table, folder / LOSSES)
    summary = {
        "format": FORMAT,
        "split": ranking.split,
        "images": len(table),
        "errors": ranking.errors,
        **about,
        "worst": shown[["path", "truth", "prediction", "probability", "loss"]].head(WORST).to_dict("records"),
        "causes": ranking.causes,
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _sizes(paths: Iterable[str]) -> np.ndarray:
    """Return widths and heights in pixels (N, 2), as the images are shown."""
    return np.array(list(map_in_threads(size_of, paths)))


def _head(ranking: _Ranking, data: str) -> list[tuple[str, str]]:
    """Return which model, which data and how many errors, each as a term and a text."""
    model, images = ranking.model, len(ranking.table)
    threshold = model.threshold_of()
    rule = "" if threshold is None else f", at the threshold {threshold:.3f}"
    device = f"on {describe(model.device)}, precision {model.precision}"
    return [
        ("Model:", str(model.path)),
        ("", f"{network_of(model.settings)}, {model.size} pixels, {device}"),
        ("Data:", data),
        ("", f"{ranking.images_are}, {images} images"),
        ("Wrong:", f"{ranking.errors} of {images}{rule}"),
        *([("Note:", note)] if (note := SPLITS[ranking.split]) else []),
    ]


def _table(rows: pd.DataFrame) -> list[str]:
    """Return the first rows as lines of at most 80 characters."""
    lines = [f"{'#':>4}  {'loss':>6}  {'truth':<12}  {'predicted':<12}  {'prob.':>5}  file"] if len(rows) else []
    for i, row in enumerate(rows.head(WORST).itertuples(), start=1):
        called = f"{shorten(row.prediction, 11)}{NOT_CALLED}" if row.uncertain else shorten(row.prediction, 12)
        names = [f"{name:<12}" for name in (shorten(row.truth, 12), called)]
        file = shorten(Path(row.path).name, 31)
        lines.append(f"{i:>4}  {row.loss:>6.3f}  {names[0]}  {names[1]}  {row.probability:>5.3f}  {file}")
    if len(rows) > WORST:
        lines.append(f"     ... and {len(rows) - WORST} more in {PICTURE}")
    return lines


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]
