"""Files of a folder that came from others: opened only where they are plain files inside of it, of a bounded size."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from xray_fastai.system.errors import UserError

# opened without following a last link, without waiting for who writes into a pipe, and on Windows as bytes
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


@contextlib.contextmanager
def open_received(folder: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file of a folder.

    Yields:
        The file, and its size in bytes.

    Raises:
        UserError: missing, a link to somewhere outside of the folder, not a plain file, or not readable.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(folder.resolve(strict=True)):
            raise UserError(f"{path}: a link to outside of {folder}, so not followed; put the file itself there")
        if not stat.S_ISREG(real.stat().st_mode):  # before it is opened: opening is enough to make a device act
            raise UserError(f"{path}: not a plain file; get it anew")
        descriptor = os.open(real, _FLAGS)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UserError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a plain file; get it anew")
        try:
            yield stream, status.st_size
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror or error})") from None


def read_received(folder: Path, name: str, limit: int) -> bytes:
    """All bytes of a file of a folder.

    Args:
        folder: where it has to be.
        name: of the file.
        limit: a longer one is refused, before memory is taken.

    Raises:
        UserError: as `open_received`; or too large.
    """
    with open_received(folder, name) as (stream, size):
        content = stream.read(limit + 1) if size <= limit else b""
        if max(size, len(content)) > limit:
            raise UserError(f"{folder / name}: {size:,} bytes, more than the {limit:,} that it may have; get it anew")
        return content
