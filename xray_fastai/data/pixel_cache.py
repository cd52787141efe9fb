"""Images as they leave `images.open_image`, kept on disk, so that a fit decodes each file once and not every epoch.

One memory-mapped file for the images of a fit at one size: a checksum an image, then the pixels. An image is written
when it is first asked for, by whichever process is asked, and counts as there when its checksum fits: so neither a
second fit at the same time nor a loss of power can leave a wrong one. The file's name comes from the paths, sizes and
modification times of the images, so what changed is decoded anew.
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
from typing import TYPE_CHECKING

from xray_fastai.system.errors import UserError
from xray_fastai.system.text import format_bytes

if TYPE_CHECKING:
    import numpy as np

LAYOUT = 1
"""Counts the changes of the file, and of how `images.open_image` decodes."""
ENDING = ".pixels"
UNUSED_DAYS = 30
"""After which a file goes when another is made."""


def folder() -> Path:
    """The user's cache folder of this program: below XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xray-fastai"


class PixelCache:
    """Eight-bit images (size, size) by the path of their file."""

    def __init__(self, paths: Sequence[str], size: int):
        """Open the file for these images, or make it; that of the same images as they were before goes.

        Args:
            paths: of the images, in any order.
            size: side in pixels.

        Raises:
            OSError: an image is gone; or the cache folder can't be written to, or has not twice the room.
        """
        paths = sorted(map(os.path.abspath, paths))
        self.rows = {path: row for row, path in enumerate(paths)}
        self.size = size
        images, states = hashlib.sha256(f"{LAYOUT} {size}".encode()), hashlib.sha256()
        for path in paths:
            status = os.stat(path)
            images.update(os.fsencode(path) + b"\0")
            states.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
        name = images.hexdigest()[:16]
        self.path = folder() / f"{name}-{states.hexdigest()[:16]}{ENDING}"
        self.bytes = len(paths) * (4 + size * size)
        if not self.path.exists():
            self._make()
            self._tidy(f"{name}-")
        self._open()

    def _make(self) -> None:
        folder().mkdir(parents=True, exist_ok=True)
        if self.bytes > shutil.disk_usage(folder()).free / 2:
            message = f"{format_bytes(self.bytes)} are more than half of the free space"
            raise OSError(errno.ENOSPC, message, str(folder()))
        handle, made = tempfile.mkstemp(prefix=".making-", suffix=ENDING, dir=folder())
        try:
            with os.fdopen(handle, "wb") as file:
                # a page without a place on the disk would end the process when it is written to
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.bytes)
                else:
                    for start in range(0, self.bytes, 1 << 20):
                        file.write(bytes(min(1 << 20, self.bytes - start)))
            with suppress(FileExistsError):  # another fit was faster
                os.link(made, self.path)
        finally:
            with suppress(OSError):
                os.unlink(made)

    def _tidy(self, prefix: str) -> None:
        "Delete the images as they were before, and what no fit has used for long."
        for other in kept():
            with suppress(OSError):
                unused = time.time() - other.stat().st_mtime > UNUSED_DAYS * 86400
                if other != self.path and (unused or other.name.startswith(prefix)):
                    other.unlink()

    def _open(self) -> None:
        import numpy as np

        os.utime(self.path)

        self.map = np.memmap(self.path, np.uint8, "r+", shape=(self.bytes,))
        self.sums = self.map[: 4 * len(self.rows)].view(np.uint32)  # (N,)
        self.pixels = self.map[4 * len(self.rows) :].reshape(-1, self.size, self.size)  # (N, size, size)

    def __getstate__(self) -> dict:  # a loading process opens the file for itself
        return {name: value for name, value in self.__dict__.items() if name not in ("map", "sums", "pixels")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        try:
            self._open()
        except OSError:  # it was cleared meanwhile
            self.rows = {}

    def get(self, path: str) -> "np.ndarray | None":
        """The image, (size, size); None where it is not there yet."""
        row = self.rows.get(os.path.abspath(path))
        if row is None or not self.sums[row]:
            return None
        image = self.pixels[row].copy()
        return image if _sum(image) == self.sums[row] else None

    def put(self, path: str, image: "np.ndarray") -> None:
        """Keep the image (size, size)."""
        row = self.rows.get(os.path.abspath(path))
        if row is not None:
            self.pixels[row] = image
            self.sums[row] = _sum(image)

    def __str__(self) -> str:
        return f"{self.path}, {format_bytes(self.bytes)}"


def _sum(image: "np.ndarray") -> int:
    return zlib.crc32(image) or 1  # 0 is what nothing was written to


def kept() -> list[Path]:
    """The files of the cache, those that a killed fit was making included."""
    return sorted(folder().glob(f"*{ENDING}")) + sorted(folder().glob(f".making-*{ENDING}"))


def clear() -> int:
    """Delete the cache's files; fits that use them go on with what they have open.

    Returns:
        The bytes that they had.

    Raises:
        UserError: one can't be deleted.
    """
    total = 0
    for path in kept():
        size = path.stat().st_size
        try:
            path.unlink()
        except OSError as error:
            raise UserError(f"{path}: can't be deleted ({error.strerror})") from None
        total += size
    return total
