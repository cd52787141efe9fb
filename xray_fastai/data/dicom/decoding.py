"""Decode the stored values of a DICOM image, whatever its transfer syntax."""

from typing import TYPE_CHECKING

import numpy as np

from xray_fastai.data.dicom.codestreams import TRUNCATED, check_jpeg, check_jpeg2000, check_rle
from xray_fastai.system.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

INSTALL = 'pip install "xray-fastai[dicom]"'


def decode(header: "Dataset") -> tuple[np.ndarray, str]:
    """Decode the stored values.

    Returns:
        An array (rows, columns) or (rows, columns, 3), and its photometric interpretation, one of `GREYS` or `COLOURS`.
    """
    from pydicom import uid
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder

    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax not in uid.UID_dictionary:
        raise ImageError("its file meta information names no known transfer syntax")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise ImageError(f"its transfer syntax is {syntax.name}, which is not supported") from None
    if not decoder.is_available:
        raise ImageError(f"its transfer syntax is {syntax.name}; to read it, {INSTALL}")
    shape = int(header.Rows), int(header.Columns), int(header.SamplesPerPixel)
    if decoder.is_native:
        halves = 2 if header.PhotometricInterpretation == "YBR_FULL_422" else 3
        expected = shape[0] * shape[1] * shape[2] * int(header.BitsAllocated) // 8 * halves // 3
        if len(header.PixelData) < expected:
            raise ImageError(f"{TRUNCATED} ({len(header.PixelData):,} bytes of {expected:,})")
    else:
        stream = get_frame(header.PixelData, 0, number_of_frames=1)
        check = check_rle if syntax == uid.RLELossless else check_jpeg
        (check_jpeg2000 if syntax in uid.JPEG2000TransferSyntaxes else check)(stream, shape)
    # Pillow reports a truncated JPEG; pylibjpeg-rle panics on some broken streams, which no `except Exception` catches
    plugin = {uid.JPEGBaseline8Bit: "pillow", uid.RLELossless: "pydicom"}.get(syntax, "")
    try:
        pixels, properties = decoder.as_array(header, index=0, decoding_plugin=plugin, number_of_frames=1)
    except Exception as error:  # decoders raise errors of any class for a broken stream
        kind = type(error).__name__
        raise ImageError(f"its pixel data are broken, or not {syntax.name} as its header says ({kind})") from None
    photometric = str(properties["photometric_interpretation"])
    if pixels.itemsize > 2 or (pixels.ndim == 3) != (photometric == "RGB"):
        raise ImageError(f"its pixel data are {photometric} of {8 * pixels.itemsize} bits, which is not supported")
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False), photometric
