"""Read a .csv or .tsv file as text: in UTF-8, UTF-16 or Windows-1252, with commas, semicolons or tabs.

Excel's plain CSV is in the code page of Windows, which is 1252 in western Europe and America, with semicolons where
the comma is the decimal mark.
"""

import csv
import io
import warnings
from pathlib import Path

import pandas as pd

from xray_fastai.system.errors import UserError
from xray_fastai.system.text import shown

SEPARATORS = ",;\t"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""The byte order marks."""


def read_csv(path: Path) -> tuple[pd.DataFrame, str | None]:
    """Read a table.

    Returns:
        The table, with text in each cell, and a note on its encoding; None for UTF-8 and UTF-16.

    Raises:
        UserError: the file is missing, is in another encoding, or is no table.
    """
    try:
        text, note = _decoded(path.read_bytes())
        stream = io.StringIO(text, newline="")
        header = stream.readline()
        separator = max(SEPARATORS, key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
        stream.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of longer rows, whose end would be lost
            return pd.read_csv(stream, sep=separator, dtype=str, keep_default_na=False, index_col=False), note
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot be read ({reason}); give another table", option="data", value=path) from None
    except UnicodeError:
        raise UserError("not UTF-8; save it as CSV UTF-8", option="data", value=path) from None
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, csv.Error) as error:
        reason = shown((str(error).splitlines() or ["no row"])[-1].strip(), 120)
        raise UserError(f"not a table ({reason}); correct it", option="data", value=path) from None


def _decoded(content: bytes) -> tuple[str, str | None]:
    if content.startswith(UTF_16):
        return content.decode("utf-16"), None
    try:
        return content.decode("utf-8-sig"), None
    except UnicodeError:
        text = content.decode("cp1252")  # five bytes are no character in it
        return text, "the table is not UTF-8, so it is read as Windows-1252; if letters are wrong, save it as CSV UTF-8"
