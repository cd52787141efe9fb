"""Makes rows of predictions: one row an image, in the columns of a model.

`columns_of` is the one list of the columns, each with its type and its value. The data frame of `predict`, the command
line's output file (`row_file`) and its `--resume` follow from it.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from operator import attrgetter

import numpy as np
from PIL import Image

from xray_fastai.config.class_names import UNCERTAIN
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.inference.facts import Facts, fact_columns
from xray_fastai.inference.model import Model
from xray_fastai.inference.row_file import Row
from xray_fastai.inference.stream import Batch, Source
from xray_fastai.system.errors import ImageError, UserError

DIGITS = 7
"""Decimal places of a probability in a row, where the threshold is not near 0 or 1."""
AT_THRESHOLD = 6
"""Significant digits that a probability has, at least, where it equals the threshold."""
UNLIKE_DIGITS = 4
"""Decimal places of `unlike` in a row. Both are compared as they are written, so that a row explains itself."""


class Withheld(Enum):
    """Says why an image is not called."""

    UNLIKE = "unlike the training images"
    CLOSE = "near the threshold"


@dataclass(frozen=True)
class ImageResult:
    """Holds what is known about one image after prediction; each column shows a part of it."""

    path: str  # the file, or `image N` for a picture without a file name
    threshold: float | None  # of the class to detect; None for more than two classes
    prediction: str | None = None  # a class, or `uncertain`; None if there is an error
    probabilities: dict[str, float] = field(default_factory=dict)  # by class; empty if there is an error
    unlike: float | None = None  # see `Gate.unlike`; None without a gate, or if there is an error
    error: str | None = None  # why there is no prediction
    prevalence: float | None = None  # that the probabilities were moved to; None: as the export's are
    facts: dict[str, str | None] = field(default_factory=dict)  # by column, see `facts.Facts`


@dataclass(frozen=True)
class Column:
    """Describes one column of the table."""

    name: str
    type: type  # str or float; a value may also be None
    value: Callable[[ImageResult], str | float | None]


def columns_of(classes: Sequence[str], at_prevalence: bool = False, facts: Sequence[str] = ()) -> list[Column]:
    """Return the columns for a model of these classes, in their order; a new column is added here alone.

    Args:
        classes: of the model.
        at_prevalence: whether the probabilities were moved to a prevalence, which then has a column.
        facts: names of further columns, see `facts.fact_columns`.
    """
    return [
        Column("path", str, attrgetter("path")),
        Column("prediction", str, attrgetter("prediction")),
        *(Column(probability_column(name), float, partial(_probability, name)) for name in classes),
        Column("threshold", float, attrgetter("threshold")),
        Column("unlike", float, attrgetter("unlike")),
        *([Column("prevalence", float, attrgetter("prevalence"))] if at_prevalence else []),
        Column("error", str, attrgetter("error")),
        *(Column(name, str, partial(_fact, name)) for name in facts),
    ]


def probability_column(label: str) -> str:
    """Return the name of the column that holds the probability of a class."""
    return f"p_{label}"


def _probability(label: str, result: ImageResult) -> float | None:
    return result.probabilities.get(label)


def _fact(name: str, result: ImageResult) -> str | None:
    return result.facts.get(name)


def digits_of(*thresholds: float | None) -> int:
    """Return the decimal places of a probability in a row, for the thresholds that it may be compared with.

    >>> digits_of(0.5), digits_of(3.2e-7), digits_of(0.5, 1 - 3.2e-7)
    (7, 12, 12)
    """
    nearest = [min(threshold, 1 - threshold) for threshold in thresholds if threshold is not None]
    return max([DIGITS, *(AT_THRESHOLD - 1 - math.floor(math.log10(value)) for value in nearest if value > 0)])


def written_digits(model: Model, threshold: float | None) -> int:
    """Return the decimal places of a model's probabilities: moved to a small prevalence, most of them are small."""
    return digits_of(threshold) if model.prevalence is None else digits_of(threshold, model.threshold)


def call(model: Model, path: str, logits: np.ndarray, threshold: float | None, calibrated: bool = True) -> ImageResult:
    """Decide on an image. The decision is made on the probability that is written.

    Args:
        model: the export.
        path: of the image.
        logits: (classes,), finite.
        threshold: see `ImageResult`.
        calibrated: whether the probabilities are scaled as the export says.
    """
    (probabilities,) = model.probabilities(logits[None], calibrated)  # (classes,)
    digits = written_digits(model, threshold)
    written = [round(float(p), digits) for p in probabilities]
    (index,) = model.decide(np.array([written]), threshold)
    by_class = dict(zip(model.classes, written, strict=True))
    return ImageResult(path, threshold, model.classes[int(index)], by_class, prevalence=model.prevalence)


