"""Predicts images and returns a data frame with one row an image: the public function `predict`."""

import os
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.inference.facts import Facts
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.rows import RowBuilder
from xray_fastai.inference.stream import Source, check_folders, image_sources, predict_batches

if TYPE_CHECKING:
    from fastai.learner import Learner


def predict(
    paths: Source | Iterable[Source],
    model: "str | Path | Model | Learner | None" = None,
    *,
    recursive: bool = False,
    threshold: float | None = None,
    gate: bool = True,
    abstain: float = 0.0,
    uncalibrated: bool = False,
    prevalence: float | None = None,
    tta: bool = False,
    provenance: bool = False,
    identifiers: bool = False,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "auto",
) -> pd.DataFrame:
    """Predict images; one that cannot be read becomes a row with its error.

    Args:
        paths: one or many: files, folders, PIL images, or arrays as `images.open_image` takes them.
        model: an export's folder, an open model, or a learner that `load_learner` opened; None takes the newest in
            ./exports.
        recursive: search the subfolders of folders, too.
        threshold: the probability of the class to detect, as it stands in the table, from which an image is called
            positive; None takes the export's own.
        gate: predict `uncertain` for an image that is unlike the training images, if the export has a gate. The column
            `unlike` is the percentage of training images that are more like the others than the image is.
        abstain: predict `uncertain` where the probability of the class to detect, as it stands in the table (moved to
            `prevalence` if that is given), is within this distance of the threshold, from 0 to below 0.5; for two
            classes.
        uncalibrated: give the softmax of the network's outputs, without temperature and intercepts. The export's own
            threshold is moved accordingly, so that the decisions stay the same.
        prevalence: the share of the class to detect where the images come from. The probabilities are moved to it
            (`Model.at_prevalence`), and the export's own threshold with them, so that the decisions stay the same. The
            table then has it as a column.
        tta: test-time augmentation (`xray_fastai.inference.tta`): the mean over five views of each image. Temperature,
            intercepts and threshold were chosen on single views.
        provenance: add columns: the SHA-256 of the file; the export's name and the SHA-256 of its `model.json`; the
            options that change a row; the time (UTC).
        identifiers: add StudyInstanceUID, SOPInstanceUID and AccessionNumber of DICOM files. They are patient data.
        batch_size: changes the speed, not the result.
        device: auto, cpu, cuda or mps; an open model stays where it is.
        precision: auto, fp32 or bf16 (`inference.model.open_model`); an open model keeps its own.

    Returns:
        One row for each image, in the order of `paths`, with the columns of `columns_of`. A picture without a file name
        has the path `image N`, counted from 0.

    Raises:
        UserError: no export, a damaged one, a folder without images, or an option outside its limits.

    Examples:
        >>> table = predict(["image.jpeg", "nowhere.jpeg"], "exports/rehearsal")
        >>> list(table.columns)
        ['path', 'prediction', 'p_NORMAL', 'p_PNEUMONIA', 'threshold', 'unlike', 'error']
        >>> table.error[1]
        'nowhere.jpeg: no such file'
    """
    config = PredictConfig(
        recursive=bool(recursive), threshold=threshold, gate=bool(gate), abstain=abstain,
        uncalibrated=bool(uncalibrated), prevalence=prevalence, tta=bool(tta), batch_size=batch_size, device=device,
        precision=precision, provenance=bool(provenance), identifiers=bool(identifiers),
    )  # fmt: skip
    sources = _as_list(paths)
    check_folders(sources, config.recursive)
    opened = open_model(model, config.device, config.precision).at_prevalence(config.prevalence)
    builder = RowBuilder(opened, config)
    facts = Facts(opened, config)
    images = facts.noted(image_sources(sources, config.recursive))
    with closing(predict_batches(opened, images, config.batch_size, config.tta)) as batches:
        rows = [row for batch in batches for row in builder.rows(batch, facts=facts)]
    table = pd.DataFrame(rows, columns=[column.name for column in builder.columns])
    return table.astype({column.name: float for column in builder.columns if column.type is float})  # None: NaN


def _as_list(paths: Source | Iterable[Source]) -> list[Source]:
    """Return one image or many as a list, ~ in a path expanded. An array of two or three dimensions is one image."""
    is_array = isinstance(paths, np.ndarray) and paths.ndim in (2, 3)
    if is_array or isinstance(paths, (str, bytes, os.PathLike, Image.Image)):
        paths = [paths]
    return [os.path.expanduser(path) if isinstance(path, (str, os.PathLike)) else path for path in paths]
