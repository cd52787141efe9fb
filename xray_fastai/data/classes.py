"""Choose the class to detect by the names of the classes."""

import re
import shlex
from collections.abc import Mapping, Sequence

from xray_fastai.system.errors import UserError

NEGATIVES = frozenset(
    (
        "normal",
        "normals",
        "healthy",
        "negative",
        "neg",
        "control",
        "controls",
        "unremarkable",
        "benign",
        "absent",
        "none",
    )
)
"""Words that a name of the class without the disease begins or ends with: `normal chest`, `covid_negative`."""
DENIALS = frozenset(("no", "non", "not", "without"))
"""First words that turn the meaning of a name round: `No Finding`, `not_normal`."""
WHOLE = frozenset(("clear", "nofinding", "nofindings", "nodisease"))
"""Negatives if they are the whole name."""


def is_negative(name: str) -> bool:
    """Return whether a class is named as the absence of a disease usually is.

    >>> [is_negative(name) for name in ("NORMAL", "No Finding", "covid-negative", "ABNORMAL", "not_normal")]
    [True, True, True, False, False]
    """
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)  # NoFinding
    return _is_negative(re.findall(r"[^\W_]+", parted.lower()))


def _is_negative(words: list[str]) -> bool:
    if not words:
        return False
    if words[0] in DENIALS:
        return not _is_negative(words[1:])
    ends = words[-1] in NEGATIVES and not DENIALS & set(words[-2:-1])
    return ends or words[0] in NEGATIVES or (len(words) == 1 and words[0] in WHOLE)


def positive_class(classes: Sequence[str], wanted: str | None = None) -> str | None:
    """Choose the class to detect.

    It is `wanted`, else PNEUMONIA, else the one of two classes that is no usual negative (`is_negative`). If both are,
    or neither, it is the last of them.

    Returns:
        None if there are more than two classes, none is wanted and none is PNEUMONIA.

    Raises:
        UserError: the wanted class does not exist.
    """
    if wanted is not None:
        if wanted not in classes:
            near = next((f"; did you mean {name}?" for name in classes if name.lower() == wanted.lower()), "")
            message = f"no such class; the classes are {', '.join(classes)}{near}"
            raise UserError(message, option="positive", value=wanted)
        return wanted
    for name in classes:
        if name.upper() == "PNEUMONIA":
            return name
    if len(classes) == 2:
        return classes[0] if is_negative(classes[1]) and not is_negative(classes[0]) else classes[1]
    return None


def positive_note(classes: Sequence[str], wanted: str | None = None) -> str | None:
    """Say which class `positive_class` chose and why, and how to choose the other; None if it chose none."""
    positive = positive_class(classes, wanted)
    if positive is None:
        return None
    if wanted is not None or len(classes) > 2:
        return f"to detect: {positive}"
    (other,) = set(classes) - {positive}
    why = ""
    if positive.upper() != "PNEUMONIA" and is_negative(positive) == is_negative(other):
        names = "both names are usual negatives" if is_negative(other) else "neither is a usual negative such as NORMAL"
        why = f", the last by name, as {names}"
    return f"to detect: {positive}{why}; for the other, give --positive {shlex.quote(other)}"


def only_class(called: Mapping[str, int]) -> str | None:
    """Return the class that every image is predicted to have, of the images by class; None if there are several."""
    used = [name for name, count in called.items() if count]
    return used[0] if len(used) == 1 else None
