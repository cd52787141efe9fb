"""An export from others, or of long ago, is looked at file by file before anybody loads it."""

import csv
import io
import os
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from xray_fastai.export.reader import rebuild
from xray_fastai.export.schema import HISTORY_COLUMNS, LIMIT, SETTINGS, WEIGHTS, parse
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import shown
from xray_fastai.system.untrusted import read_received
from xray_fastai.system.zip_files import unpack

HISTORY, REPORT = "history.csv", "report.html"
HISTORY_BYTES = 5_000_000
UNPACKED = 1_000_000_000
"""Bytes that one file of an archive may become while it is looked at."""
PICKLES = (".pkl", ".pickle", ".pth", ".pt", ".ckpt", ".joblib")
KNOWN = ("curves.png", "batch.png", "checkpoint")
CODE = "loading a pickle can run code; not opened. Delete it, unless it is your own"


@dataclass(frozen=True)
class Check:
    """What there is to say of one file."""

    file: str
    verdict: str  # ok, note, unsafe or fault
    told: str

    def __str__(self) -> str:
        mark = {"ok": "ok: ", "note": "", "unsafe": "UNSAFE from others: ", "fault": "FAULT: "}[self.verdict]
        return f"{self.file:<19} {mark}{self.told}"


@dataclass
class Verification:
    """What `verify` found."""

    path: Path
    checks: list[Check] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # keys of model.json that a newer version may have written

    @property
    def faults(self) -> list[str]:
        return [check.told for check in self.checks if check.verdict == "fault"]

    @property
    def ok(self) -> bool:
        """Whether it is whole, and loads without running anything that came with it."""
        return not self.faults

    def add(self, file: str, verdict: str, told: str) -> None:
        self.checks.append(Check(file, verdict, told))

    def __str__(self) -> str:
        lines = [f"{'export':<19} {self.path}", *map(str, self.checks)]
        if self.ok:
            lines += [
                f"{'verdict':<19} good: {SETTINGS} and {WEIGHTS} are whole, and load without running code.",
                f"{'':<19} Who made the model, and how right it is, no check can tell.",
            ]
        else:
            count = f"{len(self.faults)} fault{'' if len(self.faults) == 1 else 's'}"
            lines.append(f"{'verdict':<19} BAD: {count}; don't use it")
        return "\n".join(lines)


