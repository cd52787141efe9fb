"""Find the columns of a table of images by their names, or as the user names them."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import pandas as pd

from xray_fastai.config.checks import COLUMN_PARTS, check_column
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import shown

Column: TypeAlias = str | Sequence[str] | Mapping[str, str] | None
"""The headers of columns by what they hold: {"label": "Finding"}, "label=Finding,patient=PatientID", or a list."""
ROLES = {
    "path": (
        "path", "image path", "file path", "file", "file name", "image", "image name", "image file", "image index",
        "image id", "dicom id", "sop instance uid", "accession", "accession number", "series instance uid",
        "study instance uid",
    ),
    "label": (
        "label", "labels", "finding", "findings", "finding label", "finding labels", "class", "class name", "diagnosis",
        "target",
    ),
    "split": ("split", "is valid", "subset"),
    "patient": ("patient", "patient id", "subject", "subject id"),
}  # fmt: skip
"""What the columns may be named, in any capitals, with spaces, underscores or dashes; of several, the first counts."""
GROUP = "group:"
"""The beginning of a column that `column="group=Hospital"` keeps: here `group:group`."""


def columns_of(column: Column) -> dict[str, str]:
    """Return the headers that the user gave, by what they hold.

    Raises:
        UserError: the text is not NAME=HEADER,NAME=HEADER.
    """
    if not column or isinstance(column, Mapping):
        return dict(column or {})
    column = column if isinstance(column, str) else ",".join(column)
    if advice := check_column(column):
        raise UserError(advice, option="column", value=column)
    parts = [part.partition("=") for part in COLUMN_PARTS.split(column)]
    return {name.strip().lower(): header.strip() for name, _, header in parts}


def plain_name(header: object) -> str:
    """Return a header in small letters, without what separates its words: ImageIndex, image_index and Image Index."""
    return re.sub(r"[\W_]+", "", str(header).lower())


def headers_of(frame: pd.DataFrame, column: Column, name: str) -> dict[str, str]:
    """Return the headers by role: those of `ROLES` that are there, and those that the user named.

    Args:
        frame: the table.
        column: the headers that the user named.
        name: of the table, for errors.

    Raises:
        UserError: a header that the user named, the path or the label is missing, or two columns have one header.
    """
    listed = ", ".join(shown(header, 30) for header in list(frame.columns)[:12])
    plain: dict[str, str] = {}
    for header in frame.columns:
        plain.setdefault(plain_name(header), header)
    headers = {}
    for role, names in ROLES.items():
        if found := [plain[name.replace(" ", "")] for name in names if name.replace(" ", "") in plain]:
            headers[role] = found[0]
    for role, wanted in columns_of(column).items():
        if wanted not in frame.columns and plain_name(wanted) not in plain:
            raise UserError(f"no column {shown(wanted)} in {name}; it has {listed}", option="column")
        headers[role] = wanted if wanted in frame.columns else plain[plain_name(wanted)]
    for role in ("path", "label"):
        if role not in headers:
            raise UserError(
                f'no column for the {role} is found; name it, as in column="{role}=HEADER" (the table has {listed})',
                option="data",
                value=name,
            )
    for role, header in headers.items():
        if isinstance(frame[header], pd.DataFrame):
            raise UserError(f"two columns {shown(header)}, for the {role}; rename one", option="data", value=name)
    return headers


def note_on_columns(headers: Mapping[str, str]) -> str | None:
    """Return a line on the columns whose header is not what they hold, and those that are kept; None: there are none.

    >>> note_on_columns({"path": "path", "label": "Finding", "sex": "sex", "site": "Hospital"})
    'columns: label Finding; kept: sex, site Hospital'
    """
    read_as = {
        role: role if str(header).lower() == role else f"{role} {shown(header)}" for role, header in headers.items()
    }
    others = [text for role, text in read_as.items() if role in ROLES and text != role]
    kept = [text for role, text in read_as.items() if role not in ROLES]
    parts = [others and f"columns: {', '.join(others)}", kept and f"kept: {', '.join(kept)}"]
    return "; ".join(filter(None, parts)) or None
