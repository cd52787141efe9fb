"""Draw X-rays in one picture, each in its own aspect ratio beside its heat maps, with its true and predicted class."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image

from xray_fastai.data.images import open_image
from xray_fastai.inference.gradcam import grad_cam, mapped_classes, overlay
from xray_fastai.inference.model import Model
from xray_fastai.system.parallel import map_in_threads
from xray_fastai.system.text import shorten

DPI = 130
LIMIT = 100
"""Images in one picture; nobody would look through a larger one."""

BATCH = 32
THUMBNAIL = 1024  # longest side, in pixels, of the images kept in memory until they are drawn
INK, PALE, WRONG, RIGHT = "#1c2733", "#5d6b78", "#b3201f", "#1d6b3a"


CAPTION = ("truth", "prediction", "probability", "loss", "uncertain")


@dataclass(frozen=True)
class Cell:
    """An image with its heat maps and its caption."""

    image: Image.Image
    maps: dict[str, np.ndarray]  # by class, the one that is called first: (h, w), from 0 to the class's probability
    name: str
    truth: str
    prediction: str
    probability: float  # of the prediction
    loss: float
    uncertain: bool  # whether `predict` would not call it


def make_cells(model: Model, rows: pd.DataFrame) -> Iterator[Cell]:
    """Compute the heat maps of images, each for `gradcam.mapped_classes`.

    Args:
        model: an export.
        rows: path, and what `CAPTION` lists, of each image.

    Raises:
        ImageError: an image cannot be read.
    """

    def thumbnail(path: str) -> Image.Image:
        image = open_image(path)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image

    for start in range(0, len(rows), BATCH):
        batch = rows.iloc[start : start + BATCH]
        squares = list(map_in_threads(lambda path: np.array(open_image(path, model.size)), batch.path))
        classes = [mapped_classes(model, model.classes.index(name)) for name in batch.prediction]
        images = torch.from_numpy(np.stack(squares))[:, None]
        repeated = torch.repeat_interleave(images, torch.tensor([len(of_image) for of_image in classes]), dim=0)
        cams = iter(grad_cam(model, repeated, [k for of_image in classes for k in of_image]))
        thumbnails = map_in_threads(thumbnail, batch.path)
        for image, of_image, row in zip(thumbnails, classes, batch.itertuples(), strict=True):
            maps = {model.classes[k]: next(cams) for k in of_image}
            yield Cell(image, maps, Path(row.path).name, *(getattr(row, name) for name in CAPTION))


def draw_sheet(cells: list[Cell], title: str, notes: list[str], footer: str, path: Path) -> None:
    """Draw cells as a PNG, row by row from the top left.

    Few cells are drawn large: one fills the width. A hundred are drawn five in a row, each image about 200 pixels wide.

    Args:
        cells: at least one, at most `LIMIT`.
        title: one line.
        notes: three lines that explain the picture.
        footer: one line.
        path: of the PNG.
    """
    columns, width = next(
        (columns, width)
        for max_cells, columns, width in [(1, 1, 10.5), (4, 2, 14.0), (9, 3, 16.0), (16, 4, 18.0), (LIMIT, 5, 20.0)]
        if len(cells) <= max_cells
    )
    margin, gap, seam, point = 0.35, 0.32, 0.06, 10 / 72  # inches
    panels = 1 + max(len(cell.maps) for cell in cells)
    width *= 0.6 + 0.2 * panels
    pair = (width - 2 * margin - (columns - 1) * gap) / columns
    max_width = (pair - (panels - 1) * seam) / panels
    aspects = [cell.image.width / cell.image.height for cell in cells]
    max_height = max_width / min(1.6, max(0.8, float(np.quantile(aspects, 0.25))))
    sizes = [(min(max_width, max_height * aspect), min(max_height, max_width / aspect)) for aspect in aspects]
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    caption = 6.4 * point
    heights = [caption + max(sizes[i][1] for i in row) + gap for row in rows]
    header, foot = 1.36, 0.45
    height = header + sum(heights) + foot

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")

    def text(x: float, y: float, line: str, **style) -> None:
        """Write at a position in inches from the top left."""
        style = {"fontsize": 9.5, "color": INK, **style}
        figure.text(x / width, 1 - y / height, line, va="top", parse_math=False, **style)

    def paste(image: Image.Image, x: float, y: float) -> None:
        bottom = round((height - y) * DPI) - image.height
        figure.figimage(np.asarray(image.convert("RGB")), round(x * DPI), bottom, origin="upper")

    max_title = int((width - 2 * margin) / 0.122)  # characters
    text(margin, 0.22, shorten(title, max_title), fontsize=14, weight="bold")
    for i, note in enumerate(notes):
        text(margin, 0.55 + 1.5 * i * point, note, color=PALE)
    top = header
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            cell, x = cells[i], margin + column * (pair + gap)
            wrong = cell.prediction != cell.truth
            max_line = int(pair / 0.088)  # characters
            max_name = max_line - 26
            text(x, top, f"{i + 1}", weight="bold", color=PALE)
            verdict = f"{'✗' if wrong else '✓'} predicted {shorten(cell.prediction, max_name)} {cell.probability:.3f}"
            indent = 0.13 + 0.1 * len(str(i + 1))
            text(x + indent, top, verdict, weight="bold", color=WRONG if wrong else RIGHT)
            text(
                x,
                top + 1.55 * point,
                f"true {shorten(cell.truth, max_name)}, loss {cell.loss:.3f}{', not called' if cell.uncertain else ''}",
            )
            text(x, top + 3.0 * point, shorten(cell.name, max_line), color=PALE)
            size = tuple(max(1, round(side * DPI)) for side in sizes[i])
            image = cell.image.resize(size, Image.Resampling.LANCZOS)
            paste(image, x, top + caption)
            for name, cam in cell.maps.items():
                x += sizes[i][0] + seam
                paste(overlay(image, cam), x, top + caption)
                title_of_map = f"for {shorten(name, max(8, int(sizes[i][0] / 0.088) - 10))} {cam.max():.3f}"
                text(x, top + 4.5 * point, title_of_map if cam.any() else f"{title_of_map}: empty", color=PALE)
        top += row_height
    text(margin, height - foot + 0.08, footer, color=PALE)
    figure.savefig(path, dpi=DPI)
