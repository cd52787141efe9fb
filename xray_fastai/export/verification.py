"""Checks an export file by file before it is loaded, for instance one that came from others."""

import csv
import io
import os
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from xray_fastai.config.choices import network_of
from xray_fastai.export.layout import HISTORY_COLUMNS, OUT_OF_FOLD, SETTINGS, WEIGHTS
from xray_fastai.export.model_json import LIMIT, parse
from xray_fastai.export.reader import path_of
from xray_fastai.export.run_folder import CHECKPOINT, LOG
from xray_fastai.export.weights_file import read_weights
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import count_of, shown
from xray_fastai.system.untrusted import read_received
from xray_fastai.system.zip_files import unpack

if TYPE_CHECKING:
    from fastai.learner import Learner

    from xray_fastai.inference.model import Model

HISTORY, REPORT = "history.csv", "report.html"
HISTORY_BYTES = 5_000_000
UNPACKED = 1_000_000_000
"""The largest size in bytes to which one file of an archive is unpacked."""
PICKLES = (".pkl", ".pickle", ".pth", ".pt", ".ckpt", ".joblib")
REPORT_ADVICE = "'xray-fastai evaluate' writes it again"
KNOWN = ("curves.png", "lr_find.png", "batch.png", OUT_OF_FOLD, CHECKPOINT, LOG)
PICKLE_NOTE = "loading a pickle can run code, so it was not opened. Delete it, unless you made it"


@dataclass(frozen=True)
class Check:
    """Holds the result for one file."""

    file: str
    verdict: str  # ok, note, unsafe or fault
    text: str

    def __str__(self) -> str:
        mark = {"ok": "ok: ", "note": "", "unsafe": "UNSAFE from others: ", "fault": "FAULT: "}[self.verdict]
        return f"{self.file:<19} {mark}{self.text}"


@dataclass
class Verification:
    """Holds the results of `verify`; as text, a table."""

    path: Path
    checks: list[Check] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # keys of model.json that a newer version may have written

    @property
    def faults(self) -> list[str]:
        return [check.text for check in self.checks if check.verdict == "fault"]

    @property
    def ok(self) -> bool:
        """Whether the export is complete and loads without running code from its files."""
        return not self.faults

    def add(self, file: str, verdict: str, text: str) -> None:
        self.checks.append(Check(file, verdict, text))

    def __str__(self) -> str:
        lines = [f"{'export':<19} {self.path}", *map(str, self.checks)]
        if self.ok:
            lines += [
                f"{'verdict':<19} good: {SETTINGS} and {WEIGHTS} are complete, and load without running code.",
                f"{'':<19} This check cannot tell who made the model, nor how accurate it is.",
            ]
        else:
            lines.append(f"{'verdict':<19} BAD: {count_of(len(self.faults), 'fault')}; do not use this export")
        return "\n".join(lines)


def verify(path: "str | Path | Model | Learner") -> Verification:
    """Check an export as `load_learner` does, and list the other files in its folder; nothing is unpickled.

    Args:
        path: an export's folder, or a .zip of one; only the files to check are unpacked, into a temporary folder. For a
            learner that `load_learner` opened, or an open model, the files of its export are checked.

    Returns:
        One check for each file; `ok` if there is no fault.

    Raises:
        UserError: the path does not exist, or is an archive that is not safe to unpack.

    Examples:
        >>> verify("exports/rehearsal").ok
        True
    """
    path = Path(path_of(path))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder; give an export, or a .zip of one") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give an export, or a .zip of one") from None
    if stat.S_ISDIR(mode):
        result = Verification(path)
        _check(result, path, _names(path))
        return result
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: neither a folder nor an archive; give an export, or a .zip of one")
    result = Verification(path)
    with tempfile.TemporaryDirectory(prefix="xray-fastai-") as temporary:
        folder = Path(temporary)
        root, names = unpack(path, folder, (SETTINGS, WEIGHTS, HISTORY), UNPACKED)
        _check(result, folder, names, shown_as=f"{path}:{root}")
    return result


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); change its permissions") from None


