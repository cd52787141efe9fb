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
ROUNDING = 0.01
"""Negative values down to this share of the largest are rounding errors of a filter (bicubic resizing overshoots)."""


def limits(values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Return the values that become black and white.

    These are the smallest and the largest value. But neither is farther from the central 98 % of the pixels than these
    are wide. So an outlier costs at most two thirds of the greys, whatever its value, and in a picture without outliers
    nothing is cut off. The result has no steps: it changes continuously with each value.

    Args:
        values: (N,), ascending.
        counts: (N,), how many pixels have each value; not all zero.
    """
    values, counts = values[counts > 0], counts[counts > 0]
    below = np.cumsum(counts)
    inner = np.searchsorted(below, [OUTER * below[-1], (1 - OUTER) * below[-1]])
    (low, high), first, last = values[inner].astype(float), float(values[0]), float(values[-1])
    if low == high:  # nearly all pixels have one value, such as a border's
        return first, last
    return max(first, 2 * low - high), min(last, 2 * high - low)


def eight_bits(array: np.ndarray) -> np.ndarray:
    """Scale an array of any shape to 8 bits; one of 8 bits stays as it is.

    Raises:
        ImageError: the values are negative, or not finite.
    """
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all() or low < -ROUNDING * max(high, 0):
        raise ImageError(f"values from {low:g} to {high:g}; give values from 0 up")
    black, white = limits(*_counted(array))
    if black == white:
        return np.zeros(array.shape, np.uint8)
    scaled = np.subtract(array, black, dtype=np.float64)
    scaled *= 255 / (white - black)
    return np.rint(scaled, out=scaled).clip(0, 255).astype(np.uint8)


def _counted(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values, ascending, and how many pixels have each (some: none)."""
    if array.dtype.kind in "iu" and int(array.max()) < 2**16:
        counts = np.bincount(array.ravel().clip(0, None).astype(np.int32))
        return np.arange(len(counts)), counts
    return np.unique(array, return_counts=True)
