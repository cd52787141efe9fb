"""Convert the stored values of a DICOM image to 8-bit grey or colour.

pydicom's functions convert stored values to what a screen shows (PS3.3, C.11.1, modality LUT; C.11.2, VOI LUT and
window; C.7.6.3.1.5, palette). Each works value by value. This module converts every value that the image can hold, at
most 65,536, and looks up the pixels in that table. An image of 7.5 million pixels takes 0.05 s, against 0.30 s for a
conversion of each pixel.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xray_fastai.data.depth import OUTER, limits
from xray_fastai.data.dicom.luts import read_descriptor, read_lut
from xray_fastai.system.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset


COLOURS = ("Red", "Green", "Blue")


@dataclass(frozen=True)
class Window:
    """Says which values of a grey image are shown between black and white, after the modality LUT (PS3.3, C.11.2.1.2).

    Another centre may be chosen from `low` to `high`, and another width up to their difference. They are the least and
    the greatest value of the image, or the ends of the file's own window where this reaches farther.
    """

    centre: float | None  # None, like the width: a VOI LUT shows the values
    width: float | None
    low: float
    high: float


def as_colour(pixels: np.ndarray, header: "Dataset") -> np.ndarray:
    """Return an 8-bit colour image (rows, columns, 3).

    Raises:
        ImageError: the stored values are signed, or the palette cannot be applied to them.
    """
    full = 2 ** int(header.BitsStored) - 1
    if pixels.ndim == 2:
        pixels, full = _coloured(pixels, header)
    if pixels.dtype.kind != "u":
        raise ImageError("its colours have signed values")
    return (
        pixels
        if pixels.dtype == np.uint8 and full == 255
        else np.rint(pixels.clip(0, full) * (255 / full)).astype(np.uint8)
    )


def _coloured(pixels: np.ndarray, header: "Dataset") -> tuple[np.ndarray, int]:
    """Apply the palette to an image (rows, columns).

    Returns:
        An image (rows, columns, 3), and the value of its full colours.
    """
    keywords = [f"{colour}PaletteColorLookupTable" for colour in COLOURS]
    if f"Segmented{keywords[0]}Data" in header and f"{keywords[0]}Data" not in header:
        from pydicom.pixels.processing import apply_color_lut

        for keyword in keywords:
            if f"{keyword}Descriptor" not in header:
                raise ImageError(f"its palette cannot be applied: {keyword}Descriptor is missing or empty")
            descriptor = [*read_descriptor(header, keyword, "palette", _stored_range(header))]
            header[f"{keyword}Descriptor"].value = descriptor
        try:
            coloured = apply_color_lut(pixels, header)[..., :3]
        except Exception:  # whatever the data lead to
            raise ImageError(
                f"its palette cannot be applied: Segmented{keywords[0]}Data or another is broken"
            ) from None
        return coloured, int(np.iinfo(coloured.dtype).max)
    luts = [read_lut(header, keyword, "palette", _stored_range(header), _order(header)) for keyword in keywords]
    return np.stack([lut(pixels) for lut in luts], axis=-1), 2 ** max(lut.bits for lut in luts) - 1


def as_grey(
    pixels: np.ndarray, header: "Dataset", chosen: tuple[float, float] | None = None
) -> tuple[np.ndarray, Window | None]:
    """Make an 8-bit grey image (rows, columns).

    Args:
        pixels: (rows, columns), the stored values.
        header: of the file.
        chosen: centre and width of a window that takes the place of the file's own, or of its VOI LUT.

    Returns:
        The image and its window; no window where all values are equal or padding.

    Raises:
        ImageError: the LUT, the slope or the window cannot be applied to the stored values, or `chosen` is outside.
    """
    low, high = int(pixels.min()), int(pixels.max())
    values, places = np.arange(low, high + 1), np.subtract(pixels, low, dtype=np.int32)
    counts = np.bincount(places.ravel(), minlength=len(values))
    padding = np.zeros(len(values), bool)
    if "PixelPaddingValue" in header:
        bits, signed = int(header.BitsAllocated), int(header.PixelRepresentation)
        ends = [header.PixelPaddingValue, header.get("PixelPaddingRangeLimit", header.PixelPaddingValue)]
        half = signed << (bits - 1)  # some programs write it unsigned for signed pixels, or the other way round
        first, last = sorted((int(end) + half) % 2**bits - half for end in ends)
        padding = (values >= first) & (values <= last)
    shades, window = _shades(values, np.where(padding, 0, counts), header, chosen)
    if header.PhotometricInterpretation == "MONOCHROME1":
        shades = 1 - shades
    # rounding to 6 places first makes halves exact, so that an image and its inverse are rounded alike
    table = np.rint(np.round(255 * shades, 6)).astype(np.uint8)
    table[padding] = 0
    return table[places], window


def _shades(
    values: np.ndarray, counts: np.ndarray, header: "Dataset", chosen: tuple[float, float] | None
) -> tuple[np.ndarray, Window | None]:
    """Map stored values (N,) to shades from black, 0, to white, 1. `counts` (N,) says how many pixels have each.

    Args and what else is returned are those of `as_grey`.
    """
    from pydicom.pixels.processing import apply_modality_lut, apply_windowing

    inputs = _stored_range(header)
    if header.get("ModalityLUTSequence"):
        lut = read_lut(header.ModalityLUTSequence[0], "LUT", "modality LUT", inputs, _order(header))
        x, inputs = lut(values), (0, 2**lut.bits - 1)
        for keyword in ("RescaleSlope", "RescaleIntercept"):  # pydicom's window would look at them
            header.pop(keyword, None)
    else:
        x = apply_modality_lut(values, header)
        first, last = apply_modality_lut(np.array(inputs), header)
        inputs = min(first, last), max(first, last)
    if not np.isfinite(x).all() or (len(x) > 1 and x.min() == x.max()):
        raise ImageError("its slope and intercept, or its modality LUT, cannot be applied to its values")
    ends = None  # black and white where the header does not say them
    if counts.any() and not header.get("VOILUTSequence") and not _has_window(header):
        ends = _limits(x, counts, int(header.BitsStored))
    window = _window(x[counts > 0], ends, header)
    if chosen is not None:
        window = _choose(window, chosen, header)
    with np.errstate(all="ignore"):
        if header.get("VOILUTSequence"):
            lut = read_lut(header.VOILUTSequence[0], "LUT", "VOI LUT", inputs, _order(header))
            x, black, white = lut(x), 0, 2**lut.bits - 1
        elif _has_window(header):
            *x, black, white = apply_windowing(np.append(x, [-np.inf, np.inf]), header)
        else:
            black, white = ends or (0, 0)
        if black == white:
            return np.full(len(values), 0.5), window
        shades = ((np.asarray(x, np.float64) - black) / (float(white) - black)).clip(0, 1)
    if np.isnan(shades).any():
        raise ImageError("its window cannot be applied to its values")
    return shades, window


def _window(x: np.ndarray, ends: tuple[float, float] | None, header: "Dataset") -> Window | None:
    """Return the window that the file asks for, or, without one, the one between `ends`; None if nothing varies.

    Args:
        x: (N,), the values of the image after the modality LUT, without padding.
        ends: black and white of a file without a window and a VOI LUT.
        header: of the file.
    """
    if not x.size:
        return None
    low, high = float(x.min()), float(x.max())
    if header.get("VOILUTSequence"):
        return Window(None, None, low, high) if low < high else None
    if ends is None:
        centre, width = _numbers(header)
    else:
        centre, width = float(ends[0] + ends[1]) / 2, float(ends[1] - ends[0])
    window = Window(centre, width, min(low, centre - width / 2), max(high, centre + width / 2))
    return window if window.low < window.high and np.isfinite([window.low, window.high]).all() else None


def _choose(window: Window | None, chosen: tuple[float, float], header: "Dataset") -> Window:
    """Put a window into the header, in place of the file's own and of its VOI LUT, and return it.

    The file's VOILUTFunction stays where it has a window; else black and white are the ends of the window.

    Raises:
        ImageError: it is outside of the file's values, or they are all equal.
    """
    if window is None:
        raise ImageError("its values are all equal, so it has no window to choose; leave it out")
    centre, width = (float(f"{number:.9g}") for number in chosen)  # an element has at most 16 characters
    if not (window.low <= centre <= window.high and 0 < width <= window.high - window.low):
        raise ImageError(
            f"no window of centre {centre:g} and width {width:g}: give a centre from {window.low:g} to "
            f"{window.high:g}, and a width above 0 and up to {window.high - window.low:g}"
        )
    if header.pop("VOILUTSequence", None) or not _has_window(header):
        header.VOILUTFunction = "LINEAR_EXACT"
    header.WindowCenter, header.WindowWidth = centre, width
    if not _has_window(header):
        raise ImageError(f"no window of width {width:g}: by its VOILUTFunction, LINEAR, the width is 1 or more")
    return Window(centre, width, window.low, window.high)


def _limits(x: np.ndarray, counts: np.ndarray, bits: int) -> tuple[float, float]:
    """Return black and white of an image without a window: as `depth.eight_bits` chooses them for other files.

    Args:
        x: (N,), the values after the modality LUT.
        counts: (N,), how many pixels have each; not all zero.
        bits: of the stored values; of 8 bits, the smallest and the largest are taken.
    """
    order = np.argsort(x, kind="stable")
    order = order[counts[order] > 0]
    x, below = x[order], np.cumsum(counts[order])
    low, high = x[np.searchsorted(below, [OUTER * below[-1], (1 - OUTER) * below[-1]])] if bits > 8 else x[[0, -1]]
    return limits(float(x[0]), float(low), float(high), float(x[-1]))


def _stored_range(header: "Dataset") -> tuple[int, int]:
    """Return the least and the largest value that a pixel may have."""
    bits, signed = int(header.BitsStored), int(header.PixelRepresentation)
    least = -signed << (bits - 1)
    return least, least + 2**bits - 1


def _order(header: "Dataset") -> str:
    return "<" if header.file_meta.TransferSyntaxUID.is_little_endian else ">"


def _has_window(header: "Dataset") -> bool:
    """Return whether there is a window of a width that the standard allows (PS3.3, C.11.2.1.2.1); many files have 0."""
    if "WindowCenter" not in header or "WindowWidth" not in header:
        return False
    centre, width = _numbers(header)
    min_width = 1 if header.get("VOILUTFunction", "LINEAR").upper() == "LINEAR" else 1e-9
    return bool(np.isfinite([centre, width]).all()) and width >= min_width


def _numbers(header: "Dataset") -> tuple[float, float]:
    """Return centre and width of the header's first window."""
    centre, width = (float(np.ravel(header[keyword].value)[0]) for keyword in ("WindowCenter", "WindowWidth"))
    return centre, width
