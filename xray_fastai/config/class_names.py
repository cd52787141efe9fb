"""Says which names classes may have, and the word for an image without a class."""

import re
from collections.abc import Sequence

from xray_fastai.system.errors import UserError
from xray_fastai.system.text import fault_of, shown

MAX_CLASSES = 1000
UNCERTAIN = "uncertain"
"""The prediction of an image whose call is withheld."""
INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u2060-\u2064\ufeff]|^[\u200c\u200d]|[\u200c\u200d]$")
"""Characters that make two names of one look. Persian and Indian scripts need U+200C and U+200D between letters."""


def class_fault(name: str) -> str | None:
    """Return why a folder's name cannot be a class, which tables and exports print; None if it can."""
    if not name or "/" in name:
        return "is empty, or holds a slash"
    if match := INVISIBLE.search(name):
        return f"holds the invisible character {match.group()!a}"
    return fault_of(name, 255)


def check_classes(classes: Sequence[str]) -> None:
    """Check the classes of a data set.

    Raises:
        UserError: there are too many classes, an export cannot hold the name of one, or one is named `uncertain`.
    """
    if len(classes) > MAX_CLASSES:
        raise UserError(f"{len(classes):,} classes; the maximum is {MAX_CLASSES:,}", option="data")
    for name in classes:
        if fault := class_fault(name):
            raise UserError(f"the class folder {shown(name)} {fault}; rename it", option="data")
        if name == UNCERTAIN:
            raise UserError(
                f"the class folder {name} has the word for an image that is not called; rename it", option="data"
            )