def _check(result: Verification, folder: Path, names: list[str], shown_as: str | None = None) -> None:
    """Add a check for each file.

    Args:
        result: gets the checks.
        folder: holds the files to open.
        names: all names in the export; of an archive, most of them are not in `folder`.
        shown_as: the archive's name in messages instead of the temporary folder; None for a folder.
    """

    def attempt(file: str, check: Callable[[], str]) -> None:
        try:
            result.add(file, "ok", check())
        except UserError as error:
            text = str(error) if shown_as is None else str(error).replace(f"{folder}{os.sep}", shown_as)
            result.add(file, "fault", text)

    if SETTINGS not in names or WEIGHTS not in names:
        for file in (SETTINGS, WEIGHTS):
            if file not in names:
                result.add(file, "fault", f"{shown_as or f'{folder}/'}{file}: missing; get the export again")
    else:
        model: dict = {}
        attempt(SETTINGS, lambda: _settings(folder, model, result.unknown))
        if model:
            attempt(WEIGHTS, lambda: _weights(folder, model))
        else:
            result.add(WEIGHTS, "note", f"not checked, because {SETTINGS} does not say for which network it is")
    if HISTORY in names:
        attempt(HISTORY, lambda: _history(folder))
    else:
        result.add(HISTORY, "note", "missing, but not needed to load the model")
    others = [name for name in names if name not in (SETTINGS, WEIGHTS, HISTORY)]
    _other_files(result, folder, others, on_disk=shown_as is None)


def _settings(folder: Path, model: dict, unknown: list[str]) -> str:
    checked, unknown_keys = parse(read_received(folder, SETTINGS, LIMIT), folder / SETTINGS)
    model |= checked
    unknown += unknown_keys
    size = model["preprocessing"]["size"]
    text = f"{network_of(model)}, {size} x {size} px, {len(model['classes'])} classes"
    text += f" ({shown(', '.join(model['classes']))}), {model['status']}"
    if unknown_keys:
        names = ", ".join(shown(key) for key in unknown_keys[:3]) + (", ..." if len(unknown_keys) > 3 else "")
        text += f"; unknown to this version and ignored: {names}"
    return text


def _weights(folder: Path, model: dict) -> str:
    weights = read_weights(folder, WEIGHTS, model)
    size = sum(tensor.nbytes for tensor in weights.values())
    return f"{len(weights)} tensors, {size / 1e6:.1f} MB; SHA-256, names, shapes, types and values are correct"


def _history(folder: Path) -> str:
    file = folder / HISTORY
    content = read_received(folder, HISTORY, HISTORY_BYTES)
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")))
        for number, row in enumerate(rows, start=2):
            if missing := [column for column in HISTORY_COLUMNS if row.get(column) is None]:
                raise UserError(f"{file}: line {number} has no {missing[0]}; get the export again")
            int(row["epoch"])
            for column in HISTORY_COLUMNS[2:]:
                float(row[column] or "nan")  # pandas writes an empty text for NaN
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file}: damaged: {shown(error, 120)}; get the export again") from None
    return count_of(len(rows), "epoch")


def _other_files(result: Verification, folder: Path, names: list[str], on_disk: bool) -> None:
    """Add checks for the files that are not needed to load the model; none of them is opened."""
    others = []
    for name in names:
        if on_disk and (fault := _unsafe_kind(folder, name)):
            result.add(shown(name, 19), "fault", f"{folder / shown(name)}: {fault}")
        elif name.lower().endswith(PICKLES):
            result.add(shown(name, 19), "unsafe", PICKLE_NOTE)
        elif name == REPORT:
            result.add(REPORT, "note", f"a web page, which may hold scripts if others made it; {REPORT_ADVICE}")
        else:
            others.append(name)
    if REPORT not in names:
        result.add(REPORT, "note", f"missing; {REPORT_ADVICE}")
    if others:
        unexpected = [n for n in others if n not in KNOWN and not n.startswith(("evaluation-", "interpretation-"))]
        expected = [name for name in others if name not in unexpected]
        text = ", ".join(shown(name) for name in [*unexpected, *expected][:8])
        text += f" and {len(others) - 8} more" if len(others) > 8 else ""
        text += ": not needed to load the model, not checked"
        if unexpected:
            text += f"; not written by a fit: {', '.join(map(shown, unexpected[:3]))}"
        result.add("others", "note", text)


def _unsafe_kind(folder: Path, name: str) -> str | None:
    """Return why a name in the folder is neither a file nor a folder of the export, or None."""
    path = folder / name
    try:
        if not path.resolve(strict=True).is_relative_to(folder.resolve()):
            return "a link to outside of the export; remove it"
        mode = path.stat().st_mode
    except (OSError, RuntimeError):
        return "a broken link; remove it"
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "neither a file nor a folder; remove it"
