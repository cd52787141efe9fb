"""Reading of DICOM files as 8-bit grey images."""
