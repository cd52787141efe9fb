"""Read the lookup tables of a DICOM header: modality and VOI LUTs, and palettes.

A table has a descriptor and data (PS3.3, C.11.1.1, C.11.2.1.1 and C.7.6.3.1.5). The descriptor's first value is the
number of entries, where 0 means 65,536. The second is the first value that is mapped. The third is the number of bits
of an entry. pydicom's functions support at most 255 inputs for 8 bits, and neither 9 bits nor, in a modality LUT, 12
bits. They read a second value of another sign than the pixels wrongly.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from xray_fastai.system.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset


@dataclass(frozen=True)
class Lut:
    """Holds a lookup table."""

    entries: np.ndarray  # (N,), unsigned 16-bit
    first: int  # the value that the first entry belongs to
    bits: int  # of an entry

    def at(self, values: np.ndarray) -> np.ndarray:
        """Return the entries of values of any shape. Values before the first entry have that, later ones the last."""
        return self.entries[np.clip(np.asarray(values) - float(self.first), 0, len(self.entries) - 1).astype(np.int32)]

    def met_by(self, values: np.ndarray) -> "Lut":
        """Return the table with the other reading of `first`, signed or unsigned, if only that one meets any value.

        Some programs write it with the sign of the pixels, others with that of the values that the LUT takes.
        """
        other = replace(self, first=self.first + 2**16 if self.first < 0 else self.first - 2**16)
        return other if other._meets(values) and not self._meets(values) else self

    def _meets(self, values: np.ndarray) -> bool:
        return bool(((values >= self.first) & (values < self.first + len(self.entries))).any())


def read_lut(item: "Dataset", prefix: str = "LUT", *, signed: bool) -> Lut:
    """Read a table.

    Args:
        item: the dataset that has it.
        prefix: the start of the keywords of its descriptor and data.
        signed: whether the values that it takes may be negative. The standard then says that the descriptor's second
            value is signed, whatever its VR is in the file.

    Raises:
        ImageError: an element is missing, or the data do not have as many entries as the descriptor says.
    """
    for keyword in (f"{prefix}Descriptor", f"{prefix}Data"):
        if keyword not in item or item[keyword].value in (None, b"", []):
            raise ImageError(f"its {keyword} is missing or empty")
    descriptor = np.ravel(item[f"{prefix}Descriptor"].value)
    if len(descriptor) != 3:
        raise ImageError(f"its {prefix}Descriptor has not three values")
    number, first, bits = (int(value) % 2**16 for value in descriptor)
    number = number or 2**16
    if not 1 <= bits <= 16:
        raise ImageError(f"its {prefix}Descriptor says {bits} bits; it must be 16 or less")
    words = _words(item, f"{prefix}Data")
    if len(words) == number:
        entries = words
    elif bits <= 8 and len(words) == (number + 1) // 2:  # two entries of 8 bits in a word
        entries = words.view(np.uint8)[:number].astype(np.uint16)
    else:
        raise ImageError(f"its {prefix}Data has {len(words):,} entries, its {prefix}Descriptor says {number:,}")
    if signed and first >= 2**15:
        first -= 2**16
    return Lut(entries, first, max(bits, int(entries.max()).bit_length()))


def _words(item: "Dataset", keyword: str) -> np.ndarray:
    """Return the data of a table as 16-bit words (N,), little-endian."""
    data = item[keyword].value
    if isinstance(data, bytes):
        order = ">" if item.original_encoding[1] is False else "<"
        return np.frombuffer(data + bytes(len(data) % 2), f"{order}u2").astype("<u2")
    return np.ravel(data).astype("<u2")
