"""Write files and folders completely or not at all, lock files, and find the cache folder."""

import contextlib
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from xray_fastai.system.errors import UserError

PROBE = 0.5  # seconds to wait for a lock; `unfinished` in another process holds it for a shorter time


CACHE_ADVICE = "XDG_CACHE_HOME sets another folder" if sys.platform.startswith("linux") else "change its permissions"
"""What to do if the cache folder cannot be written to."""


def cache_dir() -> Path:
    """Return the program's cache folder of the user, on Linux $XDG_CACHE_HOME/xray-fastai or ~/.cache/xray-fastai.

    The folder may not exist yet.

    Raises:
        OSError: the user has no home folder, as in some containers.
    """
    try:
        return user_cache_path("xray-fastai", appauthor=False)
    except RuntimeError:
        raise OSError(errno.ENOENT, "this user has no home folder") from None


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, on systems that support it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def acquire(path: Path, timeout: float = PROBE) -> FileLock | None:
    """Lock a file, which is created for this purpose.

    Args:
        path: the lock file.
        timeout: seconds to wait for another process to release it.

    Returns:
        The lock, or None if another process still holds it.

    Raises:
        OSError: the file cannot be created.
    """
    lock = FileLock(path, timeout=timeout, poll_interval=0.02, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def release(lock: FileLock) -> None:
    """Release a lock and delete its file."""
    with contextlib.suppress(OSError):  # the folder may have been deleted
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


def make_folder(folder: Path, option: str) -> None:
    """Make a folder and those above it, where they do not exist.

    Args:
        folder: the folder.
        option: where the user gave it.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fault = f"cannot be made ({error.strerror}); give another folder"
        raise UserError(fault, option=option, value=folder) from None


@contextlib.contextmanager
def replaced(folder: Path, marker: str) -> Iterator[Path]:
    """Give an empty folder to fill, which replaces `folder` once the block ends without an error.

    An error deletes the new folder; `folder` stays as it was.

    Args:
        folder: the folder to create or to replace.
        marker: a file in every folder of this kind; an existing folder without it is not replaced.

    Yields:
        The new folder.

    Raises:
        UserError: the folder cannot be written, or an existing one has no marker.
    """
    partial, earlier = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("partial", "earlier"))
    try:
        if folder.exists() and not (folder / marker).is_file():
            raise UserError(f"already exists and holds no {marker}; give another folder by output=", value=folder)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rename(earlier)
        partial.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot be written ({reason}); give another folder by output=", value=folder) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if earlier.exists() and not folder.exists():
            earlier.rename(folder)
        shutil.rmtree(earlier, ignore_errors=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
