"""Scale pictures of more than 8 bits to 8 bits by what is in them.

The type of a file says little about its range: detectors store 10, 12 or 14 bits in files of 16, and floats end at
1.000001. A rule that chose full scale by the largest value would jump: one pixel of 4096 among 12-bit values would
leave 16 greys of the picture.
"""

import numpy as np

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
