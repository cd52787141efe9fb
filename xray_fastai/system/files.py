"""Files and folders that appear complete or not at all, and locks."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from xray_fastai.system.errors import UserError

PROBE = 0.5  # seconds to wait for a lock: longer than the moment that `unfinished` of another fit holds it


def sync_folder(folder: Path) -> None:
    """Have the names in a folder written to the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def acquire(path: Path, timeout: float = PROBE) -> FileLock | None:
    """A lock on a file made for it, held by nobody else; None where somebody has it still after `timeout` seconds.

    Raises:
        OSError: the file can't be made.
    """
    lock = FileLock(path, timeout=timeout, poll_interval=0.02, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def release(lock: FileLock) -> None:
    """Give a lock up, and delete its file."""
    with contextlib.suppress(OSError):  # its folder may have vanished
        os.unlink(lock.lock_file)
    with contextlib.suppress(OSError):
        lock.release()


@contextlib.contextmanager
def atomic_write(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Give a temporary file beside `path` to write, which replaces `path` once the block ends without an error.

    An error deletes the temporary file; `path` stays as it was.

    Args:
        path: the file to make or to replace.
        sync: wait until the content and the new name are on the disk, so that a power loss cannot undo them.

    Yields:
        The temporary file, which does not exist yet.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        if sync:
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        if sync:
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_new(path: Path, option: str) -> None:
    """Check that a file can be made at `path`.

    Raises:
        UserError: `path` exists, or its folder does not.
    """
    if path.exists() or path.is_symlink():
        raise UserError("already exists; give another name, or delete it first", option=option, value=path)
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}; make it, or give another name", option=option, value=path)


@contextlib.contextmanager
def replaced(folder: Path, marker: str) -> Iterator[Path]:
    """A new folder to fill, which then takes the place of an earlier one, whole or not at all.

    Args:
        folder: the name it gets.
        marker: a file that an earlier one has; what has none is not ours to replace.

    Raises:
        UserError: it can't be written to, or what is there lacks the marker.
    """
    partial, earlier = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("partial", "earlier"))
    try:
        if folder.exists() and not (folder / marker).is_file():
            raise UserError(f"{folder}: is there already and holds no {marker}; give another folder by --output")
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rename(earlier)
        partial.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: can't be written ({reason}); give another folder by --output") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if earlier.exists() and not folder.exists():
            earlier.rename(folder)
        shutil.rmtree(earlier, ignore_errors=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
