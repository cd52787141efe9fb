"""DICOM files become 8-bit grey images."""
