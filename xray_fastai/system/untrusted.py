"""Open files of a folder that came from others.

Only plain files inside the folder are opened, and only up to a size limit.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from xray_fastai.system.errors import UserError

# do not follow a link, do not wait for the writer of a pipe, and open as bytes on Windows
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


@contextlib.contextmanager
def open_received(folder: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file of a folder.

    Yields:
        The open file, and its size in bytes.

    Raises:
        UserError: the file is missing, not readable, not a plain file, or a link to outside of the folder.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(folder.resolve(strict=True)):
            raise UserError(f"a link to outside of {folder}, so not followed; put the file itself there", value=path)
        if not stat.S_ISREG(real.stat().st_mode):  # checked before opening, which may trigger a device
            raise UserError("not a plain file; get it again", value=path)
        descriptor = os.open(real, _FLAGS)
    except FileNotFoundError:
        raise UserError("no such file", value=path) from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UserError(f"cannot be read ({getattr(error, 'strerror', None) or error})", value=path) from None
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError("not a plain file; get it again", value=path)
        try:
            yield stream, status.st_size
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror or error})", value=path) from None


def read_received(folder: Path, name: str, limit: int) -> bytes:
    """Read a file of a folder.

    Args:
        folder: the folder that must hold the file.
        name: the name of the file.
        limit: the largest size in bytes; a larger file is refused before memory is allocated.

    Raises:
        UserError: see `open_received`; or the file is too large.
    """
    with open_received(folder, name) as (stream, size):
        content = stream.read(limit + 1) if size <= limit else b""
        if max(size, len(content)) > limit:
            raise UserError(f"{size:,} bytes, more than the {limit:,} allowed; get it again", value=folder / name)
        return content
