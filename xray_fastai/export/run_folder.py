"""A run's folder while its fit is under way: reserved, locked, and recognised when the fit crashed.

    exports/.<run>.partial/    renamed to exports/<run>/ in one step once it is complete
            .<run>.lock        locked for as long as the fit's process lives: the system frees it when that dies

So a folder that is there without its lock being held is what a crashed fit left, and two fits never share one.
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
from xray_fastai.system.files import acquire, release, sync_folder

CHECKPOINT, SETTINGS = "checkpoint", "settings.json"


class Reservation:
    """A run's folder while it is being made."""

    def __init__(self, exports: Path, name: str):
        self.exports, self.name = exports, name
        self.final = exports / name
        self.partial = exports / f".{name}.partial"
        self.lock = exports / f".{name}.lock"
        self.checkpoint = self.partial / CHECKPOINT
        self.resumable = False  # whether the checkpoint holds an epoch, which is then kept whatever happens

    @property
    def resume_command(self) -> str:
        elsewhere = "" if str(self.exports) == "exports" else f" --exports {self.exports}"
        return f"xray-fastai fit --resume {self.final.name}{elsewhere}"

    def publish(self, keep_checkpoint: bool = False) -> Path:
        """Give the folder its final name; where something took that meanwhile, the next that is free (`<run>-2`)."""
        others = (self.final.with_name(f"{self.name}-{i}") for i in count(2))
        self.final = next(path for path in chain([self.final], others) if not path.exists())
        os.rename(self.partial, self.final)
        sync_folder(self.exports)
        if not keep_checkpoint:  # only now: until it had its name, it may have been needed again
            shutil.rmtree(self.final / CHECKPOINT, ignore_errors=True)
        return self.final


@dataclass(frozen=True)
class Unfinished:
    """What can be gone on with: a crashed fit's folder, or the export of an interrupted one."""

    name: str
    path: Path
    when: float  # of the last checkpoint, in seconds since the epoch

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def usable(self) -> bool:
        return (self.checkpoint / SETTINGS).is_file()

    def __str__(self) -> str:
        return f"{self.path} of {datetime.fromtimestamp(self.when):%Y-%m-%d %H:%M}"


@contextlib.contextmanager
def reserve(exports: str | Path, name: str | None, numbered: bool = False) -> Iterator[Reservation]:
    """Hold a run's name while it is being made.

    What was not published is removed at the end, but for a folder whose checkpoint holds an epoch: that stays, and the
    error gets a note on how to go on.

    Args:
        exports: the folder that holds the runs; made where it is missing.
        name: of the run; None takes the date and time.
        numbered: take the first of `<name>-2`, `<name>-3`, ... that is free.

    Raises:
        UserError: the name is taken, or the folder can't be written to.
    """
    exports = Path(exports)
    try:
        exports.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"can't be made ({error.strerror}); give another folder", option="exports", value=exports
        ) from None
    first = name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    others = [f"{first}-{i}" for i in range(2, 100)]
    for candidate in others if numbered else [first] if name else [first, *others]:
        run, lock = Reservation(exports, candidate), None
        try:
            lock = acquire(run.lock)
            if lock is None:
                fault = f"{run.partial} belongs to a fit that runs now; give another name"
            elif run.final.exists():
                fault = f"{run.final} is there already; give another name"
            elif run.partial.exists():
                way = f"go on with it by '{run.resume_command}', or delete it"
                if not (run.checkpoint / SETTINGS).is_file():
                    way = "delete it"
                fault = f"{run.partial} is what a fit left that did not finish; {way}"
            else:
                run.partial.mkdir()
                break
            if lock is not None:
                release(lock)
        except OSError as error:
            if lock is not None:
                release(lock)
            raise UserError(
                f"can't be written to ({error.strerror}); give another folder", option="exports", value=exports
            ) from None
    else:
        raise UserError(f"{fault}", option="name", value=candidate)
    with _held(run, lock):
        yield run


