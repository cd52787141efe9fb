"""Checks the texts that options of `fit` may have: each function returns what the user has to do, or None.

`FitConfig` names them as the checks of its fields.
"""

import math
import re

from xray_fastai.config.choices import TOOLS
from xray_fastai.system.text import seconds_of

VALID_GROUP = "group:"
"""The beginning of `valid` that holds out a whole group of a table."""
COLUMN_PARTS = re.compile(r",(?=\s*\w+\s*=)")
"""Separates the columns in `column`; a header may hold a comma."""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def check_valid(text: str) -> str | None:
    fraction = _number(text)
    if text.startswith(VALID_GROUP) and text != VALID_GROUP:
        return None
    if text in ("auto", "folder") or (fraction is not None and 0.02 <= fraction <= 0.5):
        return None
    return "give auto, folder, a fraction from 0.02 to 0.5, or group:NAME"


def check_column(text: str) -> str | None:
    parts = COLUMN_PARTS.split(text)
    if all(re.fullmatch(r"\s*\w+\s*=\s*\S.*", part, re.DOTALL) for part in parts):
        return None
    return "give NAME=HEADER, as in label=Finding"


def range_of(text: str | None) -> tuple[float, float] | None:
    """Return the two numbers of `weights_range`: what black and white are. None if it is None or not two numbers."""
    parts = (text or "").split(",")
    numbers = [n for part in parts if (n := _number(part)) is not None and math.isfinite(n)]
    if len(parts) == len(numbers) == 2 and numbers[0] != numbers[1]:
        return numbers[0], numbers[1]
    return None


def check_weights_range(text: str) -> str | None:
    return None if range_of(text) else "give two different numbers, such as 0,1 or -1024,1024"


def check_class_weights(text: str) -> str | None:
    if text in ("balanced", "none"):
        return None
    parts = text.split(":" if ":" in text else ",")
    named = all("=" in part for part in parts)
    weights = [_number(part.rpartition("=")[2] if named else part) for part in parts]
    if all(w is not None and 0 < w < math.inf for w in weights) and (len(parts) == 2 or ":" not in text):
        return None
    return "give balanced, none, or numbers above 0 such as NORMAL=3,PNEUMONIA=1"


def check_patient_pattern(text: str) -> str | None:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return f"not a regular expression: {error}"
    return None


def check_log(text: str) -> str | None:
    names = [name.strip() for name in text.split(",")]
    if set(names) <= set(TOOLS) and len(names) == len(set(names)):
        return None
    return f"give one or more of {', '.join(TOOLS)}, with a comma between"


def check_time_limit(text: str) -> str | None:
    return None if seconds_of(text) else "give a time such as 90s, 30m, 2h, 1h30m, or a number of seconds"


WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names of devices, with any extension, that no file or folder can have on Windows."""


def check_name(text: str) -> str | None:
    if WINDOWS_DEVICE.fullmatch(text) or text.endswith("."):
        return "no folder can have this name on Windows; give another"
    if re.fullmatch(r"[^\W_][\w.-]*", text):
        return None
    return "use letters, digits, '.', '_' and '-'; begin with a letter or a digit"
