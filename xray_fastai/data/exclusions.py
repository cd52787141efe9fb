"""Write and read the list of files to leave out of a fit.

`data check --fix` writes it, the user may edit it, and `fit --exclude` reads it. It is a .csv file with the columns
`file` (relative to the folder that holds train/), `finding`, `action` and `detail`. The action is "leave out". To keep
a file after all, the user writes "keep" or nothing.
"""

import csv
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from xray_fastai.data.file_lists import named, read_rows
from xray_fastai.system.errors import UserError
from xray_fastai.system.files import atomic_write, check_new
from xray_fastai.system.text import count_of, shown

COLUMNS = ("file", "finding", "action", "detail")
LEAVE_OUT, KEEP = "leave out", "keep"


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
    """Read the names of the files to leave out, as `file_lists.named` spells them.

    Raises:
        UserError: see `file_lists.read_rows`; or an action is unknown.
    """
    rows = read_rows(path, "action", "exclude", "give a list that data check --fix wrote")
    for file, action, line in rows:
        if action.lower() not in (LEAVE_OUT, KEEP, ""):
            fault = f'line {line}, {shown(file)}: unknown action "{shown(action, 40)}"; write {LEAVE_OUT}, or {KEEP}'
            raise UserError(fault, option="exclude", value=path)
    return {file for file, action, _ in rows if action.lower() == LEAVE_OUT}


def leave_out(table: pd.DataFrame, root: Path, path: str) -> tuple[pd.DataFrame, list[str]]:
    """Drop the images that a list says to leave out.

    Returns:
        The rows that stay, and notes for the user.

    Raises:
        UserError: the file is not such a list, or it names every image of a class.
    """
    excluded = read_list(path)
    names = table.file.map(named)
    dropped = names.isin(excluded)
    kept = table[~dropped].reset_index(drop=True)
    for split, label in sorted({(s, c) for s, c in zip(table.split, table.label, strict=True)}):
        if not ((kept.split == split) & (kept.label == label)).any():
            raise UserError(f"names every image of {split}/{label}, so none is left", option="exclude", value=path)
    notes = [f"left out by the list {Path(path).name}: {count_of(int(dropped.sum()), 'image')}"]
    if missing := sum(not (root / file).exists() for file in excluded - set(names)):
        notes.append(f"named by the list {Path(path).name}, but missing: {count_of(missing, 'file')}")
    return kept, notes
