"""Scale pictures of more than 8 bits to 8 bits by what is in them.

The type of a file says little about its range: detectors store 10, 12 or 14 bits in files of 16, and floats end at
1.000001. A rule that chose full scale by the largest value would jump: one pixel of 4096 among 12-bit values would
leave 16 greys of the picture.
"""

import io
import sys
from typing import Any

import numpy as np
from PIL import Image

from xray_fastai.system.errors import ImageError

FLAT = 4.0
"""An image with less contrast than this (standard deviation of grey values, 0 to 255) is blank; its hash is noise."""
OUTER = 0.01
"""The share of pixels at each end that may not stretch the range without bound: hot pixels, markers, burned-in text."""
MARGIN = 0.5
"""How far black and white may be from the central pixels, in widths of their range. Of 120 real X-rays none lost a grey
value by it; by 0.25, 6 % of them did. An outlier, whatever its value, costs at most a third of the greys."""
ROUNDING = 0.01
"""Negative values down to this share of the largest are rounding errors of a filter (bicubic resizing overshoots)."""

SWAPPED = {";16L": ";16B", ";16B": ";16L", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
"""The other order of the bytes of a 16-bit value, by the end of Pillow's raw mode (N: the computer's own)."""


def limits(smallest: float, low: float, high: float, largest: float) -> tuple[float, float]:
    """Return the values that become black and white: the smallest and the largest one, without outliers.

    The result has no steps: it changes continuously with each value.

    Args:
        smallest: the smallest value of a picture.
        low: the value that a share of `OUTER` of the pixels is below.
        high: the value that a share of `OUTER` of the pixels is above.
        largest: the largest value.
    """
    if low == high:  # nearly all pixels have one value, such as a border's
        return smallest, largest
    margin = MARGIN * (high - low)
    return max(smallest, low - margin), min(largest, high + margin)


def eight_bits(array: np.ndarray) -> np.ndarray:
    """Scale an array of any shape to 8 bits; one of 8 bits stays as it is.

    Raises:
        ImageError: the values are negative, or not finite.
    """
    if array.dtype == np.uint8:
        return array
    outer = int(OUTER * (array.size - 1))
    places = [0, outer, array.size - 1 - outer, array.size - 1]
    smallest, low, high, largest = map(float, np.partition(array, places, axis=None)[places])
    if not np.isfinite([smallest, largest]).all() or smallest < -ROUNDING * max(largest, 0):
        raise ImageError(f"values from {smallest:g} to {largest:g}; give values from 0 up")
    black, white = limits(smallest, low, high, largest)
    if black == white:
        return np.zeros(array.shape, np.uint8)
    scaled = np.subtract(array, black, dtype=np.float32 if array.itemsize <= 2 else np.float64)
    scaled *= 255 / (white - black)
    return np.rint(scaled, out=scaled).clip(0, 255, out=scaled).astype(np.uint8)


def has_deep_colours(image: Image.Image) -> bool:
    """Return whether a PNG or TIFF that is not decoded yet has 16 bits a colour, and no transparency."""
    tiles = getattr(image, "tile", None)
    return (
        bool(tiles) and image.mode == "RGB" and "transparency" not in image.info and _raw_mode(tiles[0])[-4:] in SWAPPED
    )


def grey_of_colours(image: Image.Image) -> np.ndarray | None:
    """Return the grey values (H, W), 0 to 65535, of an image that `has_deep_colours`; None for another.

    Pillow keeps the upper byte of each colour. In the other order of bytes it takes the lower one for the upper.
    """
    stream: Any = getattr(image, "fp", None)
    if stream is None or not has_deep_colours(image):
        return None
    position = stream.tell()
    stream.seek(0)
    content = stream.read()
    stream.seek(position)
    upper, lower = (_one_byte(content, image, swapped) for swapped in (False, True))
    return 256 * upper + lower


def _one_byte(content: bytes, image: Image.Image, swapped: bool) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=[str(image.format)]) as half:
        half.seek(image.tell())
        if swapped:
            half.tile = [_in_other_order(tile) for tile in half.tile]
        return np.asarray(half.convert("F"))  # weighted as for mode "L", and not rounded


def _raw_mode(tile: Any) -> str:
    return tile.args if isinstance(tile.args, str) else str(tile.args[0])


def _in_other_order(tile: Any) -> Any:
    raw = _raw_mode(tile)
    raw = raw[:-4] + SWAPPED[raw[-4:]]
    return type(tile)(*tile[:3], raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
