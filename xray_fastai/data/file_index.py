"""Find the image file that a table means by a path, a file's name, a name without its extension, or a folder's name."""

import os
from collections.abc import Sequence

from xray_fastai.data.file_lists import named
from xray_fastai.data.images import EXTENSIONS


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


def _stem(name: str) -> str:
    """Return a file's name without the extension of an image; an identifier such as 1.2.840 has none."""
    stem, extension = os.path.splitext(name)
    return stem if extension.lower() in EXTENSIONS else name


def _common_end(wanted: list[str], folders: list[str]) -> int | None:
    """Return how many folders two paths share at their ends, if one path ends with the whole other; else None."""
    shared = min(len(wanted), len(folders))
    return shared if wanted[len(wanted) - shared :] == folders[len(folders) - shared :] else None
