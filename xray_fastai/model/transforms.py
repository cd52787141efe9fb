"""fastai transforms that open an image and equalize its histogram."""

from multiprocessing.context import get_spawning_popen
from pathlib import Path

import numpy as np
import torch
from fastai.vision.all import IntToFloatTensor, PILImageBW, TensorImage, Transform
from PIL import Image

from xray_fastai.data.images import open_image
from xray_fastai.data.pixel_cache import PixelCache
from xray_fastai.model.preprocessing import equalize


class XrayImage(PILImageBW):
    "An 8-bit, one-channel X-ray; black is shown as black."

    _show_args = {"cmap": "gray"}  # noqa: RUF012


class Equalize(Transform):
    "Applies `equalize` to a batch before it becomes floats."

    order = IntToFloatTensor.order - 1

    def encodes(self, x: TensorImage):
        return equalize(x.as_subclass(torch.Tensor))


class OpenXray(Transform):
    "Opens what `images.open_image` takes as an `XrayImage`; `input_types` are what `learn.predict` may be given."

    input_types = (str, Path, bytes, Image.Image, np.ndarray, torch.Tensor)

    def __init__(
        self,
        size: int,  # side in pixels of the square that each image is resized to
        cache: PixelCache | None = None,  # decoded images
    ):
        self.size, self.cache = size, cache

    def __getstate__(self):
        "Keep the cache in a loading process, and leave it out of an export, which is opened on other machines."
        spawning = get_spawning_popen() is not None
        return self.__dict__ | {"cache": self.cache if spawning else None}

    def encodes(self, source):
        if self.cache is None or not isinstance(source, str):
            return XrayImage(open_image(source, self.size))
        pixels = self.cache.get(source)  # (size, size)
        if pixels is None:
            pixels = np.array(open_image(source, self.size))
            self.cache.put(source, pixels)
        return XrayImage(Image.fromarray(pixels))
