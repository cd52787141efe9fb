"""Show where a model errs and what it looks at: the images of largest loss with Grad-CAM, and error patterns.

interpretation-<split>/top_losses.png   the images of largest loss beside their heat maps
                       top_losses.csv   all images of the split, the largest loss first
                       summary.json     the images of largest loss, and what the errors have in common
"""

import html
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import ClassificationInterpretation, DataLoader, Learner

from xray_fastai import DISCLAIMER
from xray_fastai.data.dataset import labelled_images
from xray_fastai.data.images import size_of
from xray_fastai.evaluation.contact_sheet import BATCH, LIMIT, draw_sheet, make_cells
from xray_fastai.evaluation.error_patterns import suspicious_causes
from xray_fastai.evaluation.report import write_report
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.stream import predict_all
from xray_fastai.metrics.scored import losses
from xray_fastai.system.device import describe
from xray_fastai.system.errors import UserError
from xray_fastai.system.files import replaced
from xray_fastai.system.parallel import map_in_threads
from xray_fastai.system.progress import track
from xray_fastai.system.text import data_uri, shorten, wrap

FORMAT = 1
"""The layout of `summary.json`."""

PICTURE, LOSSES, SUMMARY = "top_losses.png", "top_losses.csv", "summary.json"
SPLITS = ("valid", "test", "train")
WORST = 16
"""Images in `summary.json` and in the table on the terminal."""


class XrayInterpretation(ClassificationInterpretation):
    """fastai's interpretation, with the losses and predictions that this package reports everywhere.

    fastai takes the loss of the training: weighted by class, before calibration. Sorted by this loss, the images of a
    rare class come first because they are rare. Here an image's loss is -log of its true class's calibrated
    probability. fastai also predicts the most probable class, where an export applies its threshold. Here the confusion
    matrix, and what is made from it, counts the predictions of the export.
    """

    def __init__(
        self,
        learn: Learner,
        dl: DataLoader,  # over a table with a column `label`
        losses: torch.Tensor,  # (N,)
        predicted: np.ndarray,  # (N,), index of the predicted class
        act=None,  # activation; None is the loss function's own, calibrated
    ):
        super().__init__(learn, dl, losses, act)
        self.predicted = predicted

    @classmethod
    def from_learner(cls, learn, ds_idx=1, dl=None, act=None):
        "As fastai's; it predicts the most probable class, since a learner has no threshold."
        if dl is None:
            dl = learn.dls[ds_idx].new(shuffle=False, drop_last=False)
        y_prob, y_true = (part.numpy() for part in learn.get_preds(dl=dl, act=act))
        return cls(learn, dl, torch.from_numpy(losses(y_prob, y_true)), y_prob.argmax(axis=1), act)

    def confusion_matrix(self) -> np.ndarray:
        "Counts (true class, predicted class), in the order of the vocabulary."
        matrix: np.ndarray = np.zeros((len(self.vocab), len(self.vocab)), dtype=int)
        np.add.at(matrix, (np.array(self._y_true()), self.predicted), 1)
        return matrix

    def print_classification_report(self):
        "Print scikit-learn's report on the predicted classes."
        from sklearn.metrics import classification_report

        names, labels = list(self.vocab), list(range(len(self.vocab)))
        print(classification_report(self._y_true(), self.predicted, labels=labels, target_names=names, zero_division=0))

    def _y_true(self) -> list[int]:
        return [self.vocab.o2i[label] for label in self.dl.items.label]


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
    interpretation: XrayInterpretation = field(repr=False)  # for fastai's own methods

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
    table: pd.DataFrame  # path, patient, truth, prediction, p_<class> ..., loss, probability (of the prediction)
    causes: list[str]
    interpretation: XrayInterpretation

    @property
    def errors(self) -> int:
        return int((self.table.truth != self.table.prediction).sum())


