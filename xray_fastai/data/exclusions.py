"""A list of files to leave out of a fit: `data check --fix` writes it, people edit it, `fit --exclude` reads it.

A .csv file with the columns `file` (relative to the folder that holds train/), `finding`, `action` and `detail`. A row
whose action is not "leave out" changes nothing.
"""

import csv
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from xray_fastai.system.errors import UserError

COLUMNS = ("file", "finding", "action", "detail")
LEAVE_OUT = "leave out"


def check_new(path: Path) -> None:
    """Raises:
    UserError: there is something of that name already, or no folder to write it into.
    """
    if path.exists():
        raise UserError(f"--fix {path}: is there already; give another name, or remove it first")
    if not path.parent.is_dir():
        raise UserError(f"--fix {path}: there is no folder {path.parent}; make it, or give another name")


def write_list(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write the list whole, or not at all; names that are no UTF-8 keep their bytes.

    Raises:
        UserError: as `check_new`, or it can't be written.
    """
    check_new(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("x", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--fix {path}: can't be written ({error.strerror}); give another name") from None
    finally:
        with suppress(OSError):
            partial.unlink()


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
                    f"--exclude {path}: its first line does not name the columns file and action, separated by commas; "
                    "give a list that data check --fix wrote"
                )
            return {
                PurePosixPath(row["file"]).as_posix()
                for row in reader
                if row["file"] and (row["action"] or "").strip().lower() == LEAVE_OUT
            }
    except OSError as error:
        raise UserError(f"--exclude {path}: can't be read ({error.strerror}); give a list by its path") from None
    except csv.Error:
        raise UserError(f"--exclude {path}: after line {reader.line_num} it is no .csv file; mend it") from None
