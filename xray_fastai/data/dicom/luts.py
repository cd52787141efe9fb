"""Read a look-up table (LUT) of a DICOM header: the modality LUT, the VOI LUT, or a colour of a palette.

A descriptor says how many entries a table has, which input the first entry is for, and how many bits an entry has
(PS3.3, C.11.1.1, C.11.2.1.1 and C.7.6.3.1.5). pydicom's functions trust it. They take 16-bit entries for bytes where
some are missing, read a first input of -1024 as 64512, and know neither 9 bits nor, in a modality LUT, 12.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xray_fastai.data.dicom.header import EMPTY
from xray_fastai.system.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset


@dataclass(frozen=True)
class Lut:
    """A look-up table.

    Args:
        first: the input of the first entry.
        entries: the outputs, 16 bits, unsigned. Smaller inputs than `first` have the first output, larger inputs than
            the table holds have the last one.
        bits: the outputs' range is 0 to 2**bits - 1.
    """

    first: int
    entries: np.ndarray
    bits: int

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Return the outputs for inputs of any shape, which are rounded first."""
        return self.entries[(np.rint(inputs) - self.first).clip(0, len(self.entries) - 1).astype(int)]


def read_lut(item: "Dataset", keyword: str, name: str, inputs: tuple[float, float], order: str) -> Lut:
    """Read one table.

    Args:
        item: holds the elements `<keyword>Descriptor` and `<keyword>Data`.
        keyword: "LUT", or for example "RedPaletteColorLookupTable".
        name: what a message calls the table.
        inputs: the least and the largest input that the header allows. If inputs may be negative, the descriptor's
            second value is read as signed (PS3.3, C.11.2.1.1), whatever type it has: many programs write the wrong one.
        order: the order of the bytes of a word in the file, "<" or ">".

    Raises:
        ImageError: an element is missing, or the number of entries is not the descriptor's.
    """
    for part in ("Descriptor", "Data"):
        if keyword + part not in item or item[keyword + part].value in EMPTY:
            raise ImageError(f"its {name} cannot be applied: {keyword}{part} is missing or empty")
    count, first, bits = read_descriptor(item, keyword, name, inputs)
    element = item[keyword + "Data"]
    if not isinstance(element.value, bytes):
        data = (np.atleast_1d(np.asarray(element.value, np.int64)) % 2**16).astype("<u2").tobytes()
    elif order == ">" and element.VR != "OB" and len(element.value) % 2 == 0:
        data = np.frombuffer(element.value, ">u2").astype("<u2").tobytes()
    else:
        data = element.value
    if len(data) == 2 * count:
        entries = np.frombuffer(data, "<u2")
    elif bits == 8 and len(data) in (count, count + count % 2):  # an even number of bytes
        entries = np.frombuffer(data, np.uint8, count).astype(np.uint16)
    else:
        found = len(data) if bits == 8 and len(data) < 2 * count else len(data) // 2
        raise ImageError(
            f"its {name} cannot be applied: {keyword}Data holds {found:,} entries, {keyword}Descriptor says {count:,}"
        )
    return Lut(first, entries, output_bits(entries, bits))


def read_descriptor(item: "Dataset", keyword: str, name: str, inputs: tuple[float, float]) -> tuple[int, int, int]:
    """Return the number of entries, the first input and the bits of an entry.

    Args and errors are those of `read_lut`.
    """
    values = np.ravel(item[keyword + "Descriptor"].value)
    if len(values) != 3 or not 8 <= int(values[2]) <= 16:
        raise ImageError(f"its {name} cannot be applied: {keyword}Descriptor does not say 8 to 16 bits an entry")
    count, first, bits = (int(value) for value in values)
    count = count % 2**16 or 2**16
    signed = (first + 2**15) % 2**16 - 2**15
    reaches_zero = first < 0 < first + count  # otherwise it is an unsigned value that was written as signed
    return count, signed if inputs[0] < 0 or reaches_zero else first % 2**16, bits


def output_bits(entries: np.ndarray, bits: int) -> int:
    """Return the bits of the range of the outputs, by the descriptor unless the entries show that it is wrong.

    By the standard the range is 0 to 2**bits - 1, whether or not the entries fill it (PS3.3, C.11.2.1.1). Some files
    have entries above it. Others declare 16 bits for entries of 12, which would leave 16 greys of 256. Their range ends
    with the bits that the largest entry needs, but not below 8, and only if that is at least two bits less.
    """
    needed = max(8, int(entries.max()).bit_length())
    return bits if needed in (bits, bits - 1) else needed
