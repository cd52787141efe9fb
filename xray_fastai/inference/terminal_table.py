"""Prints rows of predictions as a table of a terminal."""

from xray_fastai.config.class_names import UNCERTAIN
from xray_fastai.inference.row_file import Row
from xray_fastai.inference.rows import DIGITS, RowBuilder, probability_column
from xray_fastai.system.text import WIDTH, printable, shorten

MAX_ROWS = 50
"""Rows that the terminal shows; an output file gets all."""
SHOWN_DIGITS = 4
"""Decimal places of a probability on the terminal, where a row has `rows.DIGITS`."""


def shown_digits(builder: RowBuilder) -> int:
    """Return the decimal places of a probability that people are shown."""
    return SHOWN_DIGITS + builder.rule.digits - DIGITS


class Table:
    """Prints the first rows as they come, in 80 columns, then a line that says how to get the others.

    The widths are known before the first row is; `rich.table` would need all rows before it prints one.
    """

    def __init__(
        self,
        classes: list[str],
        paths: list[str],  # of the rows to come: they give the width of the first column
        digits: int,  # decimal places of a probability
    ):
        self.rows, self.digits = 0, digits
        self.classes, self.all_classes = classes, True
        number = digits + len("0.")
        self.widths = [max(10, *map(len, classes)), *(max(number, len(probability_column(c))) for c in classes)]
        if sum(self.widths) + 2 * len(self.widths) > WIDTH - 24:  # too wide: only the predicted class's probability
            self.widths, self.all_classes = [min(30, self.widths[0]), max(number, len("probability"))], False
        longest = max([4, *map(len, paths)])
        self.widths.insert(0, min(longest, WIDTH - sum(self.widths) - 2 * len(self.widths)))

    def write(self, rows: list[Row]) -> None:
        for row in rows[: max(0, MAX_ROWS + 1 - self.rows)]:
            if self.rows == 0:
                names = map(probability_column, self.classes) if self.all_classes else ["probability"]
                print(self._line(["path", "prediction", *names]))
            if self.rows == MAX_ROWS:
                print(f"... {MAX_ROWS} rows are shown; to get all of them, give --output FILE.csv", flush=True)
            else:
                print(self._line(self._cells(row)), flush=True)
            self.rows += 1

    def _cells(self, row: Row) -> list[str]:
        if row["error"] is not None:
            return [row["path"], row["error"].removeprefix(f"{row['path']}: ")]
        names = self.classes
        if not self.all_classes:  # of an uncertain image the most probable class's
            called = row["prediction"]
            names = [max(names, key=lambda name: row[probability_column(name)]) if called == UNCERTAIN else called]
        return [row["path"], row["prediction"], *(f"{row[probability_column(name)]:.{self.digits}f}" for name in names)]

    def _line(self, cells: list[str]) -> str:
        path, second, *numbers = (printable(cell) for cell in cells)
        cells = [f"{shorten(path, self.widths[0]):<{self.widths[0]}}", shorten(second, WIDTH - self.widths[0] - 2)]
        if numbers:
            cells[1] = f"{shorten(second, self.widths[1]):<{self.widths[1]}}"
            cells += [f"{number:>{width}}" for number, width in zip(numbers, self.widths[2:], strict=True)]
        return "  ".join(cells).rstrip()
