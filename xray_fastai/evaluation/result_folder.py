"""Name the folder of an evaluation or interpretation, so that those of two data sets are kept apart."""

import json
import os
import re
from pathlib import Path
from typing import Any

from xray_fastai.data.labelled import Request
from xray_fastai.evaluation.report import FILE_BYTES, WRONG_SHAPE
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import shown
from xray_fastai.system.untrusted import read_received


def result_folder(
    kind: str, export: Path, settings: dict[str, Any], wanted: Request, output: str | Path | None
) -> Path:
    """Return `<kind>-<split>` for the data of the fit, and `<kind>-test-<folder>` for the test images of another.

    Args:
        kind: evaluation or interpretation.
        export: the export's folder.
        settings: the content of its `model.json`.
        wanted: which images.
        output: the folder that the user chose instead of the export. It gets `<kind>-<split>` of any data.
    """
    name = f"{kind}-{wanted.split}"
    if output is not None:
        return Path(output) / name
    if _of_fit(settings, wanted):
        return export / name
    return export / f"{name}-{_plain_name(wanted.name)}"


def replaced_data(folder: Path, file: str, settings: dict[str, Any], wanted: Request) -> str | None:
    """Return a note if `folder` holds, by its `file`, the result of other data, which the new one replaces."""
    if wanted.split != "test":
        return None
    try:
        earlier = json.loads(read_received(folder, file, FILE_BYTES))["data"]
    except (UserError, *WRONG_SHAPE):  # none yet, or not one that names its data
        return None
    names: list[str | None] = [wanted.name]
    if _of_fit(settings, wanted):
        names += [settings["data"]["name"], settings["settings"]["data"]]
    same = isinstance(earlier, str) and _absolute(earlier) in {_absolute(name) for name in names if name is not None}
    return None if same else f"replaces {folder.name} of {shown(earlier, 200)}"


def _of_fit(settings: dict[str, Any], wanted: Request) -> bool:
    """Return whether images are of the data of the fit.

    Those of `valid` and `train` are, wherever the folder lies now: they are found by what the export knows of them.
    """
    fitted = settings["settings"]["data"]
    if wanted.data is None or wanted.split != "test":
        return True
    return fitted is not None and _absolute(fitted) == _absolute(wanted.name)


def _absolute(folder: str | Path) -> Path:
    """Make a path absolute without looking at the disk: an export from others may name any file."""
    return Path(os.path.abspath(os.path.expanduser(folder)))


def _plain_name(folder: str | Path) -> str:
    return re.sub(r"[^\w.-]+", "-", _absolute(folder).name.removesuffix(".csv"))[:60] or "other"
