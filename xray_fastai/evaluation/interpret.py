"""Where a model errs, and what it looks at: the losses of a split, the worst with Grad-CAM, and what they share.

interpretation-<split>/top_losses.png   the images of largest loss beside their heat maps
                       top_losses.csv   all images of the split, the largest loss first
                       summary.json     the worst, and what the errors have in common
"""

import base64
import html
import json
import os
import textwrap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import ClassificationInterpretation, DataLoader, Learner

from xray_fastai import DISCLAIMER
from xray_fastai.data.dataset import labelled_images
from xray_fastai.data.images import size_of
from xray_fastai.evaluation.contact_sheet import BATCH, LIMIT, draw_sheet, make_cells, shorten
from xray_fastai.evaluation.error_patterns import suspicious_causes
from xray_fastai.evaluation.report import write_report
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.stream import predict_all
from xray_fastai.system.device import describe
from xray_fastai.system.errors import UserError
from xray_fastai.system.files import replaced
from xray_fastai.system.progress import track

FORMAT = 1
"""The layout of `summary.json`."""

PICTURE, LOSSES, SUMMARY = "top_losses.png", "top_losses.csv", "summary.json"
SPLITS = ("valid", "test", "train")
WORST = 16  # images named in `summary.json` and, at most, in the terminal


class XrayInterpretation(ClassificationInterpretation):
    """fastai's, with the losses and the decisions that this package reports everywhere.

    fastai takes the loss that was trained on: weighted by class, before calibration. Sorted by that, the images of a
    rare class come first because they are rare. Here an image's loss is -log of its true class's calibrated
    probability. And fastai calls the most probable class, where an export calls by its threshold: the confusion matrix,
    and what is made from it, counts what the export calls.
    """

    def __init__(
        self,
        learn: Learner,
        dl: DataLoader,  # over a table with a column `label`
        losses: torch.Tensor,  # (N,)
        predicted: np.ndarray,  # (N,), index of the class called
        act=None,  # activation; None is the loss function's own, calibrated
    ):
        super().__init__(learn, dl, losses, act)
        self.predicted = predicted

    @classmethod
    def from_learner(cls, learn, ds_idx=1, dl=None, act=None):
        "As fastai's; the most probable class is called, since a learner has no threshold."
        if dl is None:
            dl = learn.dls[ds_idx].new(shuffle=False, drop_last=False)
        probabilities, truth = (part.numpy() for part in learn.get_preds(dl=dl, act=act))
        return cls(learn, dl, torch.from_numpy(_losses(probabilities, truth)), probabilities.argmax(axis=1), act)

    def confusion_matrix(self) -> np.ndarray:
        "Counts (truth, called), in the order of the vocabulary."
        matrix = np.zeros((len(self.vocab), len(self.vocab)), dtype=int)
        np.add.at(matrix, (self._truth(), self.predicted), 1)
        return matrix

    def print_classification_report(self):
        "Print scikit-learn's report on what is called."
        from sklearn.metrics import classification_report

        names, labels = list(self.vocab), list(range(len(self.vocab)))
        print(classification_report(self._truth(), self.predicted, labels=labels, target_names=names, zero_division=0))

    def _truth(self) -> list[int]:
        return [self.vocab.o2i[label] for label in self.dl.items.label]


