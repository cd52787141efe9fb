"""Find the patient of each image: by the user's list or regular expression, by PatientID in DICOM files, or by the file
names of a public collection.

A PatientID and a patient of the user's list are neither stored nor shown. Such patients get numbers, in the order of
their first files.

A regular expression may come with a model from others, and one such as `(a+)+b` needs years for a name of forty
letters. A separate process therefore compiles and matches it, and can be stopped.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from xray_fastai.data.dicom.reader import patient_key
from xray_fastai.data.file_lists import named, read_rows
from xray_fastai.system.errors import UserError
from xray_fastai.system.parallel import map_in_threads
from xray_fastai.system.text import shown

_START = r"(?<![^\W_])"  # nothing, or what is no letter or digit: a copy may be named `copy_person1_virus_6.jpeg`
PUBLISHED = {
    name: re.compile(_START + pattern, re.IGNORECASE)
    for name, pattern in {
        "Kaggle's copy of the Kermany collection": r"(?:(person\d+)_|((?:NORMAL2-)?IM-\d+)-)",
        "the Kermany collection (Mendeley Data)": r"(?:BACTERIA|NORMAL|VIRUS)-(\d+)-\d+(?!\d)",
        "NIH ChestX-ray14": r"(?<!\d[_ -])(000[0-3]\d{4})_\d{3}(?!\d)",
        "CheXpert": r"(patient\d{5})[/_-]study\d",
        "MIMIC-CXR": r"(p1\d{7})[/_-]s5\d{7}(?!\d)",
    }.items()
}
"""The published collections whose file names hold the patient, each with an expression for the path of a file.

    person1000_bacteria_2931.jpeg, IM-0115-0001.jpeg, NORMAL2-IM-0345-0001.jpeg    (or the study)
    BACTERIA-1008087-0001.jpeg, VIRUS-1980593-0001.jpeg, NORMAL-28501-0001.jpeg
    00000001_000.png                                       (patients 1 to 30805)
    patient00001/study1/view1_frontal.jpg
    p10/p10000032/s50414267/02aa804e-….jpg

The first is matched first. Names of the RSNA and VinDr collections hold no patient. Whether one number with two causes,
as `person1000_bacteria` and `person1000_virus`, is one child is not documented; it counts as one.
"""

CAUSE = re.compile(r"(?:^|[_-])(bacteria|virus)(?:[_-]|\.|$)", re.IGNORECASE)
"""The cause of the pneumonia in the Kermany collection's file names, such as `person1000_bacteria_2931.jpeg`."""

_NUMBERED = {"\2": "DICOM #", "\1": "listed #", "\3": "patient #"}
"""The beginning of a patient known by PatientID, by the user's list and by the column of a table, before and after
`numbered`. No file name begins with one of the first. It is not \\0: pandas 2 compares texts up to that, so all
patients would be one."""

ADVICE = "give --patient-pattern or --patients"
"""What to do where file names hold patients that are not found."""

SECONDS = 20
"""Time limit for all names together. A harmless expression takes 0.2 s for 100,000 names."""

_MATCH = """
import json, re, sys
pattern, names = json.load(sys.stdin)
found = [re.search(pattern, name) for name in names]
json.dump([m and next((group for group in m.groups() if group), m.group()) for m in found], sys.stdout)
"""


@dataclass(frozen=True)
class PatientRule:
    """Says how the user finds patients. Without either, `patients_in` does it alone."""

    pattern: str | None = None  # regular expression for file names
    listed: Mapping[str, str] = field(default_factory=dict)  # the patient by file, as `file_lists.named` spells it
    in_table: Mapping[str, str] = field(default_factory=dict)  # the same, of the column of a table


ANY = PatientRule()


def patient_rule(pattern: str | None, path: str | None) -> PatientRule:
    """Read the user's list of patients: a .csv file with the columns `file` and `patient`.

    Raises:
        UserError: see `file_lists.read_rows`.
    """
    if path is None:
        return PatientRule(pattern)
    rows = read_rows(path, "patient", "patients", "give a list such as train/NORMAL/1.jpeg,7")
    return PatientRule(pattern, {file: patient for file, patient, _ in rows if patient})


def published_patient(file: str) -> str | None:
    """Return the patient in a path that is named as in a public collection (`PUBLISHED`), in one spelling; or None."""
    for pattern in PUBLISHED.values():
        if match := pattern.search(file):
            patient = next(filter(None, match.groups()))
            return patient.lower() if patient[0] in "Pp" else patient.upper()
    return None


