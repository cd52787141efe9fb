"""Adds to an output file of `predict` the files that have no row in it: for a job that runs again and again.

A file is known by its path and its content. A row with a prediction stays as it is: it may have been reported. So a
file that changed gets a new row below the old one. A row with an error goes when the file has been tried again.

Rows are written as they come, and rows with an error are deleted at the end, in one step. Until then, and after a run
that was killed, the file holds both; the next run deletes the earlier one.
"""

import os
from collections import defaultdict
from collections.abc import Mapping

from xray_fastai.inference.facts import DIGEST, MODEL, MODEL_DIGEST, OPTIONS
from xray_fastai.inference.row_file import Row, RowFile
from xray_fastai.inference.stream import Source
from xray_fastai.system.errors import UserError

Span = tuple[int, int]
"""Where a row begins and ends in the file, in bytes."""


class Ledger:
    """Knows which files have a row in an output file."""

    def __init__(self, file: RowFile, of_run: Mapping[str, str | None]):
        """Read the rows of a file.

        Args:
            file: to be added to.
            of_run: `Facts.of_run`.

        Raises:
            UserError: its rows have other columns, or are of another model or other options.
        """
        self._file, self._done = file, set[tuple[str, str]]()
        self._failed: dict[str, list[Span]] = defaultdict(list)  # rows with an error, by path
        self._superseded: list[Span] = []
        self.known = 0  # files that were passed over, since they have a row
        begin = file.first
        for row in file.done():
            self._check(row, of_run)
            self._superseded += self._failed.pop(row["path"], [])
            if row["error"] is None:
                self._done.add((row["path"], row[DIGEST]))
            else:
                self._failed[row["path"]].append((begin, file.end))
            begin = file.end

    def is_new(self, source: Source, facts: Mapping[str, str | None]) -> bool:
        """Return whether a file is to be predicted; the second of two equal ones is not."""
        path, digest = self._file.path_of(source), facts[DIGEST]
        if digest is None:  # cannot be read; a folder that can, is empty
            return not (os.path.isdir(source) and os.access(source, os.R_OK | os.X_OK))
        if (path, digest) in self._done:
            self.known += 1
            self._superseded += self._failed.pop(path, [])  # its content is again what it was
            return False
        self._done.add((path, digest))
        return True

    def add(self, rows: list[Row]) -> None:
        """Note that these rows have been written."""
        for row in rows:
            self._superseded += self._failed.pop(self._file.path_of(row["path"]), [])

    def close(self) -> None:
        """Delete the rows with an error whose file has a newer row."""
        if self._superseded:
            self._file.delete(sorted(self._superseded))

    def _check(self, row: Row, of_run: Mapping[str, str | None]) -> None:
        if row[MODEL_DIGEST] != of_run[MODEL_DIGEST]:
            was, now = (f"{r[MODEL]} (sha256 {str(r[MODEL_DIGEST])[:12]})" for r in (row, of_run))
            raise UserError(
                f"{self._file.path} has rows of the model {was}, and this is {now}; give that model by model=, or "
                "another output=",
                option="append",
            )
        if row[OPTIONS] != of_run[OPTIONS]:
            was, now = (r[OPTIONS] or "the defaults" for r in (row, of_run))
            raise UserError(
                f"{self._file.path} was made with {was}, and this is {now}; give the same options, or another output=",
                option="append",
            )
