"""Write and read the list of files to leave out of a fit.

`data check --fix` writes it, the user may edit it, and `fit --exclude` reads it. It is a .csv file with the columns
`file` (relative to the folder that holds train/), `finding`, `action` and `detail`. A row whose action is not
"leave out" changes nothing.
"""

import csv
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import pandas as pd

from xray_fastai.system.errors import UserError
from xray_fastai.system.files import atomic_write, check_new
from xray_fastai.system.text import count_of

COLUMNS = ("file", "finding", "action", "detail")
LEAVE_OUT = "leave out"


def write_list(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write the complete list or nothing. File names that are not UTF-8 keep their bytes.

    Raises:
        UserError: see `check_new`; or the file cannot be written.
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
    """Read the names of the files to leave out, as `os.path.normcase` changes them.

    On Windows, where an editor may have changed slashes into backslashes, all spellings of a name become one.

    Raises:
        UserError: the file is missing, or is not such a list.
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
                os.path.normcase(PurePosixPath(row["file"]))
                for row in reader
                if row["file"] and (row["action"] or "").strip().lower() == LEAVE_OUT
            }
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror}); give the path of a list", option="exclude", value=path
        ) from None
    except csv.Error:
        raise UserError(
            f"not a .csv file after line {reader.line_num}; correct it", option="exclude", value=path
        ) from None


def leave_out(table: pd.DataFrame, root: Path, path: str) -> tuple[pd.DataFrame, list[str]]:
    """Drop the images that a list says to leave out.

    Returns:
        The rows that stay, and notes for the user.

    Raises:
        UserError: the file is not such a list, or it names every image of a class.
    """
    excluded = read_list(path)
    names = table.file.map(os.path.normcase)
    dropped = names.isin(excluded)
    kept = table[~dropped].reset_index(drop=True)
    for split, label in sorted({(s, c) for s, c in zip(table.split, table.label, strict=True)}):
        if not ((kept.split == split) & (kept.label == label)).any():
            raise UserError(f"names every image of {split}/{label}, so none is left", option="exclude", value=path)
    notes = [f"left out by --exclude: {count_of(int(dropped.sum()), 'image')}"]
    if missing := sum(not (root / file).exists() for file in excluded - set(names)):
        notes.append(f"named by --exclude, but missing: {count_of(missing, 'file')}")
    return kept, notes