class RowBuilder:
    """Turns batches of logits into rows: probabilities, and the decision at the threshold.

    Raises:
        UserError: a threshold or a band around it was given for a model of more than two classes.
    """

    def __init__(self, model: Model, config: PredictConfig):
        self.model, self.config = model, config
        self.columns = columns_of(model.classes, model.prevalence is not None, fact_columns(config))
        self.calibrated = not config.uncalibrated
        if config.threshold is not None and len(model.classes) != 2:
            raise UserError(
                f"a model of {len(model.classes)} classes predicts the most probable one; leave it out",
                option="threshold",
                value=f"{config.threshold:g}",
            )
        if config.abstain and len(model.classes) != 2:
            raise UserError(
                f"a model of {len(model.classes)} classes has no threshold; leave it out",
                option="abstain",
                value=f"{config.abstain:g}",
            )
        self.limit = model.gate.limit if config.gate and model.gate is not None else None
        self.threshold = model.threshold_of(self.calibrated) if config.threshold is None else config.threshold

    def rows(self, batch: Batch, first: int = 0, facts: Facts | None = None) -> list[Row]:
        """Return the rows of a batch.

        Args:
            batch: sources with their logits.
            first: the position of its first source among all.
            facts: through which the sources came; None leaves their columns empty.
        """
        unlike = iter([None] * len(batch.logits) if batch.unlike is None else batch.unlike.tolist())
        return [
            self._row(_name_of(source, number), logits, next(unlike) if error is None else None, error, facts)
            for number, (source, logits, error) in enumerate(batch.outputs(), first)
        ]

    def withheld(self, row: Row) -> Withheld | None:
        """Return why the image of a row is not called; None if it is called, or cannot be read."""
        if row["error"] is not None:
            return None
        if self.limit is not None and row["unlike"] is not None and row["unlike"] > self.limit:
            return Withheld.UNLIKE
        if self.config.abstain:
            distance = abs(row[probability_column(self.model.positive)] - self.threshold)
            return Withheld.CLOSE if round(distance, DIGITS) <= self.config.abstain else None
        return None

    def why(self, reason: Withheld) -> str:
        """Return the reason in words."""
        return f"within {self.config.abstain:g} of the threshold" if reason is Withheld.CLOSE else reason.value

    def _row(
        self,
        path: str,
        logits: np.ndarray | None,
        unlike: float | None,
        error: ImageError | None,
        facts: Facts | None,
    ) -> Row:
        if error is None and np.isfinite(logits).all():
            result = call(self.model, path, logits, self.threshold, self.calibrated)
            result = replace(result, unlike=None if unlike is None else round(unlike, UNLIKE_DIGITS))
        else:
            fault = "the network's output is not a number" if error is None else error.message
            result = ImageResult(path, self.threshold, error=f"{path}: {fault}", prevalence=self.model.prevalence)
        if facts is not None:
            result = replace(result, facts=facts.next())
        row = {column.name: column.value(result) for column in self.columns}
        return row if self.withheld(row) is None else row | {"prediction": UNCERTAIN}

    def __str__(self) -> str:
        rule = "the most probable class is predicted"
        if self.threshold is not None:
            rule = f"{self.model.positive} from a probability of {self.threshold:.4g}"
        if self.model.prevalence is not None and self.config.threshold is None:
            rule += f", moved from {self.model.settings['threshold']:.4g}"
        text = f"{'classes':<14}{', '.join(self.model.classes)}; {rule}"
        text += f"\n{'probabilities':<14}{self.model.describe_probabilities(self.calibrated, self.config.tta)}"
        reasons = [] if self.limit is None else [f"{Withheld.UNLIKE.value} (column unlike above {self.limit:.4g})"]
        reasons += [self.why(Withheld.CLOSE)] if self.config.abstain else []
        if reasons:
            text += f"\n{UNCERTAIN:<14}{', or '.join(reasons)}"
        if self.model.settings["data"]["rehearsal"]:
            text += f"\n{'trained on':<14}synthetic X-rays: the model knows nothing of patients"
        return text


def _name_of(source: Source, position: int) -> str:
    """Return the path of a source, or `image N` for a source without one."""
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "")
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) and source else f"image {position}"
