"""Reads `model.json`, and checks it before other code does; completes what earlier versions wrote.

The memory is limited for any file: by its size, by its number of objects and lists, and by the entries of each table.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xray_fastai.export.layout import FORMAT, SETTINGS
from xray_fastai.export.schema import Export
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import shown
from xray_fastai.system.untrusted import read_received

LIMIT = 8_000_000
"""The largest accepted file, in bytes. A fit of 750,000 images takes as much: 8 bytes for the content of each, and 23
for the name of each validation file, a tenth of them."""
NODES = 10_000
"""The largest number of objects and lists; a hundred are usual. An empty one takes 2 bytes in the file and 64 in
memory."""


def read_settings(folder: Path) -> dict[str, Any]:
    """Read and check the `model.json` of a folder.

    Raises:
        UserError: the file is missing, unreadable, damaged, or written by a newer version; on one line, with the JSON
            path.
    """
    return parse(read_received(folder, SETTINGS, LIMIT), folder / SETTINGS)[0]


def parse(content: bytes, file: Path) -> tuple[dict[str, Any], list[str]]:
    """Check the bytes of a `model.json`.

    Args:
        content: at most `LIMIT` bytes.
        file: its name for errors.

    Returns:
        The settings as they stand in the file, and the paths of the keys that this version does not know. Missing
        `calibrated` and `calibration_kind` are filled in.

    Raises:
        UserError: as `read_settings`.
    """
    nodes = content.count(b"{") + content.count(b"[")
    if nodes > NODES:
        raise _damaged(file, f"{nodes:,} objects and lists, more than {NODES:,}")
    try:
        text = content.decode("utf-8")
        model = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_number, parse_int=_integer)
    except RecursionError:
        raise _damaged(file, "nested too deeply") from None
    except ValueError as error:
        raise _damaged(file, shown(error, 120)) from None
    version = model.get("format") if isinstance(model, dict) else None
    if type(version) is int and version > FORMAT:
        raise UserError(f"{file}: written by a newer version (format {shown(version)}); update xray-fastai")
    try:
        export = Export.model_validate(model)
    except ValidationError as error:
        raise _damaged(file, _first(error)) from None
    return _completed(model), list(export.unknown())


def _completed(model: dict[str, Any]) -> dict[str, Any]:
    """Add `calibrated` and `calibration_kind` to earlier settings: in 0.1.0 the first words of the note say it."""
    if model.get("calibrated") is None:
        model["calibrated"] = not model["calibration"].startswith("not calibrated")
    if model.get("calibration_kind") is None:
        model["calibration_kind"] = "earlier" if model["calibrated"] else "none"
    return model


def warn(file: Path, unknown: list[str]) -> None:
    """Print a warning on standard error that a newer version may have written the file."""
    if unknown:
        names = ", ".join(shown(name) for name in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        print(
            f"Warning: {file}: {names} unknown to this version and ignored; did a newer xray-fastai write it?",
            file=sys.stderr,
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(duplicate)} appears twice")
    return table


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _integer(text: str) -> int:
    if len(text) > 20:  # more than 64 bits; a float can take up to 309 digits
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _damaged(file: Path, fault: str) -> UserError:
    return UserError(f"{file}: damaged: {fault}; get the export again")


_KINDS = {"model_type": "should be an object", "dict_type": "should be an object", "list_type": "should be a list"}


def _first(error: ValidationError) -> str:
    """Return the first fault as `path: what is wrong (it is VALUE)`."""
    fault = error.errors(include_url=False)[0]
    steps = (f"[{step}]" if isinstance(step, int) else f".{shown(step, 40)}" for step in fault["loc"])
    where = "".join(steps).removeprefix(".")
    text = _KINDS.get(fault["type"]) or re.sub(r"^Value error, ", "", fault["msg"]).removesuffix(".")
    if fault["type"] != "value_error":
        text = text[0].lower() + text[1:]
    simple = fault["type"] != "missing" and not isinstance(fault["input"], (dict, list))
    value = f" (it is {shown(repr(fault['input']), 40)})" if simple else ""
    return shown(f"{where}: {text}{value}" if where else f"{text}{value}", 240)
