"""Reserves and locks a run's folder while its fit runs, and finds the folders of crashed fits.

    exports/.<run>.partial/    renamed to exports/<run>/ in one step when it is complete
            .<run>.lock        locked while the fit's process lives; the system frees the lock when the process ends

So a partial folder whose lock is free belongs to a crashed fit, and two fits never share a folder.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, count
from pathlib import Path

from filelock import FileLock

from xray_fastai.system.errors import UserError
from xray_fastai.system.files import acquire, make_folder, release, sync_folder

CHECKPOINT, SETTINGS_FILE = "checkpoint", "settings.json"
LOG = "fit.log"
"""What a fit showed, with times; it names folders of the machine."""


class Reservation:
    """Describes the folder of a run that is not complete yet."""

    def __init__(self, exports: Path, name: str):
        self.exports, self.name = exports, name
        self.final = exports / name
        self.partial = exports / f".{name}.partial"
        self.lock = exports / f".{name}.lock"
        self.checkpoint = self.partial / CHECKPOINT
        self.resumable = False  # whether the checkpoint holds an epoch; then the folder is always kept

    @property
    def resume_command(self) -> str:
        """The command that resumes this run."""
        option = "" if str(self.exports) == "exports" else f" --exports {self.exports}"
        return f"xray-fastai fit --resume {self.final.name}{option}"

    def publish(self, keep_checkpoint: bool = False) -> Path:
        """Give the folder its final name; if the name was taken in the meantime, the next free one (`<run>-2`)."""
        others = (self.final.with_name(f"{self.name}-{i}") for i in count(2))
        self.final = next(path for path in chain([self.final], others) if not path.exists())
        os.rename(self.partial, self.final)
        sync_folder(self.exports)
        if not keep_checkpoint:  # not earlier: a crash before the renaming would need it
            shutil.rmtree(self.final / CHECKPOINT, ignore_errors=True)
        return self.final


@dataclass(frozen=True)
class Unfinished:
    """Describes a run that can be resumed: a crashed fit's folder, or the export of an interrupted fit."""

    name: str
    path: Path
    when: float  # time of the last checkpoint, in seconds since 1970

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def usable(self) -> bool:
        """Whether the settings were written, so that the run can be resumed."""
        return (self.checkpoint / SETTINGS_FILE).is_file()

    def __str__(self) -> str:
        return f"{self.path} of {datetime.fromtimestamp(self.when):%Y-%m-%d %H:%M}"


def check_name(exports: str | Path, name: str | None) -> None:
    """Check that no run has this name yet, without reserving it; a running or crashed fit is found by `reserve`.

    Raises:
        UserError: the name is taken.
    """
    if name is not None and os.path.exists(taken := Reservation(Path(exports), name).final):
        advice = advice_on_taken(Reservation(Path(exports), name))
        raise UserError(f"{taken} already exists; {advice}give another name", option="name", value=name)


def advice_on_taken(run: Reservation) -> str:
    """Return how to resume the run that has a name already; an empty text if it cannot be resumed."""
    interrupted = (run.final / CHECKPOINT / SETTINGS_FILE).is_file()
    return f"resume it by '{run.resume_command}', or " if interrupted else ""


@contextlib.contextmanager
def reserve(exports: str | Path, name: str | None, numbered: bool = False) -> Iterator[Reservation]:
    """Reserve a run's name, and yield its folder.

    At the end an unpublished folder is deleted. If its checkpoint holds an epoch, it is kept, and the error gets a note
    that says how to resume.

    Args:
        exports: the folder that holds the runs; it is made if it is missing.
        name: the run's name; None takes the date and time.
        numbered: take the first free name of `<name>-2`, `<name>-3`, ...

    Raises:
        UserError: the name is taken, or the folder cannot be written to.
    """
    exports = Path(exports)
    make_folder(exports, "exports")
    first = name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    others = [f"{first}-{i}" for i in range(2, 100)]
    for candidate in others if numbered else [first] if name else [first, *others]:
        run, lock = Reservation(exports, candidate), None
        try:
            lock = acquire(run.lock)
            if lock is None:
                fault = f"a running fit writes {run.partial}; give another name"
            elif run.final.exists():
                fault = f"{run.final} already exists; {advice_on_taken(run)}give another name"
            elif run.partial.exists():
                advice = "delete it"
                if (run.checkpoint / SETTINGS_FILE).is_file():
                    advice = f"resume it by '{run.resume_command}', or delete it"
                fault = f"{run.partial} belongs to an unfinished fit; {advice}"
            else:
                run.partial.mkdir()
                break
            if lock is not None:
                release(lock)
        except OSError as error:
            if lock is not None:
                release(lock)
            raise UserError(
                f"cannot be written to ({error.strerror}); give another folder", option="exports", value=exports
            ) from None
    else:
        raise UserError(fault, option="name", value=candidate)
    with _held(run, lock):
        yield run


