"""Say which elements of a DICOM header are read, and check that they describe one X-ray.

Some elements are made what every other reader takes them for, if the standard leaves no doubt about it.
"""

import re
from typing import TYPE_CHECKING

import numpy as np

from xray_fastai.system.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

NEEDED = (
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "PixelRepresentation",
)  # fmt: skip
OPTIONAL = (
    "NumberOfFrames", "HighBit", "PlanarConfiguration", "PixelPaddingValue", "PixelPaddingRangeLimit", "PixelData",
    "FloatPixelData", "DoubleFloatPixelData",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    *(f"{kind}PaletteColorLookupTableDescriptor" for kind in ("Red", "Green", "Blue")),
    *(f"{kind}PaletteColorLookupTableData" for kind in ("Red", "Green", "Blue")),
    *(f"Segmented{kind}PaletteColorLookupTableData" for kind in ("Red", "Green", "Blue")),
)  # fmt: skip
NUMBERS = (
    *(keyword for keyword in NEEDED if keyword != "PhotometricInterpretation"),
    "NumberOfFrames", "HighBit", "PlanarConfiguration", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth",
)  # fmt: skip
WINDOWS = ("WindowCenter", "WindowWidth")
DECIMALS = ("RescaleSlope", "RescaleIntercept", *WINDOWS)
"""`WINDOWS` may have several values, of which the first ones count."""
GROUPS = {
    "PixelValueTransformationSequence": ("ModalityLUTSequence", DECIMALS[:2]),
    "FrameVOILUTSequence": ("VOILUTSequence", (*WINDOWS, "VOILUTFunction")),
}
"""The functional groups that say how the values of an enhanced object are shown (PS3.3, C.7.6.16.2.9 and .10), what
they replace, and what they hold."""
EMPTY = (None, b"", "")
"""Values that mean the same as no element."""
FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
COMMA = re.compile(r"(\d),(\d{1,2}|\d{4,})(?!\d)")
COLOURS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
GREYS = ("MONOCHROME1", "MONOCHROME2")


def apply_groups(header: "Dataset") -> None:
    """Copy into the header what the functional groups say of its one frame: those of all frames, then those of each."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group, (replaced, keywords) in GROUPS.items():
            for frame in header.get(groups, [])[:1]:
                for item in frame.get(group, [])[:1]:
                    raw = {keyword: item.get_item(keyword) for keyword in keywords if keyword in item}
                    given = {keyword: element for keyword, element in raw.items() if element.value not in EMPTY}
                    if given and replaced in header:
                        del header[replaced]
                    for keyword, element in given.items():
                        header[keyword] = element


def check_numbers(header: "Dataset") -> None:
    """Check that the elements that have to be numbers are, and write a decimal comma as a point.

    A comma before three digits may separate thousands.

    Raises:
        ImageError: an element is no number, or has several values. The message does not quote them.
    """
    from pydicom import DataElement

    for keyword in NUMBERS:
        if keyword not in header:
            continue
        try:
            raw = header.get_item(keyword)
            if keyword in DECIMALS and isinstance(raw.value, bytes) and b"," in raw.value:
                text = COMMA.sub(r"\1.\2", raw.value.decode("latin-1"))
                header[keyword] = DataElement(raw.tag, "DS", text.rstrip("\0 "))
            values = np.ravel(header[keyword].value)
            float(values[0])
        except Exception:  # pydicom's converters raise errors of any class
            raise ImageError(f"its {keyword} is not a number") from None
        if len(values) > 1 and keyword not in WINDOWS:
            raise ImageError(f"its {keyword} has {len(values)} values; it must have one")


def check(header: "Dataset", max_pixels: int) -> str | None:
    """Check that the header describes one X-ray, before memory is allocated.

    Returns:
        What was read in another way than the header says, or None.

    Raises:
        ImageError: it does not.
    """
    for keyword in ("FloatPixelData", "DoubleFloatPixelData"):
        if keyword in header:
            raise ImageError(f"its pixels are floating-point numbers ({keyword}); an X-ray has PixelData, integers")
    if "PixelData" not in header:
        raise ImageError("a DICOM file without an image, or truncated: it has no PixelData")
    if missing := [keyword for keyword in NEEDED if keyword not in header]:
        raise ImageError(f"its header lacks {', '.join(missing)}")
    check_numbers(header)
    note = _set_window_function(header)
    rows, columns, samples = int(header.Rows), int(header.Columns), int(header.SamplesPerPixel)
    if rows < 1 or columns < 1 or rows * columns > max_pixels:
        raise ImageError(f"{columns} x {rows} pixels; no X-ray is like that")
    if (frames := int(header.get("NumberOfFrames", 1))) > 1:
        raise ImageError(f"{frames} frames; split it into one image a file")
    shape, inverted = header.get("PresentationLUTShape"), header.PhotometricInterpretation == "MONOCHROME1"
    if header.PhotometricInterpretation in GREYS and shape == ("IDENTITY" if inverted else "INVERSE"):
        raise ImageError(
            f"PhotometricInterpretation {header.PhotometricInterpretation} and PresentationLUTShape {shape} contradict "
            "each other (PS3.3, C.8.11.3.1.2): one says that small values are white; correct one of them"
        )
    allocated, stored = int(header.BitsAllocated), int(header.BitsStored)
    if allocated not in (8, 16) or not 1 <= stored <= allocated:
        raise ImageError(f"{stored} bits of {allocated} a pixel; an X-ray has 8 or 16")
    if int(header.get("HighBit", stored - 1)) != stored - 1:
        raise ImageError(f"HighBit {int(header.HighBit)} for {stored} bits a pixel; it must be {stored - 1}")
    if samples > 1 and "PlanarConfiguration" not in header:
        header.PlanarConfiguration = 0  # as every other reader does
    if samples > 1 and int(header.PlanarConfiguration) not in (0, 1):
        raise ImageError(f"PlanarConfiguration {int(header.PlanarConfiguration)}; it must be 0 or 1")
    palette = header.PhotometricInterpretation == "PALETTE COLOR"
    allowed = GREYS if samples == 1 and not palette else COLOURS
    if header.PhotometricInterpretation not in allowed or samples not in (1, 3):
        raise ImageError(f"{samples} samples a pixel, neither grey nor colours (PhotometricInterpretation)")
    return note


def _set_window_function(header: "Dataset") -> str | None:
    """Make the window's function one of the standard: LINEAR, its default (PS3.3, C.11.2.1.3), instead of others.

    Where there are several windows, some files have a function for each.

    Returns:
        What to tell of it, or None.
    """
    if "VOILUTFunction" not in header:
        return None
    name = str(np.ravel(header.VOILUTFunction)[0]).strip().upper()
    header.VOILUTFunction = name if name in FUNCTIONS else "LINEAR"
    return None if name in FUNCTIONS else "its VOILUTFunction is not of the standard; read as LINEAR"