def verify(path: str | Path) -> Verification:
    """Check an export as `load_learner` does, and look at what else is in its folder; nothing is unpickled.

    Args:
        path: an export's folder, or a .zip of one, of which only what is to be looked at is unpacked, into a temporary
            folder.

    Returns:
        A check a file; `ok` where there is no fault. It prints as a table.

    Raises:
        UserError: there is nothing of that name, or an archive that must not be unpacked.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder; give an export, or a .zip of one") from None
    except OSError as error:
        raise UserError(f"{path}: can't be looked at ({error.strerror}); give an export, or a .zip of one") from None
    if stat.S_ISDIR(mode):
        found = Verification(path)
        _check(found, path, _names(path))
        return found
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: neither a folder nor an archive; give an export, or a .zip of one")
    found = Verification(path)
    with tempfile.TemporaryDirectory(prefix="xray-fastai-") as temporary:
        folder = Path(temporary)
        root, names = unpack(path, folder, (SETTINGS, WEIGHTS, HISTORY), UNPACKED)
        _check(found, folder, names, shown_as=f"{path}:{root}")
    return found


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({error.strerror})") from None


def _check(found: Verification, folder: Path, names: list[str], shown_as: str | None = None) -> None:
    """Add a check for each file of `names`; those that were not unpacked have their names looked at alone."""

    def attempt(file: str, check) -> None:
        try:
            found.add(file, "ok", check())
        except UserError as error:
            told = str(error) if shown_as is None else str(error).replace(f"{folder}{os.sep}", shown_as)
            found.add(file, "fault", told)

    if SETTINGS not in names or WEIGHTS not in names:
        for file in (SETTINGS, WEIGHTS):
            if file not in names:
                found.add(file, "fault", f"{shown_as or f'{folder}/'}{file}: missing; get the export anew")
    else:
        model: dict = {}
        attempt(SETTINGS, lambda: _settings(folder, model, found.unknown))
        if model:
            attempt(WEIGHTS, lambda: _weights(folder, model))
        else:
            found.add(WEIGHTS, "note", f"not checked: for what network it should be, only {SETTINGS} can tell")
    if HISTORY in names:
        attempt(HISTORY, lambda: _history(folder))
    else:
        found.add(HISTORY, "note", "not there, and not needed to load the model")
    _rest(found, folder, [name for name in names if name not in (SETTINGS, WEIGHTS, HISTORY)], shown_as is None)


def _settings(folder: Path, model: dict, unknown: list[str]) -> str:
    checked, keys = parse(read_received(folder, SETTINGS, LIMIT), folder / SETTINGS)
    model |= checked
    unknown += keys
    size = model["preprocessing"]["size"]
    told = f"{model['architecture']}, {size} x {size} px, {len(model['classes'])} classes"
    told += f" ({shown(', '.join(model['classes']))}), {model['status']}"
    if keys:
        names = ", ".join(shown(key) for key in keys[:3]) + (", ..." if len(keys) > 3 else "")
        told += f"; not known to this version, so not heeded: {names}"
    return told


def _weights(folder: Path, model: dict) -> str:
    learn = rebuild(folder, model)
    tensors = learn.model.state_dict()
    size = sum(tensor.nbytes for tensor in tensors.values())
    return f"{len(tensors)} tensors, {size / 1e6:.1f} MB; SHA-256, names, shapes, types and values as they should be"


def _history(folder: Path) -> str:
    file = folder / HISTORY
    content = read_received(folder, HISTORY, HISTORY_BYTES)
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")))
        for number, row in enumerate(rows, start=2):
            if missing := [column for column in HISTORY_COLUMNS if row.get(column) is None]:
                raise UserError(f"{file}: line {number} has no {missing[0]}; get the export anew")
            int(row["epoch"])
            for column in HISTORY_COLUMNS[2:]:
                float(row[column] or "nan")  # pandas writes nothing for what is not a number
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file}: damaged: {shown(error, 120)}; get the export anew") from None
    return f"{len(rows)} epoch{'' if len(rows) == 1 else 's'}"


def _rest(found: Verification, folder: Path, names: list[str], there: bool) -> None:
    """The files that no command needs: of which there is none that a command opens but the report's pictures."""
    others = []
    for name in names:
        if there and (fault := _misplaced(folder, name)):
            found.add(shown(name, 19), "fault", f"{folder / shown(name)}: {fault}")
        elif name.lower().endswith(PICKLES):
            found.add(shown(name, 19), "unsafe", CODE)
        elif name == REPORT:
            found.add(
                REPORT, "note", "a web page, which from others may hold scripts: 'xray-fastai evaluate' writes it anew"
            )
        else:
            others.append(name)
    if REPORT not in names:
        found.add(REPORT, "note", "not there; 'xray-fastai evaluate' writes it anew")
    if others:
        strange = [n for n in others if n not in KNOWN and not n.startswith(("evaluation-", "interpretation-"))]
        told = ", ".join(shown(name) for name in [*strange, *(n for n in others if n not in strange)][:8])
        told += f" and {len(others) - 8} more" if len(others) > 8 else ""
        of_none = "; what a fit does not write: " + ", ".join(map(shown, strange[:3])) if strange else ""
        found.add("others", "note", f"{told}: not needed to load the model, not looked at{of_none}")


def _misplaced(folder: Path, name: str) -> str | None:
    path = folder / name
    try:
        if not path.resolve(strict=True).is_relative_to(folder.resolve()):
            return "a link that leaves the export; remove it"
        mode = path.stat().st_mode
    except (OSError, RuntimeError):
        return "a link that leads nowhere; remove it"
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "neither a file nor a folder; remove it"
