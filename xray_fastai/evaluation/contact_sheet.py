"""One picture of many X-rays, each beside its heat map: the original at its own aspect ratio, what is true, what the
model calls it, with which probability and loss."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image

from xray_fastai.data.images import open_image
from xray_fastai.inference.gradcam import grad_cam, overlay
from xray_fastai.inference.model import Model

DPI = 130
LIMIT = 100
"""Images in one picture; with more it would be neither opened nor looked through."""

BATCH = 32
THUMBNAIL = 1024  # longest side, in pixels, at which an image waits to be drawn
INK, PALE, WRONG, RIGHT = "#1c2733", "#5d6b78", "#b3201f", "#1d6b3a"


@dataclass(frozen=True)
class Cell:
    """An image and what is said of it."""

    image: Image.Image
    cam: np.ndarray  # (h, w)
    name: str
    truth: str
    prediction: str
    probability: float  # of the prediction
    loss: float


def make_cells(model: Model, rows: pd.DataFrame) -> Iterator[Cell]:
    """Images with their Grad-CAM for the class called.

    Args:
        model: an export.
        rows: path, truth, prediction, probability and loss of each image.

    Raises:
        ImageError: an image can't be read.
    """

    def thumbnail(path: str) -> Image.Image:
        image = open_image(path)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(rows), BATCH):
            batch = rows.iloc[start : start + BATCH]
            squares = list(pool.map(lambda path: np.array(open_image(path, model.size)), batch.path))
            targets = [model.classes.index(name) for name in batch.prediction]
            cams = grad_cam(model, torch.from_numpy(np.stack(squares))[:, None], targets)
            thumbnails = pool.map(thumbnail, batch.path)
            for image, cam, row in zip(thumbnails, cams, batch.itertuples(), strict=True):
                yield Cell(image, cam, Path(row.path).name, row.truth, row.prediction, row.probability, row.loss)


def draw_sheet(cells: list[Cell], title: str, notes: list[str], footer: str, path: Path) -> None:
    """Draw cells, row by row from the top left, as a PNG.

    The fewer they are the larger they get: one fills the width, a hundred stand five in a row, each image about
    230 pixels wide.

    Args:
        cells: at least one, at most `LIMIT`.
        title: one line.
        notes: two lines on what is seen.
        footer: one line.
        path: of the PNG.
    """
    columns, width = next(
        (columns, width)
        for most, columns, width in [(1, 1, 10.5), (4, 2, 14.0), (9, 3, 16.0), (16, 4, 18.0), (LIMIT, 5, 20.0)]
        if len(cells) <= most
    )
    margin, gap, point = 0.35, 0.32, 10 / 72  # inches
    pair = (width - 2 * margin - (columns - 1) * gap) / columns
    widest = (pair - 0.06) / 2
    aspects = [cell.image.width / cell.image.height for cell in cells]
    tallest = widest / min(1.6, max(0.8, float(np.quantile(aspects, 0.25))))
    sizes = [(min(widest, tallest * aspect), min(tallest, widest / aspect)) for aspect in aspects]
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    caption = 4.9 * point
    heights = [caption + max(sizes[i][1] for i in row) + gap for row in rows]
    header, foot = 1.15, 0.45
    height = header + sum(heights) + foot

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")

    def text(x: float, y: float, words: str, **style) -> None:
        """Write at inches from the top left."""
        style = {"fontsize": 9.5, "color": INK, **style}
        figure.text(x / width, 1 - y / height, words, va="top", parse_math=False, **style)

    def paste(image: Image.Image, x: float, y: float) -> None:
        bottom = round((height - y) * DPI) - image.height
        figure.figimage(np.asarray(image.convert("RGB")), round(x * DPI), bottom, origin="upper")

    fits = int((width - 2 * margin) / 0.122)
    text(margin, 0.22, shorten(title, fits), fontsize=14, weight="bold")
    for i, note in enumerate(notes):
        text(margin, 0.55 + 1.5 * i * point, note, color=PALE)
    top = header
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            cell, x = cells[i], margin + column * (pair + gap)
            wrong = cell.prediction != cell.truth
            words = int(pair / 0.088)  # characters of a line
            name = words - 26
            text(x, top, f"{i + 1}", weight="bold", color=PALE)
            verdict = f"{'✗' if wrong else '✓'} called {shorten(cell.prediction, name)} {cell.probability:.3f}"
            indent = 0.13 + 0.1 * len(str(i + 1))
            text(x + indent, top, verdict, weight="bold", color=WRONG if wrong else RIGHT)
            mute = "" if cell.cam.any() else ", map empty"
            text(x, top + 1.55 * point, f"is {shorten(cell.truth, name)}, loss {cell.loss:.3f}{mute}")
            text(x, top + 3.0 * point, shorten(cell.name, words), color=PALE)
            size = tuple(max(1, round(side * DPI)) for side in sizes[i])
            image = cell.image.resize(size, Image.Resampling.LANCZOS)
            paste(image, x, top + caption)
            paste(overlay(image, cell.cam), x + sizes[i][0] + 0.06, top + caption)
        top += row_height
    text(margin, height - foot + 0.08, footer, color=PALE)
    figure.savefig(path, dpi=DPI)


def shorten(name: str, length: int) -> str:
    """A name for one line: the middle of a long one is left out, since files are told apart by both ends."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    if len(name) <= length:
        return name
    head = (length - 1) // 2
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"