@contextlib.contextmanager
def reopen(exports: str | Path, name: str | None) -> Iterator[tuple[Reservation, Unfinished]]:
    """Hold an unfinished run again: its own folder, or for an interrupted export a new one beside it (`<run>-2`).

    Args:
        exports: the folder that holds the runs.
        name: the run's name, or its folder; None takes the newest unfinished run.

    Yields:
        The folder to write into, and what to go on with.

    Raises:
        UserError: no such run, it is complete, or another fit is at it.
    """
    if name is not None and Path(name).parent != Path("."):
        exports, name = Path(name).parent, Path(name).name
    exports = Path(exports)
    if name is not None and (hidden := re.fullmatch(r"\.(.+)\.partial", name)):
        name = hidden[1]
    there = [run for run in unfinished(exports) if run.usable]
    listed = ", ".join(run.name for run in there) or "none"
    if name is None:
        if not there:
            raise UserError(f"no unfinished run in {exports}; start one by 'xray-fastai fit'", option="resume")
        name = there[0].name
    run = Reservation(exports, name)
    busy = f"--resume {name}: another fit is at it now; wait for it, or stop that one first"
    if run.lock.exists() and (probe := acquire(run.lock)) is None:
        raise UserError(busy)
    elif run.lock.exists():
        probe.release()
    found = next((old for old in there if old.name == name), None)
    if found is None:
        if run.final.exists():
            raise UserError(
                f"{run.final} is finished, or was gone on with; unfinished in {exports}: {listed}",
                option="resume",
                value=name,
            )
        if run.partial.exists():
            raise UserError(
                f"{run.partial} stopped before anything was kept in it; delete it", option="resume", value=name
            )
        raise UserError(f"no such run in {exports}; unfinished there: {listed}", option="resume", value=name)
    try:
        lock = acquire(run.lock)
    except OSError as error:
        raise UserError(f"can't be written to ({error.strerror})", option="exports", value=exports) from None
    if lock is None or not found.usable:
        raise UserError(busy)
    if found.path == run.partial:
        run.resumable = True
        with _held(run, lock):
            yield run, found
        return
    try:
        with reserve(exports, _first_name(found), numbered=True) as new:
            yield new, found
    finally:
        release(lock)


def _first_name(run: Unfinished) -> str:
    """The name that a run was started by, without the number that going on with it gave it."""
    try:
        given = json.loads((run.checkpoint / SETTINGS).read_text(encoding="utf-8"))["settings"]["name"]
    except (OSError, ValueError, TypeError, KeyError):
        given = None
    if given is None and (date := re.match(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)):
        given = date[0]
    return given if given and re.fullmatch(rf"{re.escape(given)}-\d+", run.name) else run.name


def unfinished(exports: str | Path) -> list[Unfinished]:
    """What fits that are not running any more left in a folder, the newest first."""
    exports = Path(exports)
    found = []
    for path in exports.glob(".*.lock"):  # of a fit that was killed while it went on with an interrupted one
        if not path.with_suffix(".partial").exists() and (lock := acquire(path, timeout=0)) is not None:
            release(lock)
    for path in exports.glob(".*.partial"):
        run = Reservation(exports, path.name[1 : -len(".partial")])
        # without a checkpoint, it may also be an evaluation that is being written: `.<name>.<process>.partial`
        foreign = not run.checkpoint.exists() and re.search(r"\.\d+\.partial$", path.name)
        if path.is_dir() and not foreign and not _held_by_another(run.lock):
            found.append(Unfinished(run.name, path, _newest(path)))
    for checkpoint in exports.glob(f"[!.]*/{CHECKPOINT}"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # not an export, or a damaged one
            path = checkpoint.parent
            status = json.loads((path / "model.json").read_text(encoding="utf-8"))["status"]
            if status == "interrupted" and not _held_by_another(exports / f".{path.name}.lock"):
                found.append(Unfinished(path.name, path, _newest(path)))
    return sorted(found, key=lambda run: run.when, reverse=True)


@contextlib.contextmanager
def _held(run: Reservation, lock: FileLock) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if run.resumable:
            error.add_note(f"go on by '{run.resume_command}', or delete {run.partial}")
        else:
            shutil.rmtree(run.partial, ignore_errors=True)
        raise
    else:
        shutil.rmtree(run.partial, ignore_errors=True)  # not there any more, once published
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
    """When anything in a run was last written."""
    times = [path.stat().st_mtime]
    with contextlib.suppress(OSError):
        times += [file.stat().st_mtime for file in (path / CHECKPOINT).iterdir()]
    return max(times)
