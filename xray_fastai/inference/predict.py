"""What a model says of new images: a row each, in a data frame, on the terminal, or in a file that grows as it goes.

Columns: `path`, `prediction`, `p_<CLASS>` for each class, `threshold` (of the class to detect; empty for more than two
classes, of which the most probable is called) and `error` (then there is no prediction).
"""

import os
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.row_file import Row
from xray_fastai.inference.stream import Batch, Source, check_folder, image_sources, predict_batches
from xray_fastai.inference.tta import Views
from xray_fastai.system.errors import UserError


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
    """Predict images; one that can't be read becomes a row with its error.

    Args:
        paths: one or many: files, folders, PIL images, or arrays as `images.open_image` takes them.
        model: an export's folder, or one that is open already; None takes the newest in ./exports.
        recursive: folders with what is below them.
        threshold: the probability of the class to detect from which an image is called that; None: the export's own.
        uncalibrated: probabilities without the temperature. The export's own threshold moves with them, so that it
            makes the same decisions.
        tta: test-time augmentation (`xray_fastai.inference.tta`): the mean over five views of each image.
        batch_size: images at once; what comes out is the same.
        device: auto, cpu, cuda or mps; a model that is open stays where it is.
        precision: auto, fp32 or bf16 (`inference.open_model`).

    Returns:
        A row an image, in the order of `paths`; the `path` of an image that has none is `image N`, from 0.

    Raises:
        UserError: no export, a damaged one, a folder without images, or a threshold that can't be.
    """
    picture = isinstance(paths, np.ndarray) and paths.ndim in (2, 3)
    paths = [paths] if picture or isinstance(paths, (str, bytes, os.PathLike, Image.Image)) else list(paths)
    check_folders(paths, recursive)
    model = model if isinstance(model, Model) else open_model(model, device, precision)
    rows = Rows(model, threshold, uncalibrated, tta)
    with closing(predict_batches(model, image_sources(paths, recursive), batch_size, rows.views)) as batches:
        return pd.DataFrame([row for batch in batches for row in rows(batch)], columns=rows.columns)


class Rows:
    "Batches become rows."

    def __init__(
        self,
        model: Model,
        threshold: float | None,  # None: the export's own
        uncalibrated: bool,
        tta: bool,
    ):
        self.model, self.calibrated = model, not uncalibrated
        self.views = Views() if tta else None
        if threshold is not None and len(model.classes) != 2:
            raise UserError(
                f"of {len(model.classes)} classes the most probable is called",
                option="threshold",
                value=f"{threshold:g}",
            )
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError("give a probability, from 0 to 1", option="threshold", value=f"{threshold:g}")
        self.threshold = model.threshold_of(self.calibrated) if threshold is None else float(threshold)
        self.columns = ["path", "prediction", *(f"p_{name}" for name in model.classes), "threshold", "error"]

    def __call__(self, batch: Batch, first: int = 0) -> list[Row]:
        "`first` is the position of the batch's first source among all."
        return [
            self._row(_name_of(source, number), logits, error)
            for number, (source, logits, error) in enumerate(batch.outputs(), first)
        ]

    def _row(self, name: str, logits: np.ndarray | None, error: str | None) -> Row:
        prediction, values = None, [None] * len(self.model.classes)
        if logits is not None and not np.isfinite(logits).all():
            error = f"{name}: the network's output is not a number"
        elif logits is not None:
            probabilities = self.model.probabilities(logits[None], self.calibrated)  # (1, classes)
            prediction = self.model.classes[int(self.model.decide(probabilities, self.threshold)[0])]
            values = [round(float(p), 7) for p in probabilities[0]]
        return dict(zip(self.columns, [name, prediction, *values, self.threshold, error], strict=True))

    def __str__(self) -> str:
        called = "the most probable is called"
        if self.threshold is not None:
            called = f"{self.model.positive} from a probability of {self.threshold:.4g}"
        text = f"{'classes':<14}{', '.join(self.model.classes)}; {called}"
        if self.model.settings["data"]["rehearsal"]:
            text += f"\n{'trained on':<14}X-rays that this program drew itself: it knows nothing of patients"
        return text


def _name_of(source: Source, number: int) -> str:
    """What a row calls its image: the path, or for what has none its position."""
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "")
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) and source else f"image {number}"


def check_folders(paths: list, recursive: bool, heatmaps: Path | None = None) -> None:
    for path in paths:
        if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
            check_folder(path, recursive)
            if heatmaps is not None:
                folder, maps = Path(path).resolve(), heatmaps.resolve()
                if maps == folder or (recursive and folder in maps.parents):
                    raise UserError(
                        f"among the images of {path}; give a folder outside of it", option="heatmaps", value=heatmaps
                    )
