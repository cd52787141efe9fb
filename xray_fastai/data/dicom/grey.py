"""Stored values of a DICOM image become eight-bit grey or colour.

pydicom's functions go the way from stored values to what a screen shows (PS3.3, C.11.1, modality LUT; C.11.2, VOI LUT
and window; C.7.6.3.1.5, palette). Each works value by value. So the values that a picture can hold go through them, at
most 65,536, and the picture looks its own up: 0.05 s, where a picture of 7.5 million pixels by itself took 0.30 s.
"""

from typing import TYPE_CHECKING

import numpy as np

from xray_fastai.system.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset


def as_colour(pixels: np.ndarray, header: "Dataset") -> np.ndarray:
    """(rows, columns, 3), eight-bit."""
    full = 2 ** int(header.BitsStored) - 1
    if pixels.ndim == 2:
        from pydicom.pixels.processing import apply_color_lut

        pixels = apply_color_lut(pixels, header)[..., :3]
        full = np.iinfo(pixels.dtype).max
    if pixels.dtype.kind != "u":
        raise ImageError("colours below zero")
    return pixels if full == 255 else np.rint(pixels.clip(0, full) * (255 / full)).astype(np.uint8)


def as_grey(pixels: np.ndarray, header: "Dataset") -> np.ndarray:
    """(rows, columns), eight-bit: each stored value that there can be is looked up once, however large the picture."""
    low, high = int(pixels.min()), int(pixels.max())
    values, places = np.arange(low, high + 1), np.subtract(pixels, low, dtype=np.int32)
    present = np.zeros(len(values), bool)
    present[places] = True
    padding = np.zeros(len(values), bool)
    if "PixelPaddingValue" in header:
        bits, signed = int(header.BitsAllocated), int(header.PixelRepresentation)
        ends = [header.PixelPaddingValue, header.get("PixelPaddingRangeLimit", header.PixelPaddingValue)]
        half = signed << (bits - 1)  # some write it unsigned among signed pixels, or the other way round
        first, last = sorted((int(end) + half) % 2**bits - half for end in ends)
        padding = (values >= first) & (values <= last)
    shades = _shades(values, present & ~padding, header)
    if header.PhotometricInterpretation == "MONOCHROME1":
        shades = 1 - shades
    # to 6 places first: half a grey is to be half a grey for the inverse too, whatever the arithmetic leaves
    table = np.rint(np.round(255 * shades, 6)).astype(np.uint8)
    table[padding] = 0
    return table[places]


def _shades(values: np.ndarray, present: np.ndarray, header: "Dataset") -> np.ndarray:
    """Where stored values (N,) lie between black, 0, and white, 1; those `present` are in the picture."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi, apply_windowing

    for keyword in ("ModalityLUTSequence", "VOILUTSequence"):
        for item in header.get(keyword, [])[:1]:
            _widen(item)
    x = apply_modality_lut(values, header)
    if not np.isfinite(x).all() or (len(x) > 1 and x.min() == x.max()):
        raise ImageError("its slope and intercept, or its modality LUT, make no picture of its values")
    with np.errstate(all="ignore"):
        if header.get("VOILUTSequence"):
            entries, first, _ = header.VOILUTSequence[0].LUTDescriptor
            inputs = np.arange(first, first + (entries or 2**16))
            x = apply_voi(np.rint(x).clip(inputs[0], inputs[-1]).astype(int), header)
            table = apply_voi(inputs, header)
            black, white = int(table.min()), int(table.max())
        elif _has_window(header):
            *x, black, white = apply_windowing(np.append(x, [-np.inf, np.inf]), header)
        elif present.any():
            black, white = x[present].min(), x[present].max()
        else:
            black = white = 0
        if black == white:
            return np.full(len(values), 0.5)
        shades = ((np.asarray(x, np.float64) - black) / (float(white) - black)).clip(0, 1)
    if np.isnan(shades).any():
        raise ImageError("its window makes no picture of its values")
    return shades


def _widen(item: "Dataset") -> None:
    """A LUT of other than 16 bits as one of 16: with 8, pydicom's functions count no further than 255 inputs, and they
    know neither 9 nor, for the modality, 12."""
    entries, first, _ = item.LUTDescriptor
    item.LUTDescriptor = [entries, first, 16]
    data = item["LUTData"].value
    if isinstance(data, bytes) and len(data) < 2 * (entries or 2**16):  # two to a word
        item["LUTData"].VR = "US"
        item["LUTData"].value = [*data[: entries or 2**16]]


def _has_window(header: "Dataset") -> bool:
    """Whether there is a window of a width that the standard allows (PS3.3, C.11.2.1.2.1); many files have 0."""
    if "WindowCenter" not in header or "WindowWidth" not in header:
        return False
    centre, width = (float(np.ravel(header[keyword].value)[0]) for keyword in ("WindowCenter", "WindowWidth"))
    least = 1 if header.get("VOILUTFunction", "LINEAR").upper() == "LINEAR" else 1e-9
    return bool(np.isfinite([centre, width]).all()) and width >= least
