"""Divide images into training and test by patient or another column: as a table with a column `split`, or as folders.

OUT.csv     path,label,split,patient,...      or      OUT/{train,test}/CLASS/*
OUT.json    the seed, and what was divided            OUT/split.json, OUT/patients.csv
"""

import json
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from xray_fastai import __version__
from xray_fastai.config.class_names import check_classes
from xray_fastai.data.dataset import check_files
from xray_fastai.data.folders import class_folders, find_root, read_split, split_folder, split_of
from xray_fastai.data.patients import ANY, PatientRule, note_on, numbered, unknown
from xray_fastai.data.splits import hold_out, patient_groups
from xray_fastai.data.table import Source, is_table, read_table, with_patients
from xray_fastai.data.table_columns import GROUP
from xray_fastai.system.errors import UserError
from xray_fastai.system.files import atomic_write, check_new
from xray_fastai.system.text import count_of

FORMS = ("table", "links", "copies")
PATIENT = "patient"


@dataclass(frozen=True)
class Wanted:
    """Says how images are divided."""

    test: float = 0.2  # the share of the images for testing
    by: str = (
        PATIENT  # what stays on one side: patient, or the name of a column that `column=` keeps (with its patients)
    )
    seed: int = 42
    form: str = "table"  # of `FORMS`: a .csv file, a folder of links, or a folder of copies

    def __post_init__(self) -> None:
        if not 0.02 <= self.test <= 0.5:
            raise UserError("give a fraction from 0.02 to 0.5", option="test", value=f"{self.test:g}")
        if self.form not in FORMS:
            raise UserError(f"choose one of {', '.join(FORMS)}", option="form", value=self.form)


@dataclass(frozen=True)
class Division:
    """The result of `split_data`; `print(division)` says what went where."""

    path: Path
    root: Path  # the files of the table are relative to it
    table: pd.DataFrame  # path, file, label, split, patient, group:*
    wanted: Wanted
    notes: list[str]

    @property
    def next_command(self) -> list[str]:
        """Return the arguments of the fit to the result."""
        command = ["fit", "--data", str(self.path)]
        if self.wanted.form == "table":
            columns = [f"{name.removeprefix(GROUP)}={name.removeprefix(GROUP)}" for name in _groups(self.table)]
            return [*command, "--images", str(self.root), *(word for text in columns for word in ("--column", text))]
        return command if unknown(self.table).all() else [*command, "--patients", str(self.path / "patients.csv")]

    def __str__(self) -> str:
        lines = [f"{split:<10}{_described(rows)}" for split, rows in self.table.groupby("split", sort=False)]
        return "\n".join([*lines, *(f"{'':10}{note}" for note in self.notes), f"{'written':<10}{self.path}"])


def split_data(source: Source, out: str | Path, wanted: Wanted = Wanted(), rule: PatientRule = ANY) -> Division:
    """Divide images into training and test, stratified by class; no patient, and no copy of an image, is in both.

    Args:
        source: a table of images, or a folder: of classes, or with train/ and val/, which are divided anew together.
        out: a new .csv file, or a new folder for links or copies.
        wanted: how they are divided.
        rule: the user's list and pattern of patients.

    Raises:
        UserError: `out` exists, there are no such images, there is a test split already, or too few patients or groups.
    """
    out = _new(out, wanted.form)
    table, root, notes = _listed_table(source, rule) if is_table(source.table) else _listed_folders(source, rule)
    _check_by(table, wanted.by)
    check_classes(sorted(table.label.unique()))
    if table.label.nunique() < 2:
        raise UserError(
            f"one class only ({table.label.iloc[0]}); two or more are needed", option="data", value=source.name
        )
    table, errors = check_files(table.assign(split="train"), skip_bad=True)
    if errors:
        notes.append(f"left out, as they cannot be read: {count_of(len(errors), 'image')}, such as {errors[0]}")
    notes += filter(None, [note_on(table)])
    held_out = hold_out(_held_together(table, wanted.by), wanted.test, wanted.seed, "test")
    if not 0.5 <= held_out.mean() / wanted.test <= 2:
        notes.append(f"{held_out.mean():.0%} for testing instead of {wanted.test:.0%}: a {wanted.by} stays on one side")
    table["split"] = ["test" if of_test else "train" for of_test in held_out]
    table = table.sort_values(["split", "label", "file"], ascending=[False, True, True])  # train before test
    division = Division(out, root, table.reset_index(drop=True), wanted, notes)
    record = _record(source.name, division)
    try:
        if wanted.form == "table":
            _write_table(division, record)
        else:
            _write_folders(division, record)
    except OSError as error:
        advice = "give another place" if wanted.form != "links" else "give another place, or copy=True"
        raise UserError(f"cannot be written ({error.strerror}); {advice}", option="out", value=out) from None
    return division


