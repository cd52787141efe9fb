"""Compares the rendering of DICOM files with dcmtk's: `python -m tests.data.compare_dcmtk [FILE ...]`.

Without files it makes small ones, one for each kind of header. dcmtk gets the option that fits: the first window, the
first VOI LUT, or the smallest and the largest value. `DIFFERENCES` were found with dcmtk 3.6.7. JPEG 2000 is not
compared: dcmtk cannot read it. Nor are presentation states (PS3.4, annex N), which are files of their own.
"""

import io
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset

from tests.data.dicom_files import RAMP, content_of, header_of, lut
from xray_fastai.data.images import open_image
from xray_fastai.system.errors import ImageError

PROGRAMS = ("dcmj2pnm", "dcml2pnm", "dcmcjpeg", "dcmcjpls")
STORED = (RAMP * 60 + np.random.default_rng(0).integers(60, size=RAMP.shape)).astype(np.uint16)
SIGNED = STORED.astype(np.int16) - 2048
CURVE = (((np.arange(4096) / 4095) ** 2) * 4095).round().astype(int)
WINDOW = {"WindowCenter": 2000, "WindowWidth": 3000}

DIFFERENCES = {
    "padding": "dcmtk takes the padding for the smallest value, so the rest has fewer greys. Ours is right: padding is "
    "no part of the image (PS3.3, C.7.5.1.1.2).",
    "VOI LUT of 12 bits that are said to be 16": "dcmtk keeps to C.11.2.1.1: 0 to 65,535. Ours departs from it on "
    "purpose, by the bits that the entries need: 15 greys would be left.",
    "VOI LUT of 16 bits that are said to be 12": "dcmtk cuts the upper bits off, which scrambles the picture. "
    "C.11.2.1.1 allows no such entries; ours shows them.",
    "VOI LUT that is too short": "dcmtk repeats the last entry. C.11.2.1.1 allows no such LUT; ours names the element.",
    "MONOCHROME1 and IDENTITY": "dcmtk follows PresentationLUTShape. C.8.11.3.1.2 forbids both; ours names them.",
    "MONOCHROME2 and INVERSE": "dcmtk follows PresentationLUTShape. C.8.11.3.1.2 forbids both; ours names them.",
    "functional groups": "dcmtk 3.6.7 does not find a window there. Ours is right: C.7.6.16.2.9 and C.7.6.16.2.10.",
}
"""The cases in which the two differ, and who is right."""


@dataclass(frozen=True)
class Compared:
    """What came of one file.

    Args:
        ours: the picture, or the reason why there is none.
        theirs: dcmtk's picture, or the last line that it printed.
    """

    ours: np.ndarray | str
    theirs: np.ndarray | str

    @property
    def agree(self) -> bool:
        """Whether both have the same greys (but for rounding), or both refuse the file."""
        if isinstance(self.ours, str) or isinstance(self.theirs, str):
            return isinstance(self.ours, str) and isinstance(self.theirs, str)
        return self.ours.shape == self.theirs.shape and int(np.abs(self.ours - self.theirs).max()) <= 1

    def __str__(self) -> str:
        if isinstance(self.ours, str) or isinstance(self.theirs, str):
            return "; ".join(
                f"{name}: {side if isinstance(side, str) else f'{len(np.unique(side))} greys'}"
                for name, side in (("ours", self.ours), ("dcmtk", self.theirs))
            )
        if self.ours.shape != self.theirs.shape:
            return f"shapes {self.ours.shape} and {self.theirs.shape}"
        greys = [len(np.unique(side)) for side in (self.ours, self.theirs)]
        correlation = np.corrcoef(self.ours.ravel(), self.theirs.ravel())[0, 1] if min(greys) > 1 else np.nan
        return (
            f"greys {greys[0]} and {greys[1]}, correlation {correlation:.3f}, "
            f"largest difference {np.abs(self.ours - self.theirs).max()}"
        )


