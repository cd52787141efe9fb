"""Which images are of one patient: by PatientID of DICOM files, by the Kaggle collection's file names, or by a regular
expression of one's own.

A PatientID is neither kept nor shown: patients who are known by it get numbers, in the order of their first files.

A regular expression may come with a model from others, and one such as `(a+)+b` takes longer than a life on a name of
forty letters. So it is compiled and matched in a process of its own, which can be ended.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from xray_fastai.data.dicom.reader import patient_key
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import shown

KAGGLE_PATIENT = re.compile(r"^(?:(person\d+)_|((?:NORMAL2-)?IM-\d+)-)")
"""`person1000_bacteria_2931`, `IM-0115-0001` and `NORMAL2-IM-0345-0001`: the patient, or the study, comes first."""

CAUSE = re.compile(r"(?:^|[_-])(bacteria|virus)(?:[_-]|\.|$)", re.IGNORECASE)
"""`person1000_bacteria_2931.jpeg`: how the Kaggle collection's names hold what caused the pneumonia."""


_KEY, _NUMBER = "\0", "DICOM #"
"""What a patient known by PatientID begins with, before and after they are `numbered`; no file name holds the first."""

SECONDS = 20
"""For all names together; a harmless expression takes 0.2 s for 100,000."""

_MATCH = """
import json, re, sys
pattern, names = json.load(sys.stdin)
found = [re.search(pattern, name) for name in names]
json.dump([m and next((group for group in m.groups() if group), m.group()) for m in found], sys.stdout)
"""


def patient_of(name: str, pattern: re.Pattern = KAGGLE_PATIENT) -> str | None:
    """The patient that a file name holds: the pattern's first group that matched, or all that matched; else None."""
    match = pattern.search(name)
    return match and next((group for group in match.groups() if group), match.group())


def patients_of(names: Sequence[str], pattern: str | None = None) -> list[str | None]:
    """`patient_of` each file name.

    Args:
        names: of the files, without their folders.
        pattern: regular expression; None is the Kaggle names'.

    Raises:
        UserError: it takes more than `SECONDS`, or is not a regular expression.
    """
    if pattern is None:
        return [patient_of(name) for name in names]
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _MATCH]
    told = f"patient pattern {shown(pattern)}"
    try:
        ended = subprocess.run(
            command, input=json.dumps([pattern, list(names)]), capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{told}: takes more than {SECONDS:g} s on the file names, as nested repeats such as (a+)+ do; fit with a "
            "simpler one by --patient-pattern"
        ) from None
    if ended.returncode:
        reason = shown((ended.stderr.strip().splitlines() or ["ended"])[-1], 120)
        raise UserError(f"{told}: of no use as a regular expression ({reason}); fit with another by --patient-pattern")
    return json.loads(ended.stdout)


def patients_in(table: pd.DataFrame, pattern: str | None = None) -> list[str]:
    """The patient of each image, to be `numbered`; an image of which none is known is a patient of its own.

    What a pattern of one's own finds wins over PatientID, which in turn wins over the Kaggle names: some programs that
    take names out of DICOM files give all of them one PatientID.

    Args:
        table: with columns `path` and `file`.
        pattern: regular expression for file names; None is the Kaggle names'.

    Raises:
        UserError: as `patients_of`.
    """
    by_name = patients_of([Path(file).name for file in table.file], pattern)
    with ThreadPoolExecutor() as pool:
        by_header = [key and f"{_KEY}{key}" for key in pool.map(patient_key, table.path)]
    first, second = (by_header, by_name) if pattern is None else (by_name, by_header)
    return [a or b or file for a, b, file in zip(first, second, table.file, strict=True)]


def numbered(table: pd.DataFrame) -> pd.DataFrame:
    """A copy in which patients who are known by PatientID are called DICOM #1 and so on, in the order of the rows."""
    keys = table.patient.str.startswith(_KEY)
    numbers = pd.factorize(table.patient[keys])[0] + 1
    return table.assign(
        patient=table.patient.mask(keys, pd.Series(numbers, table.index[keys]).map(f"{_NUMBER}{{}}".format))
    )


def is_numbered(patient: str) -> bool:
    """Whether a patient is known by PatientID."""
    return patient.startswith(_NUMBER)
