"""Makes small DICOM files for the tests."""

import io
from pathlib import Path

import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from xray_fastai.data.images import open_image

SHIPPED = Path(pydicom.__file__).parent / "data" / "test_files"


def header_of(stored, *, kind="MONOCHROME2", bits=None, syntax=uid.ExplicitVRLittleEndian, **more):
    """A file of stored values (H, W) or (H, W, 3), uncompressed or, where pydicom has an encoder, compressed."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.826.0.1.3680043.9.7777.1"
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    stored = np.asarray(stored)
    allocated = 8 * stored.itemsize
    ds.Rows, ds.Columns = stored.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = stored.ndim * 2 - 3, kind
    if stored.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored = allocated, bits or allocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(stored.dtype.kind == "i")
    ds.PixelData = stored.tobytes()
    for keyword, value in more.items():
        setattr(ds, keyword, value)
    if syntax in (uid.RLELossless, uid.JPEG2000Lossless):
        ds.compress(syntax, encoding_plugin="pydicom" if syntax == uid.RLELossless else "pylibjpeg")
    else:
        ds.file_meta.TransferSyntaxUID = syntax
    return ds


def content_of(ds):
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, ds, enforce_file_format=True)
    return stream.getvalue()


def written(stored, **options):
    return content_of(header_of(stored, **options))


def grey(source, size=None):
    return np.asarray(open_image(source, size)).astype(int)


RAMP = np.tile(np.arange(64), (48, 1))  # (48, 64), dark on the left
DEPTHS = {8: np.uint8, 12: np.uint16, 16: np.uint16}


def picture(bits=12, seed=0):
    """Noise in which every stored value may be."""
    return np.random.default_rng(seed).integers(0, 2**bits, (40, 56)).astype(DEPTHS[bits])


def lut(entries, first, bits, data):
    item = Dataset()
    item.LUTDescriptor = [entries, first, bits]
    item.add_new("LUTData", "OW" if isinstance(data, bytes) else "US", data)
    return [item]