@dataclass(frozen=True)
class Interpreted:
    """What `interpret` found. Prints as a summary; shows the picture in a notebook."""

    path: Path  # the folder written
    table: pd.DataFrame = field(repr=False)  # all of the split by falling loss: path, patient, truth, ..., loss
    shown: pd.DataFrame = field(repr=False)  # the rows in the picture, in its order
    head: list[str] = field(repr=False)
    selection: str
    remarks: list[str] = field(repr=False)
    causes: list[str]
    interpretation: XrayInterpretation = field(repr=False)  # for fastai's own methods

    def __str__(self) -> str:
        lines = [DISCLAIMER, "", *self.head, ""]
        lines += [f"{self.selection[0].upper()}{self.selection[1:]}{':' if len(self.shown) else '.'}"]
        lines += _table(self.shown.head(WORST))
        if len(self.shown) > WORST:
            lines.append(f"     ... and {len(self.shown) - WORST} more in {PICTURE}")
        lines += ["", *self.remarks] if self.remarks else []
        lines += ["", "What the errors have in common:", *(f"- {line}" for line in self.causes)]
        files = [self.path / name for name in (PICTURE, LOSSES, SUMMARY)]
        lines += ["", "Files:", *(f"  {file}" for file in files if file.is_file())]
        return "\n".join(part for line in [*lines, "", DISCLAIMER] for part in _wrap(line))

    def _repr_html_(self) -> str:
        parts = [f"<p>{DISCLAIMER}</p>", f"<p>{'<br>'.join(map(html.escape, [*self.head, self.selection]))}</p>"]
        if (self.path / PICTURE).is_file():
            picture = base64.b64encode((self.path / PICTURE).read_bytes()).decode()
            names = html.escape(", ".join(Path(path).name for path in self.shown.path.head(WORST)))
            parts.append(f'<img style="max-width:100%" alt="{names}" src="data:image/png;base64,{picture}">')
        parts.append(self.shown.head(WORST).to_html(index=False, float_format="{:.4f}".format))
        parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in [*self.remarks, *self.causes]))
        return "\n".join([*parts, "</ul>", f"<p>{DISCLAIMER}</p>"])


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
    """Find the images of a split that a model is most wrong about, and where it looked.

    Args:
        model: an export; None takes the newest in ./exports.
        data: the folder that holds the split; None is the one that `fit` used.
        split: valid (exactly what `fit` validated on), test or train (without what it validated on).
        top: how many images to draw, at most `sheet.LIMIT`.
        label: draw only images whose true class is this.
        only_errors: draw only images called wrongly.
        confident: draw, instead of the largest losses, the images called rightly with the highest probability.
        output: the folder to write `interpretation-<split>` into; None is the export. One that is there is replaced.
        device: auto, cpu, cuda or mps.
        precision: auto, fp32 or bf16 of the probabilities, as `evaluate` has it; heat maps are computed in fp32.

    Raises:
        UserError: bad input, an image that can't be read, or a folder that can't be written to; then nothing is
            written, and what was there stays.
    """
    if split not in SPLITS:
        raise UserError(f"choose one of {', '.join(SPLITS)}", option="split", value=split)
    if top < 1:
        raise UserError("give 1 or more", option="top", value=top)
    if only_errors and confident:
        raise UserError("shows images called rightly, --only-errors those called wrongly; give one", option="confident")
    model = open_model(model, device, precision)
    if label is not None and label not in model.classes:
        raise UserError(f"no such class; the classes are {', '.join(model.classes)}", option="label", value=label)
    images = labelled_images(model.settings, data, split)
    if images.empty:
        raise UserError("no image is left in it without those that fit validated on", option="split", value=split)
    final = Path(model.path if output is None else output) / f"interpretation-{split}"
    with replaced(final, SUMMARY) as folder:
        probabilities = model.probabilities(predict_all(model, images.path))
        sizes = _sizes(images.path)
        truth = np.array([model.classes.index(name) for name in images.label])
        predicted, losses = model.decide(probabilities), _losses(probabilities, truth)
        dl = model.learn.dls.test_dl(images, with_labels=True, bs=BATCH)
        interpretation = XrayInterpretation(model.learn, dl, torch.from_numpy(losses), predicted)

        table = images[["path", "patient"]].assign(truth=images.label, prediction=np.array(model.classes)[predicted])
        table = table.assign(**{f"p_{name}": probabilities[:, i] for i, name in enumerate(model.classes)}, loss=losses)
        causes = suspicious_causes(table.assign(width=sizes[:, 0], height=sizes[:, 1]))
        ranked = table.assign(probability=probabilities[np.arange(len(table)), predicted])
        ranked = ranked.sort_values("loss", ascending=False, kind="stable", ignore_index=True)
        shown, selection, remarks = _select(ranked, top, label, only_errors, confident)
        table, errors = ranked.drop(columns="probability"), int((predicted != truth).sum())
        if len(shown):
            cells = list(track(make_cells(model, shown), "heat maps", len(shown)))
            high, wide = cells[0].cam.shape
            name = shorten(model.path.resolve().name, 40)
            notes = [
                f"{split} split: {len(table)} images, {errors} called wrongly. Model: {name}.",
                f"Left the image, right its Grad-CAM ({high} x {wide} cells) for the class called: red where most "
                "speaks for it, no colour where nothing does.",
            ]
            if high * wide == 1:
                remarks.append(f"The heat maps are empty: {model.size} pixels leave one cell for the whole image.")
            draw_sheet(cells, selection[0].upper() + selection[1:], notes, DISCLAIMER, folder / PICTURE)
        # a file name may hold bytes that are no text
        table.to_csv(folder / LOSSES, index=False, encoding="utf-8", errors="backslashreplace")
        facts = shown[["path", "truth", "prediction", "probability", "loss"]].head(WORST).to_dict("records")
        summary = {"format": FORMAT, "split": split, "images": len(table), "errors": errors, "selection": selection}
        summary |= {"worst": facts, "causes": causes}
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_report(model.path, output)
    head = _head(model, data, split, len(table), errors)
    return Interpreted(final, table, shown, head, selection, remarks, causes, interpretation)