@contextlib.contextmanager
def reopen(exports: str | Path, name: str | None) -> Iterator[tuple[Reservation, Unfinished]]:
    """Reserve an unfinished run again: its own folder, or a new one (`<run>-2`) for an interrupted export.

    Args:
        exports: the folder that holds the runs.
        name: the run's name, or its folder; None takes the newest unfinished run.

    Yields:
        The folder to write into, and the run to resume.

    Raises:
        UserError: there is no such run, it is complete, or another fit resumes it.
    """
    if name is not None and Path(name).parent != Path("."):
        exports, name = Path(name).parent, Path(name).name
    exports = Path(exports)
    if name is not None and (hidden := re.fullmatch(r"\.(.+)\.partial", name)):
        name = hidden[1]
    resumable = [run for run in unfinished(exports) if run.usable]
    names = ", ".join(run.name for run in resumable) or "none"
    if name is None:
        if not resumable:
            raise UserError(f"no unfinished run in {exports}; start one by 'xray-fastai fit'", option="resume")
        name = resumable[0].name
    run = Reservation(exports, name)
    busy = UserError("a fit is running under this name; wait until it ends, or stop it", option="resume", value=name)
    if run.lock.exists():
        if (lock := acquire(run.lock)) is None:
            raise busy
        lock.release()
    old = next((old for old in resumable if old.name == name), None)
    if old is None:
        if run.final.exists():
            fault = f"{run.final} is finished, or was resumed already; unfinished runs in {exports}: {names}"
        elif run.partial.exists():
            fault = f"{run.partial} stopped before its settings were written; delete it"
        else:
            fault = f"no such run in {exports}; unfinished runs: {names}"
        raise UserError(fault, option="resume", value=name)
    try:
        lock = acquire(run.lock)
    except OSError as error:
        raise UserError(
            f"cannot be written to ({error.strerror}); change its permissions", option="exports", value=exports
        ) from None
    if lock is None:
        raise busy
    if not old.usable:  # the fit that ran under this name ended just now, and took its folder along
        release(lock)
        raise busy
    if old.path == run.partial:
        run.resumable = True
        with _held(run, lock):
            yield run, old
        return
    try:
        with reserve(exports, _first_name(old), numbered=True) as new:
            yield new, old
    finally:
        release(lock)


def _first_name(run: Unfinished) -> str:
    """Return the name that a run was started with, without the number that was added when it was resumed."""
    try:
        given = json.loads((run.checkpoint / SETTINGS_FILE).read_text(encoding="utf-8"))["settings"]["name"]
    except (OSError, ValueError, TypeError, KeyError):
        given = None
    if given is None and (date := re.match(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)):
        given = date[0]
    return given if given and re.fullmatch(rf"{re.escape(given)}-\d+", run.name) else run.name


def unfinished(exports: str | Path) -> list[Unfinished]:
    """List the runs in a folder that fits left unfinished, the newest first; running fits are not listed."""
    exports = Path(exports)
    runs = []
    for path in exports.glob(".*.lock"):  # left by a fit that was killed while it resumed an interrupted one
        if not path.with_suffix(".partial").exists() and (lock := acquire(path, timeout=0)) is not None:
            release(lock)
    for path in exports.glob(".*.partial"):
        run = Reservation(exports, path.name[1 : -len(".partial")])
        # an evaluation that is being written has a similar name, `.<name>.<process>.partial`, and no checkpoint
        foreign = not run.checkpoint.exists() and re.search(r"\.\d+\.partial$", path.name)
        if path.is_dir() and not foreign and not _held_by_another(run.lock):
            runs.append(Unfinished(run.name, path, _newest(path)))
    for checkpoint in exports.glob(f"[!.]*/{CHECKPOINT}"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # no export, or a damaged one
            path = checkpoint.parent
            status = json.loads((path / "model.json").read_text(encoding="utf-8"))["status"]
            if status == "interrupted" and not _held_by_another(exports / f".{path.name}.lock"):
                runs.append(Unfinished(path.name, path, _newest(path)))
    return sorted(runs, key=lambda run: run.when, reverse=True)


@contextlib.contextmanager
def _held(run: Reservation, lock: FileLock) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if run.resumable:
            error.add_note(f"resume it by '{run.resume_command}', or delete {run.partial}")
        else:
            shutil.rmtree(run.partial, ignore_errors=True)
        raise
    else:
        shutil.rmtree(run.partial, ignore_errors=True)  # does not exist after publishing
    finally:
        release(lock)


def _held_by_another(path: Path) -> bool:
    if not path.exists():
        return False
    lock = acquire(path, timeout=0)
    if lock is not None:
        lock.release()
    return lock is None


def _newest(path: Path) -> float:
    """Return the time when a file of a run was last written."""
    times = [path.stat().st_mtime]
    with contextlib.suppress(OSError):
        times += [file.stat().st_mtime for file in (path / CHECKPOINT).iterdir()]
    return max(times)