def compare(path: Path) -> Compared:
    """Render a file here and by dcmtk."""
    try:
        ours: np.ndarray | str = np.asarray(open_image(path)).astype(int)
    except ImageError as error:
        ours = error.message
    header = pydicom.dcmread(path, stop_before_pixels=True)
    groups = [*header.get("SharedFunctionalGroupsSequence", []), *header.get("PerFrameFunctionalGroupsSequence", [])]
    if header.get("VOILUTSequence"):
        option = ["+Wl", "1"]
    elif "WindowCenter" in header or any("FrameVOILUTSequence" in group for group in groups):
        option = ["+Wi", "1"]
    else:
        option = ["+Wm"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "x.pgm"
        program = "dcml2pnm" if header.file_meta.TransferSyntaxUID in uid.JPEGLSTransferSyntaxes else "dcmj2pnm"
        ended = subprocess.run([program, "+op", *option, path, output], capture_output=True, text=True, check=False)
        if not output.exists():
            return Compared(ours, ended.stderr.strip().rpartition("\n")[2] or "no picture")
        return Compared(ours, np.asarray(Image.open(output).convert("L")).astype(int))


def cases() -> dict[str, Dataset]:
    """Return a header for each kind of file."""
    found = {}
    for bits, stored in ((8, (RAMP * 4).astype(np.uint8)), (12, STORED), (16, STORED * 16)):
        for kind in ("MONOCHROME1", "MONOCHROME2"):
            found[f"{bits} bits {kind}"] = header_of(stored, bits=bits, kind=kind)
    found["12 bits signed"] = header_of(SIGNED, bits=12)
    found["bits above those stored"] = header_of(STORED | 0xF000, bits=12)
    for name in ("LINEAR", "LINEAR_EXACT", "SIGMOID", "FOO"):
        found[f"window {name}"] = header_of(STORED, bits=12, VOILUTFunction=name, **WINDOW)
    for syntax in (uid.ImplicitVRLittleEndian, uid.RLELossless):
        found[f"window, {syntax.name}"] = header_of(STORED, bits=12, syntax=syntax, **WINDOW)
    rescale = {"RescaleSlope": -2, "RescaleIntercept": 100}
    found["rescale"] = header_of(SIGNED, bits=12, **rescale, WindowCenter=100, WindowWidth=4000)
    found["rescale without a window"] = header_of(SIGNED, bits=12, **rescale)
    found["window that begins outside"] = header_of(STORED, bits=12, WindowCenter=100, WindowWidth=3000)
    for bits, top in ((8, 255), (12, 4095), (16, 65535)):
        data = (CURVE * (top / 4095)).astype(int).tolist()
        found[f"VOI LUT of {bits} bits"] = header_of(STORED, bits=12, VOILUTSequence=lut(4096, 0, bits, data))
        found[f"modality LUT of {bits} bits"] = header_of(STORED, bits=12, ModalityLUTSequence=lut(4096, 0, bits, data))
    for name, bits, low, high in (
        ("that is not filled", 8, 31, 159),
        ("of 12 bits that are said to be 16", 16, 0, 4095),
        ("of 16 bits that are said to be 12", 12, 0, 65535),
    ):
        data = np.linspace(low, high, 4096).round().astype(int).tolist()
        found[f"VOI LUT {name}"] = header_of(STORED, bits=12, VOILUTSequence=lut(4096, 0, bits, data))
    for written_as, first in (("SS", -1024), ("US", 64512)):
        item = lut(4096, 0, 12, CURVE.tolist())
        item[0].add_new("LUTDescriptor", written_as, [4096, first, 12])
        found[f"VOI LUT from -1024 as {written_as}"] = header_of(
            STORED, bits=12, RescaleSlope=1, RescaleIntercept=-1024, VOILUTSequence=item
        )
    found["VOI LUT that is too short"] = header_of(
        STORED, bits=12, VOILUTSequence=lut(4096, 0, 12, CURVE[:-1].tolist())
    )
    padded = STORED.copy()
    padded[:10] = 0
    padded[10:] += 200
    found["padding"] = header_of(padded, bits=12, PixelPaddingValue=0)
    for kind, shape in (("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE"), ("MONOCHROME1", "INVERSE")):
        found[f"{kind} and {shape}"] = header_of(STORED, bits=12, kind=kind, PresentationLUTShape=shape)
    frame, values, window = Dataset(), Dataset(), Dataset()
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = -1, 4000, "US"
    window.WindowCenter, window.WindowWidth = 2000, 3000
    frame.PixelValueTransformationSequence, frame.FrameVOILUTSequence = [values], [window]
    found["functional groups"] = header_of(STORED, bits=12, NumberOfFrames=1, SharedFunctionalGroupsSequence=[frame])
    colours = {"kind": "PALETTE COLOR"}
    for bits in (8, 16):
        data = (np.arange(256)[::-1] * (1 if bits == 8 else 257)).astype(f"u{bits // 8}").tobytes()
        for colour in ("Red", "Green", "Blue"):
            colours[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
            colours[f"{colour}PaletteColorLookupTableData"] = data
        found[f"palette of {bits} bits"] = header_of((RAMP * 4).astype(np.uint8), **colours)
    return found


def compressed_cases() -> dict[str, Dataset]:
    """Return files whose pixels dcmtk compressed."""
    small = header_of((RAMP * 4).astype(np.uint8), **WINDOW | {"WindowCenter": 128, "WindowWidth": 256})
    overlay = header_of((STORED | (RAMP % 2 << 14)).astype(np.uint16), bits=12, **WINDOW)
    folded = header_of(SIGNED.view(np.uint16) & 0xFFF, bits=12, WindowCenter=0, WindowWidth=3000)
    folded.PixelRepresentation = 1  # without copies of the sign
    plain = header_of(STORED, bits=12, **WINDOW)
    return {
        "JPEG": _compressed(small, "dcmcjpeg", "+eb"),
        "JPEG, 12 bits": _compressed(plain, "dcmcjpeg", "+ee"),
        "JPEG lossless": _compressed(plain, "dcmcjpeg", "+e1"),
        "JPEG-LS": _compressed(plain, "dcmcjpls"),
        "JPEG-LS of unsigned values with overlays": _compressed(overlay, "dcmcjpls"),
        "JPEG-LS of signed values": _compressed(folded, "dcmcjpls"),
        "JPEG lossless of signed values": _compressed(folded, "dcmcjpeg", "+e1"),
    }


def _compressed(header: Dataset, program: str, *options: str) -> Dataset:
    with tempfile.TemporaryDirectory() as folder:
        plain, output = Path(folder) / "plain.dcm", Path(folder) / "compressed.dcm"
        plain.write_bytes(content_of(header))
        subprocess.run([program, *options, plain, output], capture_output=True, check=True)
        return pydicom.dcmread(io.BytesIO(output.read_bytes()))


def main(paths: list[str]) -> None:
    """Print a line for each file: `=` where the two agree."""
    for path in paths:
        result = compare(Path(path))
        print("=" if result.agree else "!", f"{path}: {result}")
    if paths:
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, header in (cases() | compressed_cases()).items():
            path = Path(folder) / "x.dcm"
            path.write_bytes(content_of(header))
            result = compare(path)
            print("=" if result.agree else "!", f"{name}: {result}", DIFFERENCES.get(name, ""))


if __name__ == "__main__":
    main(sys.argv[1:])