def interpret(
    model: str | Path | None = None,
    data: str | Path | None = None,
    split: str = "valid",
    top: int = 16,
    *,
    label: str | None = None,
    only_errors: bool = False,
    confident: bool = False,
    output: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Interpreted:
    """Find the images of a split with the largest losses, and where the model looked.

    Args:
        model: an export; None is the newest in ./exports.
        data: the folder that holds the split; None is the one that `fit` used.
        split: valid (exactly what `fit` validated on), test or train (without what it validated on).
        top: how many images to draw, at most `contact_sheet.LIMIT`.
        label: draw only images whose true class is this.
        only_errors: draw only misclassified images.
        confident: draw the correctly classified images with the highest probability, instead of the largest losses.
        output: the folder to write `interpretation-<split>` into; None is the export. An earlier one is replaced.
        device: auto, cpu, cuda or mps.
        precision: auto, fp32 or bf16 of the probabilities, as in `evaluate`; heat maps are computed in fp32.

    Raises:
        UserError: bad input, an image that cannot be read, or a folder that cannot be written to. Then nothing is
            written, and an earlier result stays.
    """
    selection = _Selection(top, label, only_errors, confident)
    _check(split, selection)
    opened = open_model(model, device, precision)
    images = _images(opened, data, split, selection)
    folder = Path(opened.path if output is None else output) / f"interpretation-{split}"
    with replaced(folder, SUMMARY) as partial:
        ranking = _rank(opened, split, images)
        shown, description, remarks = _select(ranking.table, selection)
        if len(shown):
            remarks += _draw(ranking, shown, description, partial / PICTURE)
        _write(partial, ranking, shown, description)
    write_report(opened.path, output)
    head = _head(ranking, opened.settings["data"]["name"] if data is None else str(data))
    table = ranking.table.drop(columns="probability")
    return Interpreted(folder, table, shown, head, description, remarks, ranking.causes, ranking.interpretation)


def _check(split: str, selection: _Selection) -> None:
    if split not in SPLITS:
        raise UserError(f"choose one of {', '.join(SPLITS)}", option="split", value=split)
    if selection.top < 1:
        raise UserError("give 1 or more", option="top", value=selection.top)
    if selection.only_errors and selection.confident:
        message = "shows correctly classified images, --only-errors the misclassified ones; give one of them"
        raise UserError(message, option="confident")


def _images(model: Model, data: str | Path | None, split: str, selection: _Selection) -> pd.DataFrame:
    """Return the images of the split: path, patient, label."""
    if selection.label is not None and selection.label not in model.classes:
        message = f"no such class; the classes are {', '.join(model.classes)}"
        raise UserError(message, option="label", value=selection.label)
    images = labelled_images(model.settings, data, split)
    if images.empty:
        raise UserError("fit validated on all of its images; choose another split", option="split", value=split)
    return images


def _rank(model: Model, split: str, images: pd.DataFrame) -> _Ranking:
    """Predict the images, sort them by falling loss, and look for what the errors have in common."""
    y_prob = model.probabilities(predict_all(model, images.path))
    sizes = _sizes(images.path)
    y_true = np.array([model.classes.index(name) for name in images.label])
    y_pred, loss = model.decide(y_prob), losses(y_prob, y_true)
    dl = model.learn.dls.test_dl(images, with_labels=True, bs=BATCH)
    interpretation = XrayInterpretation(model.learn, dl, torch.from_numpy(loss), y_pred)

    table = images[["path", "patient"]].assign(truth=images.label, prediction=np.array(model.classes)[y_pred])
    table = table.assign(**{f"p_{name}": y_prob[:, i] for i, name in enumerate(model.classes)}, loss=loss)
    causes = suspicious_causes(table.assign(width=sizes[:, 0], height=sizes[:, 1]))
    table = table.assign(probability=y_prob[np.arange(len(table)), y_pred])
    table = table.sort_values("loss", ascending=False, kind="stable", ignore_index=True)
    return _Ranking(model, split, table, causes, interpretation)


def _select(table: pd.DataFrame, selection: _Selection) -> tuple[pd.DataFrame, str, list[str]]:
    """Return the rows to draw, what they are in words, and remarks for the user."""
    rows, kind = table, "image"
    if selection.label is not None:
        rows, kind = rows[rows.truth == selection.label], f"{selection.label} image"
    if selection.only_errors:
        rows, kind = rows[rows.truth != rows.prediction], f"misclassified {kind}"
    if selection.confident:
        rows, kind = rows[rows.truth == rows.prediction], f"correctly classified {kind}"
        rows = rows.sort_values("probability", ascending=False, kind="stable")
    top = selection.top
    shown = rows.head(min(top, LIMIT)).reset_index(drop=True)
    if not len(shown):
        return shown, f"no {kind} in this split, so there is no picture", []
    counted = kind if len(shown) == 1 else f"{len(shown)} {kind}s"
    order = "highest confidence" if selection.confident else "largest loss"
    remarks = []
    if top > len(rows):
        remarks.append(f"--top {top}: there are only {len(rows)}; all are shown.")
    elif top > LIMIT:
        remarks.append(f"--top {top}: the picture shows the first {LIMIT}; {LOSSES} lists all images of the split.")
    return shown, f"the {counted} with the {order}", remarks


def _draw(ranking: _Ranking, shown: pd.DataFrame, description: str, path: Path) -> list[str]:
    """Draw images beside their heat maps; return remarks for the user."""
    cells = list(track(make_cells(ranking.model, shown), "heat maps", len(shown)))
    height, width = cells[0].cam.shape
    name = shorten(ranking.model.path.resolve().name, 40)
    notes = [
        f"{ranking.split} split: {len(ranking.table)} images, {ranking.errors} misclassified. Model: {name}.",
        f"Left the image, right its Grad-CAM ({height} x {width} cells) for the predicted class: red marks what "
        "speaks most for it, no colour what does not.",
    ]
    draw_sheet(cells, _capitalized(description), notes, DISCLAIMER, path)
    if height * width > 1:
        return []
    return [f"The heat maps are empty: {ranking.model.size} pixels leave one cell for the whole image."]


def _write(folder: Path, ranking: _Ranking, shown: pd.DataFrame, description: str) -> None:
    """Write `top_losses.csv` and `summary.json`."""
    # a file name may hold bytes that are no text
    table = ranking.table.drop(columns="probability")
    table.to_csv(folder / LOSSES, index=False, encoding="utf-8", errors="backslashreplace")
    summary = {
        "format": FORMAT,
        "split": ranking.split,
        "images": len(table),
        "errors": ranking.errors,
        "selection": description,
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
    device = f"on {describe(model.learn.dls.device)}, precision {model.precision}"
    return [
        ("Model:", str(model.path)),
        ("", f"{model.settings['architecture']}, {model.size} pixels, {device}"),
        ("Data:", data),
        ("", f"{ranking.split} split, {images} images"),
        ("Wrong:", f"{ranking.errors} of {images}{rule}"),
    ]


def _table(rows: pd.DataFrame) -> list[str]:
    """Return the first rows as lines of at most 80 characters."""
    lines = [f"{'#':>4}  {'loss':>6}  {'truth':<12}  {'predicted':<12}  {'prob.':>5}  file"] if len(rows) else []
    for i, row in enumerate(rows.head(WORST).itertuples(), start=1):
        names = [f"{shorten(name, 12):<12}" for name in (row.truth, row.prediction)]
        file = shorten(Path(row.path).name, 31)
        lines.append(f"{i:>4}  {row.loss:>6.3f}  {names[0]}  {names[1]}  {row.probability:>5.3f}  {file}")
    if len(rows) > WORST:
        lines.append(f"     ... and {len(rows) - WORST} more in {PICTURE}")
    return lines


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]
