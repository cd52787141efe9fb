"""Cache decoded images on disk, so that a fit decodes each file once and not in every epoch.

The cache is one memory-mapped file for the images of a fit at one size: a checksum for each image, then the pixels. The
process that first needs an image writes it. An image is valid if its checksum matches, so neither a second fit at the
same time nor a power loss can leave a wrong one. The file's name depends on the paths, sizes and modification times of
the images, so a changed image is decoded again.
"""

import errno
import hashlib
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from rich.filesize import decimal

from xray_fastai.system.errors import UserError
from xray_fastai.system.files import cache_dir

LAYOUT = 2
"""Version of the file's layout and of the decoding in `images.open_image`."""
ENDING = ".pixels"
UNUSED_DAYS = 30
"""A file that no fit has used for so many days is deleted when another is created."""


class PixelCache:
    """Holds 8-bit images (size, size) by the path of their file."""

    def __init__(self, paths: Sequence[str], size: int):
        """Open the cache file for these images, or create it and delete that of earlier versions of the same images.

        Args:
            paths: the files of the images, in any order.
            size: side in pixels.

        Raises:
            OSError: an image is missing, the cache folder cannot be written to, or has less than twice the space free.
        """
        self.paths = paths = sorted(map(os.path.abspath, paths))
        self.rows = {path: row for row, path in enumerate(paths)}
        self.size = size
        images, states = hashlib.sha256(f"{LAYOUT} {size}".encode()), hashlib.sha256()
        for path in paths:
            status = os.stat(path)
            images.update(os.fsencode(path) + b"\0")
            states.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
        name = images.hexdigest()[:16]
        self.path = cache_dir() / f"{name}-{states.hexdigest()[:16]}{ENDING}"
        self.bytes = len(paths) * (4 + size * size)
        if not self.path.exists():
            self._create()
            self._delete_old(f"{name}-")
        self._open()

    def _create(self) -> None:
        cache_dir().mkdir(parents=True, exist_ok=True)
        if self.bytes > shutil.disk_usage(cache_dir()).free / 2:
            text = f"{decimal(self.bytes)} are more than half of the free space"
            raise OSError(errno.ENOSPC, text, str(cache_dir()))
        handle, temporary = tempfile.mkstemp(prefix=".making-", suffix=ENDING, dir=cache_dir())
        try:
            with os.fdopen(handle, "wb") as file:
                # writing to a page without space on the disk would kill the process
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.bytes)
                else:
                    for start in range(0, self.bytes, 1 << 20):
                        file.write(bytes(min(1 << 20, self.bytes - start)))
            with suppress(FileExistsError):  # another fit has just created it; a link never replaces that file
                os.link(temporary, self.path)
        finally:
            with suppress(OSError):
                os.unlink(temporary)

    def _delete_old(self, prefix: str) -> None:
        """Delete the files of earlier versions of these images, and those unused for `UNUSED_DAYS`."""
        for other in cache_files():
            with suppress(OSError):
                unused = time.time() - other.stat().st_mtime > UNUSED_DAYS * 86400
                if other != self.path and (unused or other.name.startswith(prefix)):
                    other.unlink()

    def _open(self) -> None:
        os.utime(self.path)
        self.map = np.memmap(self.path, np.uint8, "r+", shape=(self.bytes,))
        self.sums = self.map[: 4 * len(self.rows)].view(np.uint32)  # (N,)
        self.pixels = self.map[4 * len(self.rows) :].reshape(-1, self.size, self.size)  # (N, size, size)

    def __getstate__(self) -> dict:  # another process opens the file again
        return {name: value for name, value in self.__dict__.items() if name not in ("map", "sums", "pixels")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def get(self, path: str) -> np.ndarray | None:
        """Return the image (size, size), or None if it is not in the cache yet."""
        row = self.rows.get(os.path.abspath(path))
        if row is None or not self.sums[row]:
            return None
        image = self.pixels[row].copy()
        return image if _sum(image) == self.sums[row] else None

    def put(self, path: str, image: np.ndarray) -> None:
        """Store the image (size, size)."""
        row = self.rows.get(os.path.abspath(path))
        if row is not None:
            self.pixels[row] = image
            self.sums[row] = _sum(image)

    def __str__(self) -> str:
        return f"{self.path}, {decimal(self.bytes)}"


def _sum(image: np.ndarray) -> int:
    return zlib.crc32(image) or 1  # 0 marks an image that has not been written


def cache_files() -> list[Path]:
    """List the files of the cache, and the temporary files of fits that were killed."""
    return sorted(cache_dir().glob(f"*{ENDING}")) + sorted(cache_dir().glob(f".making-*{ENDING}"))


def clear() -> int:
    """Delete the cache's files. Fits that use them continue with their open files.

    Returns:
        The number of bytes deleted.

    Raises:
        UserError: a file cannot be deleted.
    """
    total = 0
    for path in cache_files():
        size = path.stat().st_size
        try:
            path.unlink()
        except OSError as error:
            raise UserError(f"cannot be deleted ({error.strerror})", value=path) from None
        total += size
    return total
