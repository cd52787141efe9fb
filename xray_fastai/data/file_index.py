"""Find the image file that a table means by a path, a file's name, a name without its extension, or a folder's name.

DICOM files are also found by an identifier in their headers.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from xray_fastai.data.dicom.reader import identifiers_of
from xray_fastai.data.file_lists import named
from xray_fastai.data.images import EXTENSIONS
from xray_fastai.system.parallel import map_in_threads

ELEMENTS = {
    "accession": "AccessionNumber",
    "accessionnumber": "AccessionNumber",
    "studyinstanceuid": "StudyInstanceUID",
    "seriesinstanceuid": "SeriesInstanceUID",
    "sopinstanceuid": "SOPInstanceUID",
}
"""The element of a DICOM header that a column holds, by the column's name (`table_columns.plain_name`)."""


class FileIndex:
    """Finds files below a folder.

    A name with folders in it means a file whose path ends so, or whose path the name ends with: a table may have been
    written in a folder above or below. A name alone is looked up as a file's name, then without an extension, then as a
    folder that holds one image, such as a study's accession number.

    Args:
        files: the images, relative to the folder (`folders.find_images`).
    """

    def __init__(self, files: Sequence[str]):
        self._by_name: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        self._by_folder: dict[str, list[str]] = {}
        for file in files:
            *folders, name = named(file).split("/")
            self._by_name.setdefault(name, []).append(file)
            self._by_stem.setdefault(_stem(name), []).append(file)
            for folder in set(folders):
                self._by_folder.setdefault(folder, []).append(file)

    def find(self, text: str) -> list[str]:
        """Return the files that a text may mean: one, none, or several."""
        *folders, name = named(text.replace("\\", "/")).split("/")
        if folders:
            return self._with_folders([*folders, name])
        for files in (self._by_name.get(name), self._by_stem.get(name), self._by_stem.get(_stem(name))):
            if files:
                return files
        return self._by_folder.get(name, [])

    def _with_folders(self, parts: list[str]) -> list[str]:
        files = self._by_name.get(parts[-1]) or self._by_stem.get(_stem(parts[-1]), [])
        found = [(_common_end(parts[:-1], named(file).split("/")[:-1]), file) for file in files]
        longest = max((common for common, _ in found if common is not None), default=None)
        return [file for common, file in found if common is not None and common == longest]


def files_by_element(root: Path, files: Sequence[str], element: str) -> dict[str, list[str]]:
    """Return the DICOM files by the value of an element of their headers, which threads read.

    Args:
        root: the folder of the files.
        files: relative to it; those that are not DICOM, or lack the element, are left out.
        element: one of `ELEMENTS`.
    """
    values = map_in_threads(lambda file: identifiers_of(root / file, (element,))[element], files)
    found: dict[str, list[str]] = {}
    for file, value in zip(files, values, strict=True):
        if value is not None:
            found.setdefault(value, []).append(file)
    return found


def _stem(name: str) -> str:
    """Return a file's name without the extension of an image; an identifier such as 1.2.840 has none."""
    stem, extension = os.path.splitext(name)
    return stem if extension.lower() in EXTENSIONS else name


def _common_end(wanted: list[str], folders: list[str]) -> int | None:
    """Return how many folders two paths share at their ends, if one path ends with the whole other; else None."""
    shared = min(len(wanted), len(folders))
    return shared if wanted[len(wanted) - shared :] == folders[len(folders) - shared :] else None