def _losses(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """-log of the true class's probability (N,), of probabilities (N, classes)."""
    of_truth = probabilities[np.arange(len(truth)), truth].astype(np.float64)
    return -np.log(np.maximum(of_truth, np.finfo(np.float64).tiny))


def _sizes(paths: Iterable[str]) -> np.ndarray:
    """Widths and heights in pixels (N, 2), as the images are shown."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return np.array(list(pool.map(size_of, paths)))


def _select(
    table: pd.DataFrame, top: int, label: str | None, only_errors: bool, confident: bool
) -> tuple[pd.DataFrame, str, list[str]]:
    """The rows to draw, what they are in words, and what else is to be said."""
    found, kind = table, "image"
    if label is not None:
        found, kind = found[found.truth == label], f"{label} image"
    if only_errors:
        found, kind = found[found.truth != found.prediction], f"{kind} called wrongly"
    if confident:
        found, kind = found[found.truth == found.prediction], f"{kind} called rightly"
        found = found.sort_values("probability", ascending=False, kind="stable")
    shown = found.head(min(top, LIMIT)).reset_index(drop=True)
    if not len(shown):
        return shown, f"no {kind} in this split, so there is no picture", []
    many = kind if len(shown) == 1 else f"{len(shown)} {kind.replace('image', 'images', 1)}"
    order = "highest confidence" if confident else "largest loss"
    remarks = []
    if top > len(found):
        remarks.append(f"--top {top}: there are {len(found)}; all are shown.")
    elif top > LIMIT:
        remarks.append(f"--top {top}: the picture holds the first {LIMIT}; {LOSSES} has all images of the split.")
    return shown, f"the {many} with the {order}", remarks


def _head(model: Model, data: str | Path | None, split: str, images: int, errors: int) -> list[str]:
    """Which model, which data, how many are wrong."""
    where = model.settings["data"]["name"] if data is None else data
    threshold = model.threshold_of()
    rule = "" if threshold is None else f", at the threshold {threshold:.3f}"
    return [
        f"Model: {model.path}",
        f"       {model.settings['architecture']}, {model.size} pixels, "
        f"on {describe(model.learn.dls.device)}, precision {model.precision}",
        f"Data:  {where}",
        f"       {split} split, {images} images",
        f"Wrong: {errors} of {images}{rule}",
    ]


def _table(rows: pd.DataFrame) -> list[str]:
    """The images drawn, in lines of at most 80 characters."""
    lines = [f"{'#':>4}  {'loss':>6}  {'truth':<12}  {'called':<12}  {'prob.':>5}  file"] if len(rows) else []
    for i, row in enumerate(rows.itertuples(), start=1):
        names = [f"{shorten(name, 12):<12}" for name in (row.truth, row.prediction)]
        file = shorten(Path(row.path).name, 31)
        lines.append(f"{i:>4}  {row.loss:>6.3f}  {names[0]}  {names[1]}  {row.probability:>5.3f}  {file}")
    return lines


def _wrap(line: str) -> list[str]:
    """A line in parts of at most 80 characters; a path stays whole, so that it can be copied."""
    later = "" if line == DISCLAIMER else "  "
    return textwrap.wrap(line, 80, subsequent_indent=later, break_long_words=False, break_on_hyphens=False) or [""]
