"""fastai transforms that open an image and equalize its histogram."""

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

    def show(self, ctx=None, **kwargs):
        return super().show(ctx=ctx, **{"cmap": "gray"} | kwargs)


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
        "Leave out the cache: an export is opened on other machines."
        return self.__dict__ | {"cache": None}

    def encodes(self, source):
        if self.cache is None or not isinstance(source, str):
            return XrayImage(open_image(source, self.size))
        return XrayImage(Image.fromarray(open_cached(self.cache, source)))


def open_cached(cache: PixelCache, path: str) -> np.ndarray:
    """Return a file's image (size, size) from the cache; where it is missing or damaged there, decode and store it.

    Raises:
        ImageError: see `open_image`.
    """
    pixels = cache.get(path)
    if pixels is None:
        pixels = np.array(open_image(path, cache.size))
        cache.put(path, pixels)
    return pixels
