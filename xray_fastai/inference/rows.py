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
from xray_fastai.system.errors import UserError

DIGITS = 7
"""Decimal places of a probability in a row, where the threshold is not near 0 or 1."""
AT_THRESHOLD = 6
"""Significant digits that a probability has, at least, where it equals the threshold."""
UNLIKE_DIGITS = 4
"""Decimal places of `unlike` in a row. Both are compared as they are written, so that a row explains itself."""
EXACT = 15
"""Decimal places to which a distance of two probabilities is exact."""


class Withheld(Enum):
    """Says why an image is not called."""

    UNLIKE = "unlike the training images"
    CLOSE = "within {:g} of the threshold"


@dataclass(frozen=True)
class ImageResult:
    """Holds what is known about one image after prediction; each column shows a part of it."""

    path: str  # the file, or `image N` for a picture without a file name
    threshold: float | None  # of the class to detect; None for more than two classes
    label: str | None = None  # the class, also where it is withheld; None if there is an error
    probabilities: dict[str, float] = field(default_factory=dict)  # by class; empty if there is an error
    unlike: float | None = None  # see `Gate.unlike`; None without a gate, or if there is an error
    withheld: Withheld | None = None  # why the image is not called; None where it is
    reason: str | None = None  # the same in words
    error: str | None = None  # why there is no prediction
    prevalence: float | None = None  # that the probabilities were moved to; None: as the export's are
    facts: dict[str, str | None] = field(default_factory=dict)  # by column, see `facts.Facts`

    @property
    def prediction(self) -> str | None:
        """A class, or `uncertain`; None if there is an error."""
        return self.label if self.withheld is None else UNCERTAIN


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


@dataclass(frozen=True)
class DecisionRule:
    """Decides on images: which class they have, and whether they are called at all.

    All decisions are made on the numbers that are written.
    """

    model: Model
    threshold: float | None  # see `ImageResult`
    calibrated: bool = True  # whether the probabilities are scaled as the export says
    limit: float | None = None  # an image whose `unlike` is above it is not called; None: all are
    abstain: float = 0.0  # an image is not called whose probability is within this distance of the threshold

    @classmethod
    def of(cls, model: Model, config: PredictConfig) -> "DecisionRule":
        """Return the rule of an export, changed as the options say.

        Raises:
            UserError: a threshold or a band around it was given for a model of more than two classes.
        """
        others = len(model.classes) != 2
        if config.threshold is not None and others:
            raise UserError(
                f"a model of {len(model.classes)} classes predicts the most probable one; leave it out",
                option="threshold",
                value=f"{config.threshold:g}",
            )
        if config.abstain and others:
            raise UserError(
                f"a model of {len(model.classes)} classes has no threshold; leave it out",
                option="abstain",
                value=f"{config.abstain:g}",
            )
        calibrated = not config.uncalibrated
        return cls(
            model,
            model.threshold_of(calibrated) if config.threshold is None else config.threshold,
            calibrated,
            model.gate.limit if config.gate and model.gate is not None else None,
            config.abstain,
        )

    @property
    def digits(self) -> int:
        """Decimal places of a probability: moved to a small prevalence, most of them are small."""
        model = self.model
        return digits_of(self.threshold) if model.prevalence is None else digits_of(self.threshold, model.threshold)

    def result(self, path: str, logits: np.ndarray, unlike: float | None = None) -> ImageResult:
        """Decide on an image.

        Args:
            path: of the image.
            logits: (classes,); if they are not finite, the result says so in `error`.
            unlike: see `Gate.unlike`; None without a gate.
        """
        if not np.isfinite(logits).all():
            return self.unreadable(path, "the network's output is not a number")
        model = self.model
        (probabilities,) = model.probabilities(logits[None], self.calibrated)  # (classes,)
        written = [round(float(p), self.digits) for p in probabilities]
        (index,) = model.decide(np.array([written]), self.threshold)
        by_class = dict(zip(model.classes, written, strict=True))
        unlike = None if unlike is None else round(unlike, UNLIKE_DIGITS)
        withheld = self.withheld(unlike, by_class.get(model.positive))
        return ImageResult(
            path,
            self.threshold,
            model.classes[int(index)],
            by_class,
            unlike,
            withheld,
            None if withheld is None else self.why(withheld),
            prevalence=model.prevalence,
        )

    def unreadable(self, path: str, fault: str) -> ImageResult:
        """Return the result for a file without a prediction."""
        return ImageResult(path, self.threshold, error=f"{path}: {fault}", prevalence=self.model.prevalence)

    def withheld(self, unlike: float | None, probability: float | None) -> Withheld | None:
        """Return why an image is not called; None if it is.

        Args:
            unlike: see `Gate.unlike`; None without a gate.
            probability: of the class to detect.
        """
        if self.limit is not None and unlike is not None and round(unlike, UNLIKE_DIGITS) > self.limit:
            return Withheld.UNLIKE
        if not self.abstain:
            return None
        distance = abs(round(probability, self.digits) - self.threshold)
        # |0.6 - 0.5| is 0.09999999999999998
        return Withheld.CLOSE if round(distance, EXACT) <= self.abstain else None

    def why(self, reason: Withheld) -> str:
        """Return the reason in words."""
        return reason.value.format(self.abstain)

    @property
    def reasons(self) -> str:
        """What is not called, in words; empty if all images are."""
        reasons = [] if self.limit is None else [f"{Withheld.UNLIKE.value} (column unlike above {self.limit:.4g})"]
        return ", or ".join([*reasons, *([self.why(Withheld.CLOSE)] if self.abstain else [])])

    def __str__(self) -> str:
        rule = "the most probable class is predicted"
        if self.threshold is not None:
            rule = f"{self.model.positive} from a probability of {self.threshold:.4g}"
        if self.model.prevalence is not None and self.threshold == self.model.threshold:
            rule += f", moved from {self.model.settings['threshold']:.4g}"
        return f"{', '.join(self.model.classes)}; {rule}"


