"""Say which elements of a DICOM header are read, and check that they describe one X-ray."""

from typing import TYPE_CHECKING

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
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    *(f"{kind}PaletteColorLookupTableDescriptor" for kind in ("Red", "Green", "Blue")),
    *(f"{kind}PaletteColorLookupTableData" for kind in ("Red", "Green", "Blue")),
    *(f"Segmented{kind}PaletteColorLookupTableData" for kind in ("Red", "Green", "Blue")),
)  # fmt: skip
COLOURS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
GREYS = ("MONOCHROME1", "MONOCHROME2")


def check(header: "Dataset", max_pixels: int) -> None:
    """Check that the header describes one X-ray, before memory is allocated.

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
    rows, columns, samples = int(header.Rows), int(header.Columns), int(header.SamplesPerPixel)
    if rows < 1 or columns < 1 or rows * columns > max_pixels:
        raise ImageError(f"{columns} x {rows} pixels; no X-ray is like that")
    if (frames := int(header.get("NumberOfFrames", 1))) > 1:
        raise ImageError(f"{frames} frames; split it into one image a file")
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
