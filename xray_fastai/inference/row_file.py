"""A .csv or .jsonl file of rows that grows as they come, ends on a whole row whatever happens, and can be continued."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from xray_fastai.system.errors import UserError
from xray_fastai.system.files import acquire, release
from xray_fastai.system.text import count_of

Row = dict[str, Any]


class RowFile:
    """An `--output` that rows are appended to; what is in it is never overwritten.

    To continue one, read `done()` to its end, then `write`: until then the file is as it was. A path that is not UTF-8
    keeps its bytes in .csv, and becomes escapes (`\\udc80`, as Python reads them) in .jsonl.
    """

    def __init__(
        self,
        path: str | Path,
        columns: list[str],  # in this order; `path` is the first
        resume: bool = False,  # continue the file, if it is there
    ):
        """Open, or make, the file.

        Raises:
            UserError: another suffix, a file that is there and not to be continued, that another process is writing,
                or that can't be written to.
        """
        self.path, self.columns = Path(path), columns
        self.rows = 0  # whole ones
        self.check(self.path, resume)
        lock = None
        try:
            self.path.parent.stat()  # a lock would make it
            lock = acquire(self.path.with_name(f".{self.path.name}.lock"), timeout=0)
            if lock is None:
                raise UserError(
                    "another predict is writing it; wait for that, or give another name", option="output", value=path
                )
            self._file = open(self.path, "r+b" if resume and self.path.exists() else "xb", buffering=0)  # noqa: SIM115
        except OSError as error:
            if lock is not None:
                release(lock)
            raise UserError(f"can't be written to ({error.strerror})", option="output", value=path) from None
        self._lock = lock
        self._csv = self.path.suffix.lower() == ".csv"
        self._head = _csv_line(columns) if self._csv else b""
        self._end = 0  # of the last whole row, in bytes
        self._writing = False

    @staticmethod
    def check(path: Path, resume: bool) -> None:
        """See, without touching it, whether a file could be written.

        Raises:
            UserError: another suffix, a folder, or a file that is there and not to be continued.
        """
        if path.suffix.lower() not in (".csv", ".jsonl"):
            raise UserError("give a name that ends in .csv or .jsonl", option="output", value=path)
        if path.is_dir():
            raise UserError("a folder, not a file", option="output", value=path)
        if path.exists() and not resume:
            raise UserError(
                "is there already; give another name, or continue it by --resume", option="output", value=path
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
        """The whole rows that are there, with numbers as floats and None for what is empty.

        Raises:
            UserError: not rows of these columns.
        """
        with open(self.path, "rb") as stream:
            start = self._head or b'{"path": '
            if (found := stream.read(len(start))) != start[: len(found)]:
                wanted = ", ".join(self.columns)
                raise UserError(
                    f"{self.path} does not begin with the columns of this model ({wanted})", option="resume"
                )
            if found != start:  # nothing there, or the first line cut short
                return
            stream.seek(len(self._head))
            self._end = len(self._head)
            yield from self._read(stream)

    def _read(self, stream: io.BufferedReader) -> Iterator[Row]:
        taken, cut = self._end, False

        def lines() -> Iterator[str]:
            nonlocal taken, cut
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                taken += len(line)
                yield line.decode("utf-8", "surrogateescape")
            cut = True

        def fields() -> Iterator[Row]:
            if self._csv:
                for values in csv.reader(lines(), strict=True):
                    row = dict(zip(self.columns, values, strict=True))
                    yield {name: _value(name, text) for name, text in row.items()}
            else:
                for line in lines():
                    row = json.loads(line)
                    if list(row) != self.columns:
                        raise ValueError
                    yield row

        try:
            for row in fields():
                self._end, self.rows = taken, self.rows + 1
                yield row
        except (ValueError, TypeError, csv.Error):
            if not cut:  # else the last row's quotation marks are open: it was cut at a line break in a path
                raise UserError(
                    f"row {self.rows + 1} of {self.path} does not have the columns {', '.join(self.columns)}",
                    option="resume",
                ) from None

    def write(self, rows: Iterable[Row]) -> None:
        """Append rows, all of them or, with an error, none; on return they are with the operating system. What was cut
        short before them is dropped; the first call writes the header.

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
            left = memoryview(content)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise UserError(
                f"{error.strerror} after {count_of(self.rows, 'row')}, which stand; make room, then go on by --resume",
                option="output",
                value=self.path,
            ) from None
        self._end, self.rows = self._end + len(content), self.rows + len(rows)

    def _line(self, row: Row) -> bytes:
        if self._csv:
            return _csv_line([row[name] for name in self.columns])
        return json.dumps({name: row[name] for name in self.columns}, allow_nan=False).encode() + b"\n"


def _csv_line(values: list) -> bytes:
    text = io.StringIO()
    # a lone "\r" ends a line to most readers, and `QUOTE_MINIMAL` does not quote it
    quoting = csv.QUOTE_ALL if any("\r" in str(value) for value in values) else csv.QUOTE_MINIMAL
    csv.writer(text, lineterminator="\n", quoting=quoting).writerow(values)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _value(name: str, text: str) -> str | float | None:
    if name in ("path", "prediction", "error"):
        return text if name == "path" else text or None
    return float(text) if text else None
