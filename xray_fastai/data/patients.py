"""Find the patient of each image: by PatientID in DICOM files, by the Kaggle collection's file names, or by the user's
regular expression.

A PatientID is neither stored nor shown. Patients known by PatientID get numbers, in the order of their first files.

A regular expression may come with a model from others, and one such as `(a+)+b` needs years for a name of forty
letters. A separate process therefore compiles and matches it, and can be stopped.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from xray_fastai.data.dicom.reader import patient_key
from xray_fastai.system.errors import UserError
from xray_fastai.system.parallel import map_in_threads
from xray_fastai.system.text import shown

KAGGLE_PATIENT = re.compile(r"^(?:(person\d+)_|((?:NORMAL2-)?IM-\d+)-)")
"""In `person1000_bacteria_2931`, `IM-0115-0001` and `NORMAL2-IM-0345-0001` the patient, or the study, comes first."""

CAUSE = re.compile(r"(?:^|[_-])(bacteria|virus)(?:[_-]|\.|$)", re.IGNORECASE)
"""The cause of the pneumonia in the Kaggle collection's file names, such as `person1000_bacteria_2931.jpeg`."""

_KEY, _NUMBER = "\0", "DICOM #"
"""The prefix of a patient known by PatientID, before and after `numbered`. No file name holds the first."""

SECONDS = 20
"""Time limit for all names together. A harmless expression takes 0.2 s for 100,000 names."""

_MATCH = """
import json, re, sys
pattern, names = json.load(sys.stdin)
found = [re.search(pattern, name) for name in names]
json.dump([m and next((group for group in m.groups() if group), m.group()) for m in found], sys.stdout)
"""


def patient_of(name: str, pattern: re.Pattern = KAGGLE_PATIENT) -> str | None:
    """Return the patient in a file name: the pattern's first matching group, or the whole match, or None."""
    match = pattern.search(name)
    return match and next((group for group in match.groups() if group), match.group())


def patients_of(names: Sequence[str], pattern: str | None = None) -> list[str | None]:
    """Apply `patient_of` to many file names.

    Args:
        names: file names without folders.
        pattern: regular expression; None is the one for the Kaggle collection's names.

    Raises:
        UserError: the pattern takes more than `SECONDS`, or is not a regular expression.
    """
    if pattern is None:
        return [patient_of(name) for name in names]
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _MATCH]
    try:
        process = subprocess.run(
            command, input=json.dumps([pattern, list(names)]), capture_output=True, text=True,
            errors="backslashreplace", timeout=SECONDS,  # of a message, in whatever encoding; the rest is ASCII
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(
            f"takes more than {SECONDS:g} s on the file names, as nested repeats such as (a+)+ do; fit with a "
            "simpler one by --patient-pattern",
            value=f"patient pattern {shown(pattern)}",
        ) from None
    if process.returncode:
        reason = shown((process.stderr.strip().splitlines() or ["no message"])[-1], 120)
        raise UserError(
            f"not usable as a regular expression ({reason}); fit with another by --patient-pattern",
            value=f"patient pattern {shown(pattern)}",
        )
    return json.loads(process.stdout)


def patients_in(table: pd.DataFrame, pattern: str | None = None) -> list[str]:
    """Find the patient of each image; call `numbered` afterwards. An image without one is a patient of its own.

    A match of the user's pattern has priority over PatientID, because some programs that anonymise DICOM files give all
    of them one PatientID. PatientID has priority over the Kaggle names.

    Args:
        table: has the columns `path` and `file`.
        pattern: regular expression for file names; None is the one for the Kaggle collection's names.

    Raises:
        UserError: see `patients_of`.
    """
    by_name = patients_of([Path(file).name for file in table.file], pattern)
    by_header = [key and f"{_KEY}{key}" for key in map_in_threads(patient_key, table.path)]
    first, second = (by_header, by_name) if pattern is None else (by_name, by_header)
    return [a or b or file for a, b, file in zip(first, second, table.file, strict=True)]


def numbered(table: pd.DataFrame) -> pd.DataFrame:
    """Return a copy in which patients known by PatientID are named DICOM #1, DICOM #2, ... in the order of rows."""
    keys = table.patient.str.startswith(_KEY)
    numbers = pd.factorize(table.patient[keys])[0] + 1
    return table.assign(
        patient=table.patient.mask(keys, pd.Series(numbers, table.index[keys]).map(f"{_NUMBER}{{}}".format))
    )


def is_numbered(patient: str) -> bool:
    """Return whether a patient is known by PatientID."""
    return patient.startswith(_NUMBER)
