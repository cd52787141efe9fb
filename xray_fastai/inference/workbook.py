"""Writes rows to an Excel workbook (.xlsx), which is there at the end, complete, or not at all."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from xray_fastai.inference.row_file import Row
from xray_fastai.system.errors import UserError, reason
from xray_fastai.system.files import atomic_write, check_new
from xray_fastai.system.text import shown

MAX_ROWS, MAX_TEXT = 1_048_575, 32_767
"""Rows below the header, and characters of a cell, that Excel has (Excel specifications and limits)."""
PERCENT_DIGITS = 1
"""Decimal places that are shown of `unlike`."""


class Workbook:
    """Collects rows, and writes the workbook at the end of the `with` block, if that ends without an error.

    A cell holds the whole number, by which the decision can be checked, and shows the digits that mean something. The
    rows wait in a temporary file, so memory does not grow with them. Text is text: `=1+1.jpeg` is no formula.
    """

    def __init__(self, path: str | Path, columns: Mapping[str, type], digits: int):
        """Begin a workbook.

        Args:
            path: the file to make.
            columns: name and type (str or float) of each.
            digits: the decimal places that are shown of a probability.
        """
        self.check(Path(path))
        self.path, self.columns, self.rows = Path(path), dict(columns), 0
        self._formats = {name: "0." + "0" * digits for name, kind in columns.items() if kind is float}
        self._formats["unlike"] = "0." + "0" * PERCENT_DIGITS
        openpyxl = _openpyxl()
        self._cell = openpyxl.cell.WriteOnlyCell
        self._book = openpyxl.Workbook(write_only=True)
        self._sheet = self._book.create_sheet("predictions")
        self._sheet.freeze_panes = "B2"
        self._sheet.column_dimensions["A"].width = 48
        for letter in map(openpyxl.utils.get_column_letter, range(2, len(columns) + 1)):
            self._sheet.column_dimensions[letter].width = 14
        self._sheet.append([self._text(name) for name in columns])

    @staticmethod
    def check(path: Path) -> None:
        """Check that the file could be made, without beginning it.

        Raises:
            UserError: openpyxl is not installed, the file exists, or its folder does not.
        """
        _openpyxl()
        check_new(path, "output")

    def write(self, rows: Sequence[Row]) -> None:
        """Add rows.

        Raises:
            UserError: there are more than a sheet has, or the disk is full.
        """
        if self.rows + len(rows) > MAX_ROWS:
            message = f"a sheet has {MAX_ROWS:,} rows; give the name of a .csv file"
            raise UserError(message, option="output", value=self.path)
        try:
            for row in rows:
                self._sheet.append([self._value(name, row[name]) for name in self.columns])
        except OSError as error:
            raise self._full(error) from None
        self.rows += len(rows)

    def __enter__(self) -> "Workbook":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is not None:
            with suppress(OSError):
                self._sheet.close()
            return
        try:
            with atomic_write(self.path) as partial:
                self._book.save(partial)
        except OSError as error:
            raise self._full(error) from None

    def _full(self, error: OSError) -> UserError:
        message = f"cannot be written ({reason(error)}); free space, or give another name"
        return UserError(message, option="output", value=self.path)

    def _value(self, name: str, value: str | float | None) -> Any:
        if value is None:
            return None
        if self.columns[name] is str:
            return self._text(value)
        cell = self._cell(self._sheet, value=value)
        cell.number_format = self._formats[name]
        return cell

    def _text(self, value: str) -> Any:
        cell = self._cell(self._sheet, value=shown(value, MAX_TEXT))
        cell.data_type = "s"  # openpyxl takes text that begins with = for a formula
        return cell


def _openpyxl() -> Any:
    try:
        import openpyxl  # an optional extra
        import openpyxl.cell
        import openpyxl.utils
    except ImportError:
        message = 'needs openpyxl: pip install "xray-fastai[excel]", or give the name of a .csv file'
        raise UserError(message, option="output") from None
    return openpyxl