def patients_of(names: Sequence[str], pattern: str) -> list[str | None]:
    """Find the patients in names: the pattern's first matching group, or the whole match, or None.

    Raises:
        UserError: the pattern takes more than `SECONDS`, or is not a regular expression.
    """
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _MATCH]
    try:
        process = subprocess.run(
            command, input=json.dumps([pattern, list(names)]), capture_output=True, text=True,
            errors="backslashreplace", timeout=SECONDS,  # of a message, in whatever encoding; the rest is ASCII
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(
            f"takes more than {SECONDS:g} s on the file names, as nested repeats such as (a+)+ do; fit with a "
            "simpler one by patient_pattern=",
            value=f"patient pattern {shown(pattern)}",
        ) from None
    if process.returncode:
        reason = shown((process.stderr.strip().splitlines() or ["no message"])[-1], 120)
        raise UserError(
            f"not usable as a regular expression ({reason}); fit with another by patient_pattern=",
            value=f"patient pattern {shown(pattern)}",
        )
    return json.loads(process.stdout)


def _by_pattern(table: pd.DataFrame, pattern: str) -> list[str | None]:
    """Match the file names; where that finds nothing, the paths below the class folders, as in `patient7/front.png`."""
    names = [Path(file).name for file in table.file]
    depth = [(split != "") + (label != "") for split, label in zip(table.split, table.label, strict=True)]
    paths = [file.split("/", folders)[-1] for file, folders in zip(table.file, depth, strict=True)]
    found = patients_of([*names, *paths], pattern)
    return [name or path for name, path in zip(found[: len(table)], found[len(table) :], strict=True)]


def patients_in(table: pd.DataFrame, rule: PatientRule) -> list[str]:
    """Find the patient of each image; call `numbered` afterwards. An image without one is a patient of its own.

    The user's list has priority, then a match of the user's pattern, then the column of a table: some programs that
    anonymise DICOM files give all of them one PatientID. PatientID has priority over the names of public collections.

    Args:
        table: has the columns `path`, `file`, `split` and `label`.
        rule: the user's list and pattern.

    Raises:
        UserError: see `patients_of`.
    """
    names = list(map(named, table.file))
    by_list = [(patient := rule.listed.get(name)) and f"\1{patient}" for name in names]
    by_pattern = [None] * len(table) if rule.pattern is None else _by_pattern(table, rule.pattern)
    in_table = [(patient := rule.in_table.get(name)) and f"\3{patient}" for name in names]
    found = [
        of_list or of_pattern or of_table
        for of_list, of_pattern, of_table in zip(by_list, by_pattern, in_table, strict=True)
    ]
    headers = map_in_threads(
        patient_key, [path for path, patient in zip(table.path, found, strict=True) if not patient]
    )
    found = [patient or ((key := next(headers)) and f"\2{key}") for patient in found]
    by_name = map(published_patient, table.file) if rule.pattern is None else by_pattern
    return [next(filter(None, patients)) for patients in zip(found, by_name, table.file, strict=True)]


def numbered(table: pd.DataFrame) -> pd.DataFrame:
    """Return a copy in which patients known by PatientID are named DICOM #1, DICOM #2, ... in the order of rows.

    Patients of the user's list are named listed #1, listed #2, ...
    """
    patient = table.patient
    for mark, name in _NUMBERED.items():
        keys = patient.str.startswith(mark)
        numbers = pd.factorize(patient[keys])[0] + 1
        patient = patient.mask(keys, pd.Series(numbers, patient.index[keys]).map(f"{name}{{}}".format))
    return table.assign(patient=patient)


def source_of(patient: str) -> str:
    """Return how a patient in a table that was `numbered` is known: by PatientID, a list, a column, or the names."""
    if patient.startswith(_NUMBERED["\3"]):
        return "the patient column"
    if patient.startswith(_NUMBERED["\2"]):
        return "PatientID"
    return "--patients" if patient.startswith(_NUMBERED["\1"]) else "the file names"


def check_listed(table: pd.DataFrame, path: str | None) -> None:
    """Check that the user's list names an image.

    Args:
        table: after `numbered`.
        path: the list; None checks nothing.

    Raises:
        UserError: it names none.
    """
    if path is not None and not (table.patient.map(source_of) == "--patients").any():
        raise UserError(
            f"names none of the images; name them as in {shown(table.file.iloc[0])}", option="patients", value=path
        )


def unknown(table: pd.DataFrame) -> pd.Series:
    """Return for each image whether its patient is unknown (N,)."""
    return table.patient == table.file


def images_by_source(table: pd.DataFrame) -> dict[str, int]:
    """Return how many images have a patient known by PatientID, by a list, or by the file names.

    Args:
        table: after `numbered`. An image whose patient is unknown is not counted.
    """
    sources = table.patient[~unknown(table)].map(source_of).replace("--patients", "the list of patients")
    return {source: int(count) for source, count in sources.value_counts().items()}


def note_on(table: pd.DataFrame) -> str | None:
    """Return a line about the images whose patient is unknown; None if there are none."""
    missing = int(unknown(table).sum())
    if missing == len(table):
        return f"no patient is known: each image counts as a patient of its own ({ADVICE})"
    if missing:
        return f"no patient is known of {missing:,} of {len(table):,} images: each counts as a patient of its own"
    return None
