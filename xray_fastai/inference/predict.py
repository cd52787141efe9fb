"""Predicts images and returns a table with one row an image.

`columns_of` is the one list of the columns, each with its type and its value. The data frame, the command line's output
file (`row_file`) and its `--resume` follow from it.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from xray_fastai.config import PredictConfig
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.row_file import Row
from xray_fastai.inference.stream import Batch, Source, check_folders, image_sources, predict_batches
from xray_fastai.system.errors import ImageError, UserError

DIGITS = 7
"""Decimal places of a probability in a row."""


@dataclass(frozen=True)
class ImageResult:
    """Holds what is known about one image after prediction; each column shows a part of it."""

    path: str  # the file, or `image N` for a picture without a file name
    threshold: float | None  # of the class to detect; None for more than two classes
    prediction: str | None = None  # a class; None if there is an error
    probabilities: dict[str, float] = field(default_factory=dict)  # by class; empty if there is an error
    error: str | None = None  # why there is no prediction


@dataclass(frozen=True)
class Column:
    """Describes one column of the table."""

    name: str
    type: type  # str or float; a value may also be None
    value: Callable[[ImageResult], str | float | None]


def columns_of(classes: Sequence[str]) -> list[Column]:
    """Return the columns for a model of these classes, in their order; a new column is added here alone."""
    return [
        Column("path", str, attrgetter("path")),
        Column("prediction", str, attrgetter("prediction")),
        *(Column(probability_column(name), float, partial(_probability, name)) for name in classes),
        Column("threshold", float, attrgetter("threshold")),
        Column("error", str, attrgetter("error")),
    ]


def probability_column(label: str) -> str:
    """Return the name of the column that holds the probability of a class."""
    return f"p_{label}"


def _probability(label: str, result: ImageResult) -> float | None:
    return result.probabilities.get(label)


def predict(
    paths: Source | Iterable[Source],
    model: str | Path | Model | None = None,
    *,
    recursive: bool = False,
    threshold: float | None = None,
    uncalibrated: bool = False,
    tta: bool = False,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "auto",
) -> pd.DataFrame:
    """Predict images; one that cannot be read becomes a row with its error.

    Args:
        paths: one or many: files, folders, PIL images, or arrays as `images.open_image` takes them.
        model: an export's folder, or an open model; None takes the newest in ./exports.
        recursive: search the subfolders of folders, too.
        threshold: the probability of the class to detect from which an image is called positive; None takes the
            export's own.
        uncalibrated: give probabilities without temperature scaling. The export's own threshold is moved accordingly,
            so that the decisions stay the same.
        tta: test-time augmentation (`xray_fastai.inference.tta`): the mean over five views of each image.
        batch_size: changes the speed, not the result.
        device: auto, cpu, cuda or mps; an open model stays where it is.
        precision: auto, fp32 or bf16 (`inference.model.open_model`); an open model keeps its own.

    Returns:
        One row for each image, in the order of `paths`, with the columns of `columns_of`. A picture without a file name
        has the path `image N`, counted from 0.

    Raises:
        UserError: no export, a damaged one, a folder without images, or an option outside its limits.
    """
    config = PredictConfig(
        recursive=bool(recursive), threshold=threshold, uncalibrated=bool(uncalibrated), tta=bool(tta),
        batch_size=batch_size, device=device, precision=precision,
    )  # fmt: skip
    sources = _as_list(paths)
    check_folders(sources, config.recursive)
    model = model if isinstance(model, Model) else open_model(model, config.device, config.precision)
    builder = RowBuilder(model, config)
    images = image_sources(sources, config.recursive)
    with closing(predict_batches(model, images, config.batch_size, config.tta)) as batches:
        rows = [row for batch in batches for row in builder.rows(batch)]
    return pd.DataFrame(rows, columns=[column.name for column in builder.columns])


def _as_list(paths: Source | Iterable[Source]) -> list[Source]:
    """Return one image or many as a list. An array of two or three dimensions is one image."""
    is_array = isinstance(paths, np.ndarray) and paths.ndim in (2, 3)
    if is_array or isinstance(paths, (str, bytes, os.PathLike, Image.Image)):
        return [paths]
    return list(paths)


class RowBuilder:
    """Turns batches of logits into rows: probabilities, and the decision at the threshold.

    Raises:
        UserError: a threshold was given for a model of more than two classes.
    """

    def __init__(self, model: Model, config: PredictConfig):
        self.model, self.config = model, config
        self.columns = columns_of(model.classes)
        self.calibrated = not config.uncalibrated
        if config.threshold is not None and len(model.classes) != 2:
            raise UserError(
                f"a model of {len(model.classes)} classes predicts the most probable one; leave it out",
                option="threshold",
                value=f"{config.threshold:g}",
            )
        self.threshold = model.threshold_of(self.calibrated) if config.threshold is None else config.threshold

    def rows(self, batch: Batch, first: int = 0) -> list[Row]:
        """Return the rows of a batch; `first` is the position of its first source among all."""
        return [
            self._row(_name_of(source, number), logits, error)
            for number, (source, logits, error) in enumerate(batch.outputs(), first)
        ]

    def _row(self, path: str, logits: np.ndarray | None, error: ImageError | None) -> Row:
        result = ImageResult(path, self.threshold, error=None if error is None else str(error))
        if logits is not None and not np.isfinite(logits).all():
            result = ImageResult(path, self.threshold, error=f"{path}: the network's output is not a number")
        elif logits is not None:
            probabilities = self.model.probabilities(logits[None], self.calibrated)  # (1, classes)
            prediction = self.model.classes[int(self.model.decide(probabilities, self.threshold)[0])]
            by_class = {
                label: round(float(p), DIGITS) for label, p in zip(self.model.classes, probabilities[0], strict=True)
            }
            result = ImageResult(path, self.threshold, prediction, by_class)
        return {column.name: column.value(result) for column in self.columns}

    def __str__(self) -> str:
        rule = "the most probable class is predicted"
        if self.threshold is not None:
            rule = f"{self.model.positive} from a probability of {self.threshold:.4g}"
        text = f"{'classes':<14}{', '.join(self.model.classes)}; {rule}"
        if self.model.settings["data"]["rehearsal"]:
            text += f"\n{'trained on':<14}synthetic X-rays: the model knows nothing of patients"
        return text


def _name_of(source: Source, position: int) -> str:
    """Return the path of a source, or `image N` for a source without one."""
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "")
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) and source else f"image {position}"
