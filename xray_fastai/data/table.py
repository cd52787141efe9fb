"""Read a table of images: a .csv file, or a pandas DataFrame, with a row an image, and a folder that holds the files.

Columns are found by their names, or named by `column="label=Finding"` (`table_columns`). The result is the table that
folders give (`folders.read_split`), with a column `group:NAME` for each further column that is named.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import pandas as pd

from xray_fastai.data.file_index import ELEMENTS, FileIndex, files_by_element
from xray_fastai.data.file_lists import named
from xray_fastai.data.folders import find_images, split_of
from xray_fastai.data.patients import PatientRule, numbered, patients_in
from xray_fastai.data.table_columns import GROUP, ROLES, Column, headers_of, note_on_columns, plain_name
from xray_fastai.data.table_file import read_csv
from xray_fastai.data.table_labels import (
    EMPTY,
    FALSE,
    TRUE,
    UNCERTAIN,
    UNKNOWN,
    Labels,
    Naming,
    is_yes_or_no,
    read_labels,
)
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import count_of, shown

Data: TypeAlias = str | Path | pd.DataFrame

EXTENSIONS = (".csv", ".tsv")
FRAME = "pandas.DataFrame"
"""What an export records as the data of a fit to a data frame."""
NO_FILE, SEVERAL, NO_NAME = "a file that is not there", "a name that fits several files", "no name of a file"
OTHER_SPLIT = "a split other than train, val and test"
KINDS = {
    NO_FILE: "no-file",
    SEVERAL: "several-files",
    NO_NAME: "no-name",
    EMPTY: "no-label",
    UNCERTAIN: "uncertain-label",
    UNKNOWN: "unknown-label",
    OTHER_SPLIT: "unknown-split",
}
"""Why a row is left out, and the kind of `Fault` that says so."""
ROLE_OF = {NO_FILE: "path", SEVERAL: "path", NO_NAME: "path", OTHER_SPLIT: "split"}
"""The column that is to blame; for other reasons it is the label."""
SHOWN = 3  # examples of a fault


@dataclass(frozen=True)
class Source:
    """Says where a table is, and how it is read."""

    table: Data
    images: str | Path | None = None  # the folder that holds the files; None is that of the table
    column: Column = None
    naming: Naming = field(default_factory=Naming)

    @property
    def name(self) -> str:
        return name_of(self.table)

    @property
    def root(self) -> Path:
        if self.images is not None:
            return Path(os.path.expanduser(self.images))
        return Path() if isinstance(self.table, pd.DataFrame) else Path(os.path.expanduser(self.table)).parent


@dataclass(frozen=True)
class Fault:
    """Rows or files that were left out, or that need a look."""

    kind: str  # a stable name for programs
    text: str  # with their number
    examples: list[str]
    files: list[str]  # as a table names them


@dataclass(frozen=True)
class Listing:
    """The images that a table lists.

    `table` has the columns `path`, `file` (relative to `root`), `label`, `split` (train, val or test) and `group:NAME`.
    """

    root: Path
    table: pd.DataFrame
    patients: dict[str, str]  # by file, as `file_lists.named` spells it
    has_splits: bool
    is_decided: bool  # the table has is_valid: its rows alone are the validation set
    faults: list[Fault]
    notes: list[str]  # how it was read; they name no file

    @property
    def summary(self) -> list[str]:
        """Return `notes`, and a line on what is not used; it names no file."""
        if not self.faults:
            return self.notes
        return [*self.notes, f"table: {'; '.join(fault.text for fault in self.faults)} (data check names them)"]

    @property
    def examples(self) -> list[str]:
        """Return a line with examples of each fault, for the terminal only."""
        return [f"{fault.text}: {', '.join(map(shown, fault.examples))}" for fault in self.faults if fault.examples]


def is_table(data: Data | None) -> bool:
    """Return whether data are a table, by the extension, and not a folder."""
    if data is None or isinstance(data, pd.DataFrame):
        return data is not None
    return os.path.basename(data) == FRAME or (str(data).lower().endswith(EXTENSIONS) and not os.path.isdir(data))


def name_of(data: Data) -> str:
    return FRAME if isinstance(data, pd.DataFrame) else str(data)


def check_for_table(data: Data | None, images: str | Path | None, column: Column) -> None:
    """Check that the options of a table are given with a table only.

    Raises:
        UserError: they are given with a folder.
    """
    for option, value in (("images", images), ("column", column)):
        if value and not is_table(data):
            raise UserError("is for a table of images, a .csv file in data=; leave it out", option=option, value=value)


def read_table(source: Source) -> Listing:
    """Read a table, and find the file of each row.

    A row is left out if it names no file, or several; if it has no label; if its file has another label or split in
    another row. `Listing.faults` counts these rows, and the files without a row.

    Raises:
        UserError: the table, the folder or a column is missing, or no row is left; see `table_labels.read_labels`.
    """
    frame, of_file = _frame(source)
    if frame.empty:
        raise UserError("has no rows", option="data", value=source.name)
    headers = headers_of(frame, source.column, source.name)
    rows = pd.DataFrame({role: _texts(frame[header]) for role, header in headers.items()})
    files = _files_below(source)
    found, by_header = _find_rows(rows.path, headers["path"], files, source.root)
    labels = read_labels(rows.label, headers["label"], source.naming)
    split, is_decided = _splits(rows)
    left_out = _why_left_out(rows, found, labels, split)
    _check_rows_left(rows, left_out, headers, source)
    table = pd.DataFrame({"file": found.str[0], "label": labels.classes, "split": split})
    table["patient"] = rows.get("patient", "")
    table = table.assign(**{f"{GROUP}{role}": rows[role] for role in rows if role not in ROLES})[left_out == ""]
    without = sorted(set(files) - set(found[found.map(len) == 1].str[0]))
    table, of_files = _one_row_a_file(table, source)
    of_rows = [*_left_out(rows, left_out), *of_files, *_in_two_splits(table)]
    faults = [*of_rows, *_fault("no-row", without, "without a row")]
    known = {named(file): patient for file, patient in zip(table.file, table.patient, strict=True) if patient}
    table = table.drop(columns="patient").sort_values(["split", "label", "file"], ignore_index=True)
    table.insert(0, "path", [os.path.join(source.root, file) for file in table.file])
    notes = list(filter(None, [of_file, note_on_columns(headers), by_header, labels.note]))
    return Listing(source.root, table, known, "split" in rows, is_decided, faults, notes)


def with_patients(table: pd.DataFrame, listing: Listing, rule: PatientRule) -> pd.DataFrame:
    """Return rows of a table with the column `patient` (`patients.numbered`).

    Raises:
        UserError: see `patients.patients_in`.
    """
    rule = replace(rule, in_table=listing.patients)
    no_folders = table.assign(split="", label="")  # names of folders in these paths are no splits and no classes
    return numbered(table.assign(patient=patients_in(no_folders, rule)))


def _frame(source: Source) -> tuple[pd.DataFrame, str | None]:
    """Return the table with text in each cell of a file, and a note on it; a data frame is returned as it is."""
    if isinstance(source.table, pd.DataFrame):
        return source.table.reset_index(drop=True), None
    path = Path(os.path.expanduser(source.table))
    if path.name == FRAME:
        raise UserError("the fit was to a data frame; give it by data=", option="data")
    return read_csv(path)


def _texts(values: pd.Series) -> pd.Series:
    """Return cells as text without spaces around it, "" for a missing one, and 17 for 17.0."""
    values = values.astype(object) if isinstance(values.dtype, pd.CategoricalDtype) else values
    if pd.api.types.is_float_dtype(values):
        values = values.map(lambda value: "" if pd.isna(value) else f"{value:.15g}")
    return values.map(lambda value: "" if value is None or value is pd.NA else str(value).strip()).replace("nan", "")


def _splits(rows: pd.DataFrame) -> tuple[pd.Series, bool]:
    """Return the split of each row (N,), None for an unknown one, and whether it says is_valid; without any, train."""
    if "split" not in rows:
        return pd.Series("train", rows.index), False
    if is_yes_or_no(rows.split):
        of_value = dict.fromkeys(TRUE, "val") | dict.fromkeys(FALSE, "train")
        return rows.split.str.lower().map(of_value), True
    return rows.split.map({text: split_of(text) for text in rows.split.unique()}), False


def _files_below(source: Source) -> list[str]:
    if not source.root.is_dir():
        option = "data" if source.images is None else "images"
        raise UserError("no such folder; give the folder of the images by images=", option=option, value=source.root)
    return find_images(source.root)


def _find_rows(texts: pd.Series, header: str, files: list[str], root: Path) -> tuple[pd.Series, str | None]:
    """Find the files of each row, by names, else by the header of DICOM files if the column holds an identifier.

    Returns:
        The files of each row (N,): one, none, or several; and a note on those that were found by their headers.
    """
    index = FileIndex(files)
    found = texts.map({text: index.find(text) if text else [] for text in texts.unique()})
    element, missing = ELEMENTS.get(plain_name(header)), (found.map(len) == 0) & (texts != "")
    if element is None or not missing.any():
        return found, None
    taken = {file for of_row in found for file in of_row}
    by_value = files_by_element(root, [file for file in files if file not in taken], element)
    found = found.mask(missing, texts.map(lambda text: by_value.get(text, [])))
    count = int((missing & (found.map(len) > 0)).sum())
    if count == 0:
        return found, None
    return found, f"{count_of(count, 'row')} found by {element} in the headers of the DICOM files"


def _why_left_out(rows: pd.DataFrame, found: pd.Series, labels: Labels, split: pd.Series) -> pd.Series:
    """Return why each row is left out (N,), by one of `KINDS`; "" where it is not."""
    left_out, matches = pd.Series("", rows.index), found.map(len)
    left_out[matches == 0], left_out[matches > 1], left_out[rows.path == ""] = NO_FILE, SEVERAL, NO_NAME
    left_out = left_out.mask((left_out == "") & (labels.left_out != ""), labels.left_out)
    return left_out.mask((left_out == "") & split.isna(), OTHER_SPLIT)


def _check_rows_left(rows: pd.DataFrame, left_out: pd.Series, headers: Mapping[str, str], source: Source) -> None:
    if (left_out == "").any():
        return
    reason = left_out.value_counts().index[0]
    role = ROLE_OF.get(reason, "label")
    texts = rows[role][left_out == reason]
    examples = ", ".join(
        shown(text) for text in texts[texts != ""].value_counts().index[: SHOWN if role != "path" else 1]
    )
    named_by = f'name the column by column="{role}=HEADER"'
    advice = {
        NO_NAME: named_by,
        EMPTY: named_by,
        UNCERTAIN: named_by,
        UNKNOWN: f"the model has {', '.join(source.naming.classes or ())}; write these, or {named_by}",
        OTHER_SPLIT: "write train, val or test",
    }.get(reason, f"looked for in {source.root}; give the folder by images=, or {named_by}")
    in_column = f"(column {shown(headers[role])}){examples and f', such as {examples}'}"
    raise UserError(
        f"none of its {count_of(len(rows), 'row')} can be used; most have {reason} {in_column}; {advice}",
        option="data",
        value=source.name,
    )


def _one_row_a_file(table: pd.DataFrame, source: Source) -> tuple[pd.DataFrame, list[Fault]]:
    """Leave out files in rows that contradict each other, and rows that repeat one.

    Raises:
        UserError: no file is left.
    """
    conflict = (table.groupby("file")[["label", "split"]].transform("nunique") > 1).any(axis=1)
    twice = table.duplicated("file") & ~conflict
    kept = table[~(conflict | twice)]
    if kept.empty:
        raise UserError("each file has different labels; give a row an image", option="data", value=source.name)
    return kept, [
        *_fault("conflict", table.file[conflict].unique(), "in rows with different labels or splits"),
        *_fault("repeated", table.file[twice].unique(), "in several rows, of which the first counts"),
    ]


def _left_out(rows: pd.DataFrame, left_out: pd.Series) -> list[Fault]:
    """Return a fault for each reason; its examples are what is wrong: the names of files, or labels, or splits."""
    faults = []
    for reason, of_reason in rows[left_out != ""].groupby(left_out[left_out != ""]):
        wrong = of_reason[{UNKNOWN: "label", OTHER_SPLIT: "split"}.get(reason, "path")]
        text = f"{count_of(len(of_reason), 'row')} with {reason}"
        faults.append(
            Fault(KINDS[reason], text, [text for text in wrong.unique() if text][:SHOWN], list(of_reason.path))
        )
    return faults


def _fault(kind: str, files: Iterable[str], text: str) -> list[Fault]:
    names = list(files)
    return [Fault(kind, f"{count_of(len(names), 'file')} {text}", names[:SHOWN], names)] if names else []


def _in_two_splits(table: pd.DataFrame) -> list[Fault]:
    """Find the patients of the table's own column with images in two splits; the examples are files of theirs."""
    known = table[table.patient != ""]
    shared = known[known.groupby("patient").split.transform("nunique") > 1]
    if shared.empty:
        return []
    text, files = f"{count_of(shared.patient.nunique(), 'patient')} in two splits", list(shared.file)
    return [Fault("patient-in-two-splits", text, files[:SHOWN], files)]