def _new(out: str | Path, form: str) -> Path:
    path = Path(os.path.expanduser(out))
    if (path.suffix.lower() == ".csv") != (form == "table"):
        message = "give a new .csv file, or links=True for a folder" if form == "table" else "give a folder's name"
        raise UserError(message, option="out", value=path)
    check_new(path, "out")
    return path


def _listed_table(source: Source, rule: PatientRule) -> tuple[pd.DataFrame, Path, list[str]]:
    listing = read_table(source)
    if (listing.table.split == "test").any():
        raise UserError("has rows of split test already", option="data", value=source.name)
    return with_patients(listing.table, listing, rule), source.root, [*listing.summary, *listing.examples]


def _listed_folders(source: Source, rule: PatientRule) -> tuple[pd.DataFrame, Path, list[str]]:
    folder = Path(os.path.expanduser(str(source.table)))
    if folder.is_dir() and not any(split_of(entry.name) for entry in class_folders(folder)):
        inner = folder / "chest_xray"
        if not inner.is_dir():
            folder = folder.resolve()
            return numbered(read_split(folder.parent, folder.name, rule=rule)), folder.parent, []
    root = find_root(folder)
    if split_folder(root, "test") is not None:
        raise UserError("has a test split already", option="data", value=root)
    splits = [split for split in ("train", "val") if split_folder(root, split) is not None]
    parts = [read_split(root, split, rule=rule) for split in splits]
    notes = ["train/ and val/ are divided anew together"] if len(parts) > 1 else []
    return numbered(pd.concat(parts, ignore_index=True)), root, notes


def _check_by(table: pd.DataFrame, by: str) -> None:
    kept = [PATIENT, *(name.removeprefix(GROUP) for name in _groups(table))]
    if by not in kept:
        advice = f'give {" or ".join(kept)}, or keep this column of a table by column="{by}=HEADER"'
        raise UserError(f"no such column is kept; {advice}", option="by", value=by)


def _held_together(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Return the table with the patients that `splits.hold_out` keeps on one side: where by a column, its values."""
    if by == PATIENT:
        return table
    return table.assign(patient=table[f"{GROUP}{by}"], image=patient_groups(table))


def _groups(table: pd.DataFrame) -> list[str]:
    return [name for name in table if name.startswith(GROUP)]


def _described(rows: pd.DataFrame) -> str:
    counts = ", ".join(f"{count:,} {label}" for label, count in rows.label.value_counts().sort_index().items())
    return f"{count_of(len(rows), 'image')} of {count_of(rows.patient.nunique(), 'patient')}: {counts}"


def _record(name: str, division: Division) -> dict[str, Any]:
    """Return what repeats the division."""
    wanted, parts = division.wanted, division.table.groupby("split", sort=False)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "source": name,
        "seed": wanted.seed,
        "test": wanted.test,
        "by": wanted.by,
        "images": {split: rows.label.value_counts().sort_index().to_dict() for split, rows in parts},
        "patients": {split: int(rows.patient.nunique()) for split, rows in parts},
        "notes": division.notes,
    }


def _known_patients(table: pd.DataFrame) -> pd.Series:
    return table.patient.mask(unknown(table), "")


def _write_table(division: Division, record: dict[str, Any]) -> None:
    table = division.table
    columns = {"path": table.file, "label": table.label, "split": table.split, "patient": _known_patients(table)}
    columns |= {name.removeprefix(GROUP): table[name] for name in _groups(table)}
    with atomic_write(division.path) as partial:
        pd.DataFrame(columns).to_csv(partial, index=False)
    division.path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _write_folders(division: Division, record: dict[str, Any]) -> None:
    """Link or copy the files into a folder that gets its name when it is complete."""
    partial = division.path.with_name(f".{division.path.name}.partial")
    partial.mkdir(parents=True)
    try:
        files = []
        for row in division.table.itertuples():
            file = Path(row.split, row.label, _below_class(row.file, row.label))
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            if division.wanted.form == "links":
                os.symlink(os.path.realpath(row.path), partial / file)
            else:
                shutil.copyfile(row.path, partial / file)
            files.append(file.as_posix())
        listed = pd.DataFrame({"file": files, "patient": _known_patients(division.table)})
        listed[listed.patient != ""].to_csv(partial / "patients.csv", index=False)
        (partial / "split.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.rename(division.path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _below_class(file: str, label: str) -> str:
    """Return a file's path below its class folder: without the first two folders, if the second is the class."""
    parts = file.split("/")
    return "/".join(parts[2:] if len(parts) > 2 and parts[1] == label else parts)
