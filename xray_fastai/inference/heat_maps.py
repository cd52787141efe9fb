"""Writes a picture of the heat maps of each predicted image into a folder."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.data.images import has_no_extension, open_image
from xray_fastai.inference.gradcam import describe, grad_cam, mapped_classes, overlay
from xray_fastai.inference.model import Model
from xray_fastai.inference.rows import ImageResult
from xray_fastai.inference.stream import Batch
from xray_fastai.system.errors import UserError
from xray_fastai.system.files import make_folder
from xray_fastai.system.parallel import map_in_threads
from xray_fastai.system.text import shorten, wrap

LEAST_WIDTH = 360
"""Pixels of a map: a smaller image has no room for words."""


def check_outside(paths: list[str], config: PredictConfig) -> None:
    """Check that the heat maps do not come among the images, where the next run would read them.

    Raises:
        UserError: the folder of the heat maps is one of the image folders, or in one that is searched recursively.
    """
    if config.heatmaps is None:
        return
    maps = Path(config.heatmaps).resolve()
    for path in filter(os.path.isdir, paths):
        folder = Path(path).resolve()
        if maps == folder or (config.recursive and folder in maps.parents):
            raise UserError(
                f"inside the images of {path}; give a folder outside of it", option="heatmaps", value=config.heatmaps
            )


class HeatMaps:
    """Writes pictures of heat maps into a folder, named as the images are; a number is added to a name that exists."""

    def __init__(self, folder: Path, model: Model):
        make_folder(folder, "heatmaps")
        self.folder, self.model = folder, model
        self.numbers: dict[str, int] = {}  # the last number of a name that exists more than once
        self.written_files: list[Path] = []  # of the current batch
        self.count = 0  # files of all batches before

    @contextmanager
    def written(self, batch: Batch, results: list[ImageResult]) -> Iterator[None]:
        """Write the pictures of a batch: the map of the class called (or withheld), and of the one to detect.

        If the block ends with an error or Ctrl-C, its rows are not kept, and all pictures of the batch are deleted.

        Raises:
            UserError: the disk is full, or the folder cannot be written to.
        """
        self.written_files.clear()
        try:
            self._write(batch, results)
            yield
            self.count += len(self.written_files)
        except BaseException:
            for path in self.written_files:
                with suppress(OSError):
                    path.unlink()
            raise

    def _write(self, batch: Batch, results: list[ImageResult]) -> None:
        predicted = [(source, r) for source, r in zip(batch.sources, results, strict=True) if r.label is not None]
        if len(predicted) < len(batch.images) or not predicted:  # an output is not a number: no maps either
            return
        model = self.model
        classes = [mapped_classes(model, model.classes.index(result.label)) for _, result in predicted]
        images = torch.repeat_interleave(batch.images, torch.tensor([len(of_image) for of_image in classes]), dim=0)
        cams = iter(grad_cam(model, images, targets=[k for of_image in classes for k in of_image]))
        with closing(map_in_threads(open_image, [source for source, _ in predicted])) as pictures:
            for picture, (_, result), of_image in zip(pictures, predicted, classes, strict=True):
                maps = {model.classes[k]: next(cams) for k in of_image}
                self._save(picture_of(picture, maps), _stem(result.path))

    def _save(self, picture: Image.Image, stem: str) -> None:
        for number in count(self.numbers.get(stem, 0) + 1):
            path = self.folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
            try:
                with path.open("xb") as stream:
                    self.written_files.append(path)
                    picture.save(stream, "PNG")
            except FileExistsError:
                self.numbers[stem] = number
                continue
            except OSError as error:
                raise UserError(
                    f"cannot be written ({error.strerror or error}); free space, or give another folder",
                    option="heatmaps",
                    value=path,
                ) from None
            return


def picture_of(image: Image.Image, maps: dict[str, np.ndarray]) -> Image.Image:
    """Draw the heat maps of an image beside each other, with their classes and what a map is below; "RGB".

    Args:
        image: of any size; it is enlarged to `LEAST_WIDTH`.
        maps: by class, the one that is called first: (h, w), from `grad_cam`.
    """
    scale = max(1.0, LEAST_WIDTH / image.width)
    image = image.resize((round(scale * image.width), round(scale * image.height)))
    width, height = image.size
    font = ImageFont.load_default(max(12, width // 32))
    line = int(1.5 * font.size)
    words = [f"for {shorten(name, 30)}, probability {cam.max():.3f}" for name, cam in maps.items()]
    words[0] += " (called)"
    about = wrap(describe(next(iter(maps.values()))), width=int(1.7 * width * len(maps) / font.size))
    sheet = Image.new("RGB", (width * len(maps), height + line * (1 + len(about))))
    pen = ImageDraw.Draw(sheet)
    for i, (cam, text) in enumerate(zip(maps.values(), words, strict=True)):
        sheet.paste(overlay(image, cam), (i * width, 0))
        pen.text((i * width + line // 4, height + line // 8), text, "white", font)
    for i, text in enumerate(about, 1):
        pen.text((line // 4, height + i * line + line // 8), text, "silver", font)
    return sheet


def _stem(path: str) -> str:
    """Return a file's name without its extension; the DICOM name 1.2.840 has no extension."""
    name = Path(path).name
    return name if has_no_extension(name) else Path(path).stem
