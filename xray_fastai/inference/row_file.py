"""Writes rows to a .csv or .jsonl file as they come.

Whatever happens, the file ends with a whole row, and `--append` or `--resume` can continue it. (If the system ends the
program in the middle of a write, the next `write` deletes the half row.)
"""

import codecs
import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xray_fastai.system.errors import UserError
from xray_fastai.system.files import acquire, atomic_write, release
from xray_fastai.system.text import count_of, csv_text, from_csv

Row = dict[str, Any]
MAX_HEAD = 100_000
"""Bytes of a first line that are read to say which columns it lacks."""


class RowFile:
    """Appends rows to an `--output` file, and never overwrites a row.

    To continue a file, read `done()` to its end, then call `write`; the file stays unchanged until then. The texts of
    a .csv file are as `text.csv_text` makes them. In a .jsonl file bytes of a path that are not UTF-8 become escapes
    (`\\udc80`), which Python reads back.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Mapping[str, type],  # name and type (str or float) of each, in this order; `path` is the first
        resume: bool = False,  # continue the file if it exists
        option: str = "resume",  # by which the user continues it
        excel: str | None = None,  # of a .csv file, for Excel in a language with a decimal `point` or `comma`
    ):
        """Open the file, or make it.

        Raises:
            UserError: the suffix is another one, the file exists and `resume` is false, another process is writing it,
                or it cannot be written to.
        """
        self.path, self.columns = Path(path), dict(columns)
        self.rows = 0  # whole rows in the file
        self._option = option
        self.check(self.path, resume)
        lock = None
        try:
            self.path.parent.stat()  # the lock would make a missing folder
            lock = acquire(self.path.with_name(f".{self.path.name}.lock"), timeout=0)
            if lock is None:
                raise UserError(
                    "another predict is writing it; wait until it ends, or give another name",
                    option="output",
                    value=path,
                )
            self._file = open(self.path, "r+b" if resume and self.path.exists() else "xb", buffering=0)  # noqa: SIM115
        except OSError as error:
            if lock is not None:
                release(lock)
            raise UserError(f"cannot be written to ({error.strerror})", option="output", value=path) from None
        self._lock = lock
        self._csv = self.path.suffix.lower() == ".csv"
        self._style = STYLES[excel]
        self._head = self._style.bom + self._style.line(list(columns)) if self._csv else b""
        self._end = 0  # where the last whole row ends, in bytes
        self._writing = False

    @staticmethod
    def check(path: Path, resume: bool) -> None:
        """Check whether the file could be written, without opening it.

        Raises:
            UserError: the suffix is another one, `path` is a folder, or the file exists and `resume` is false.
        """
        if path.suffix.lower() not in (".csv", ".jsonl"):
            raise UserError("give a name that ends in .csv, .jsonl or .xlsx", option="output", value=path)
        if path.is_dir():
            raise UserError("a folder, not a file", option="output", value=path)
        if path.exists() and not resume:
            raise UserError(
                "already exists; give another name, add to it by append=True, or continue it by resume=True",
                option="output",
                value=path,
            )

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_) -> None:
        try:
            with self._file:
                if self._writing:
                    self._file.truncate(self._end)
        finally:
            release(self._lock)

    def done(self) -> Iterator[Row]:
        """Yield the whole rows of the file; a column of type float has floats, an empty value is None.

        Raises:
            UserError: the file does not hold rows of these columns.
        """
        with open(self.path, "rb") as stream:
            expected = self._head or b'{"path": '
            start = stream.read(len(expected))
            if start != expected[: len(start)]:
                stream.seek(0)
                raise self._other_columns(stream.readline(MAX_HEAD))
            if start != expected:  # the file is empty, or its first line is incomplete
                return
            stream.seek(len(self._head))
            self._end = len(self._head)
            yield from self._read(stream)

    @property
    def first(self) -> int:
        """Where the first row begins, in bytes."""
        return len(self._head)

    @property
    def end(self) -> int:
        """Where the last whole row that was read or written ends, in bytes."""
        return self._end

    def path_of(self, source: object) -> str:
        """Return the path of a source as `done` yields it."""
        return from_csv(csv_text(str(source))) if self._csv else str(source)

    def is_row_of(self, row: Row, source: object) -> bool:
        """Return whether a row of `done` has the path of a source."""
        path = row["path"]  # 0.1.0 wrote it without an apostrophe
        return path == source or (self._csv and isinstance(source, str) and csv_text(path) == csv_text(source))

    def _other_columns(self, line: bytes) -> UserError:
        """Return the error for a file whose first line has other columns."""
        advice = "give another output="
        try:
            text = line.decode("utf-8-sig").rstrip("\n")
            found = (
                max((text.split(s.separator) for s in STYLES.values()), key=len)
                if self._csv
                else list(json.loads(text))
            )
        except (ValueError, TypeError):
            found = []
        if found == list(self.columns):
            advice = f"it was written with another excel=; give the same, or {advice}"
        if missing := [name for name in self.columns if name not in found] if "path" in found else []:
            advice = (
                f"it lacks {', '.join(missing)}, so an earlier version wrote it, or a run with other options; {advice}"
            )
        more = [name for name in found if name not in self.columns]
        if more and not missing and "path" in found:
            return UserError(
                f"{self.path} has {', '.join(more)} besides; give the options of the run that wrote it, or {advice}",
                option=self._option,
            )
        return UserError(
            f"{self.path} does not begin with the columns of this run ({', '.join(self.columns)}); {advice}",
            option=self._option,
        )

    def _read(self, stream: io.BufferedReader) -> Iterator[Row]:
        position, at_end = self._end, False

        def lines() -> Iterator[str]:
            nonlocal position, at_end
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                yield line.decode("utf-8", "surrogateescape")
            at_end = True

        def parsed() -> Iterator[Row]:
            if self._csv:
                read = {str: from_csv, float: self._style.number}
                for texts in csv.reader(lines(), delimiter=self._style.separator, strict=True):
                    row = dict(zip(self.columns, texts, strict=True))
                    yield {name: read[self.columns[name]](text) if text else None for name, text in row.items()}
            else:
                for line in lines():
                    row = json.loads(line)
                    if list(row) != list(self.columns):
                        if self.rows == 0:
                            raise self._other_columns(line.encode("utf-8", "surrogateescape"))
                        raise ValueError
                    yield row

        try:
            for row in parsed():
                self._end, self.rows = position, self.rows + 1
                yield row
        except (ValueError, TypeError, csv.Error):
            # at the end it is the last row that is incomplete: it was cut at a line break in a quoted path
            if not at_end:
                raise UserError(
                    f"row {self.rows + 1} of {self.path} does not have the columns {', '.join(self.columns)}; "
                    "give another output=",
                    option=self._option,
                ) from None

    def write(self, rows: Iterable[Row]) -> None:
        """Append all rows, or none if there is an error; on return the operating system has them.

        An incomplete row before them is deleted. The first call writes the header.

        Raises:
            UserError: the disk is full.
        """
        rows = list(rows)
        content = b"".join(map(self._line, rows))
        if self._end == 0:
            content = self._head + content
        self._writing = True
        try:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            remaining = memoryview(content)
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise UserError(
                f"{error.strerror} after {count_of(self.rows, 'row')}, which are kept; free space, then give "
                f"{self._option}=True",
                option="output",
                value=self.path,
            ) from None
        self._end, self.rows = self._end + len(content), self.rows + len(rows)

    def delete(self, spans: Sequence[tuple[int, int]]) -> None:
        """Delete rows in one step: whoever reads the file finds all of them in it, or none.

        Args:
            spans: where each row begins and ends, in bytes, in the file's order.

        Raises:
            UserError: the disk is full. The file stays as it was.
        """
        path = Path(os.path.realpath(self.path))
        try:
            with atomic_write(path, sync=True) as partial:
                with open(path, "rb") as old, partial.open("xb") as new:
                    at = 0
                    for begin, end in [*spans, (self._end, self._end)]:
                        old.seek(at)
                        _copy(old, new, begin - at)
                        at = end
                shutil.copymode(path, partial)
                self._file.close()  # on Windows an open file cannot be replaced
            self._end -= sum(end - begin for begin, end in spans)
            self.rows -= len(spans)
        except OSError as error:
            raise UserError(
                f"rows with an error cannot be deleted ({error.strerror}); free space, then give {self._option}=True",
                option="output",
                value=self.path,
            ) from None
        finally:
            self._file.close()
            self._file = open(path, "r+b", buffering=0)  # noqa: SIM115

    def _line(self, row: Row) -> bytes:
        if self._csv:
            return self._style.line([row[name] for name in self.columns])
        return json.dumps({name: row[name] for name in self.columns}, allow_nan=False).encode() + b"\n"


def _copy(source: io.BufferedReader, target: io.BufferedWriter, size: int) -> None:
    while size > 0 and (block := source.read(min(size, 2**20))):
        target.write(block)
        size -= len(block)


@dataclass(frozen=True)
class Style:
    """Describes a .csv file."""

    bom: bytes = b""  # by which Excel knows UTF-8
    separator: str = ","
    decimal: str = "."

    def line(self, values: list) -> bytes:
        """Return a row."""
        text = io.StringIO()
        values = [self._cell(value) for value in values]
        # most readers end a line at a lone "\r", which `QUOTE_MINIMAL` does not quote
        quoting = csv.QUOTE_ALL if any("\r" in str(value) for value in values) else csv.QUOTE_MINIMAL
        csv.writer(text, delimiter=self.separator, lineterminator="\n", quoting=quoting).writerow(values)
        return text.getvalue().encode()

    def number(self, text: str) -> float:
        """Return the number that a cell holds."""
        return float(text.replace(self.decimal, "."))

    def _cell(self, value: str | float | None) -> str | None:
        if isinstance(value, float):
            return str(value).replace(".", self.decimal)
        return csv_text(value) if isinstance(value, str) else value


STYLES = {None: Style(), "point": Style(codecs.BOM_UTF8), "comma": Style(codecs.BOM_UTF8, ";", ",")}
"""By `excel`: Excel separates cells by a semicolon where a comma is the decimal sign, else by a comma."""
