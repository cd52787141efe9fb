"""A list of files to leave out of a fit: `data check --fix` writes it, people edit it, `fit --exclude` reads it.

A .csv file with the columns `file` (relative to the folder that holds train/), `finding`, `action` and `detail`. A row
whose action is not "leave out" changes nothing.
"""

import csv
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from xray_fastai.system.errors import UserError
from xray_fastai.system.files import atomic_write, check_new

COLUMNS = ("file", "finding", "action", "detail")
LEAVE_OUT = "leave out"


def write_list(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write the list whole, or not at all; names that are no UTF-8 keep their bytes.

    Raises:
        UserError: as `check_new`, or it can't be written.
    """
    check_new(path, "fix")
    try:
        with (
            atomic_write(path) as partial,
            partial.open("x", encoding="utf-8", errors="surrogateescape", newline="") as stream,
        ):
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror}); give another name", option="fix", value=path) from None


def read_list(path: str | Path) -> set[str]:
    """The files that a list says to leave out, as it names them.

    Raises:
        UserError: no such file, or not such a list.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            if not {"file", "action"} <= set(reader.fieldnames or ()):
                raise UserError(
                    "its first line does not name the columns file and action, separated by commas; "
                    "give a list that data check --fix wrote",
                    option="exclude",
                    value=path,
                )
            return {
                PurePosixPath(row["file"]).as_posix()
                for row in reader
                if row["file"] and (row["action"] or "").strip().lower() == LEAVE_OUT
            }
    except OSError as error:
        raise UserError(
            f"can't be read ({error.strerror}); give a list by its path", option="exclude", value=path
        ) from None
    except csv.Error:
        raise UserError(
            f"after line {reader.line_num} it is no .csv file; mend it", option="exclude", value=path
        ) from None
