"""Read a .csv file of the user that names files of a data set, one in each row.

A file is named as a table names it (`dataset.read_split`): relative to the folder that holds train/. On Windows, where
an editor may have changed slashes into backslashes, all spellings of a name become one.
"""

import csv
import os
import unicodedata
from pathlib import Path, PurePosixPath

from xray_fastai.system.errors import UserError


def read_rows(path: str | Path, column: str, option: str, advice: str) -> list[tuple[str, str, int]]:
    """Read a list of files.

    Args:
        path: a .csv file with the columns `file` and `column`, and maybe others.
        column: the column to read besides `file`.
        option: the option that the list was given by, for errors.
        advice: what to give instead of a file that is no such list.

    Returns:
        Of each row the file, as `named` spells it, the column's text, and the line of the file that it ends in. Rows
        without a file are left out.

    Raises:
        UserError: the file is missing, or is not such a list.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            if not {"file", column} <= set(reader.fieldnames or ()):
                raise UserError(
                    f"its first line does not name the columns file and {column}, separated by commas; {advice}",
                    option=option,
                    value=path,
                )
            return [(named(row["file"]), (row[column] or "").strip(), reader.line_num) for row in reader if row["file"]]
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror}); give the path of a list", option=option, value=path
        ) from None
    except csv.Error:
        raise UserError(
            f"not a .csv file after line {reader.line_num}; correct it", option=option, value=path
        ) from None


def named(file: str) -> str:
    """Return the one spelling of a file's name; macOS decomposes accented letters (NFD)."""
    return os.path.normcase(PurePosixPath(unicodedata.normalize("NFC", file)))