class RowBuilder:
    """Turns batches of logits into rows: probabilities, and the decision.

    Raises:
        UserError: see `DecisionRule.of`.
    """

    def __init__(self, model: Model, config: PredictConfig):
        self.model, self.config, self.rule = model, config, DecisionRule.of(model, config)
        self.columns = columns_of(model.classes, model.prevalence is not None, fact_columns(config))

    def results(self, batch: Batch, first: int = 0, facts: Facts | None = None) -> list[ImageResult]:
        """Return what is known of each source of a batch.

        Args:
            batch: sources with their logits.
            first: the position of its first source among all.
            facts: through which the sources came; None leaves their columns empty.
        """
        unlike = iter([None] * len(batch.logits) if batch.unlike is None else batch.unlike.tolist())
        named = (
            (_name_of(source, n), logits, error) for n, (source, logits, error) in enumerate(batch.outputs(), first)
        )
        results = [
            self.rule.result(name, logits, next(unlike)) if error is None else self.rule.unreadable(name, error.message)
            for name, logits, error in named
        ]
        return results if facts is None else [replace(result, facts=facts.next()) for result in results]

    def row(self, result: ImageResult) -> Row:
        return {column.name: column.value(result) for column in self.columns}

    def rows(self, batch: Batch, first: int = 0, facts: Facts | None = None) -> list[Row]:
        """Return the rows of a batch; `first` and `facts` are as in `results`."""
        return [self.row(result) for result in self.results(batch, first, facts)]

    def withheld(self, row: Row) -> Withheld | None:
        """Return why the image of a row is not called; None if it is called, or cannot be read."""
        if row["error"] is not None:
            return None
        return self.rule.withheld(row["unlike"], row.get(probability_column(self.model.positive or "")))

    def __str__(self) -> str:
        described = self.model.describe_probabilities(self.rule.calibrated, self.config.tta)
        text = f"{'classes':<14}{self.rule}\n{'probabilities':<14}{described}"
        if self.rule.reasons:
            text += f"\n{UNCERTAIN:<14}{self.rule.reasons}"
        if self.model.settings["data"]["rehearsal"]:
            text += f"\n{'trained on':<14}synthetic X-rays: the model knows nothing of patients"
        return text


def _name_of(source: Source, position: int) -> str:
    """Return the path of a source, or `image N` for a source without one."""
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "")
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) and source else f"image {position}"
