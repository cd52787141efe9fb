"""Check a .zip from others before anything of it is unpacked, and unpack no more of an export than is needed.

`zipfile` reads the whole list of names when it opens an archive. The size of that list is therefore checked first; the
end of the archive holds it (APPNOTE.TXT 6.3.10, 4.3.16).
"""

import contextlib
import os
import stat
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from rich.filesize import decimal

from xray_fastai.system.errors import UserError
from xray_fastai.system.text import UNPRINTABLE, shown

MAX_NAMES = 1_000_000
"""Bytes of an export's list of names; that of an export with all its evaluations has about 3,000."""
MAX_BYTES = 4_000_000_000
"""Bytes of all unpacked files of an export; one of the largest network, learner.pkl included, has 350 MB."""
RATIO, SMALL = 100, 100_000_000
"""A file that unpacks to more than `SMALL` bytes and more than `RATIO` times its packed size is a bomb. Weights and
images hardly shrink."""


class ArchiveError(UserError):
    """An archive that is damaged, dangerous, or without the expected content; `value` is its path."""


@contextlib.contextmanager
def open_zip(archive: Path, max_names: int, max_bytes: int) -> Iterator[zipfile.ZipFile]:
    """Open a .zip and check its list of files.

    Args:
        archive: the file.
        max_names: the largest size in bytes of its list of names.
        max_bytes: the largest size in bytes of all its files together, unpacked.

    Yields:
        The open archive. Reading a damaged file in the block raises an `ArchiveError` too.

    Raises:
        ArchiveError: the file is not a .zip, is damaged, or could do harm when it is unpacked.
        OSError: the file cannot be read.
    """
    with archive.open("rb") as stream:
        _check_end(archive, stream, max_names)
        try:
            with zipfile.ZipFile(stream) as opened:
                _check_entries(archive, opened.infolist(), max_bytes)
                yield opened
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
            raise ArchiveError(f"a damaged archive: {shown(error, 120)}; get it again", value=archive) from None


def unpack(archive: Path, folder: Path, wanted: Sequence[str], limit: int) -> tuple[str, list[str]]:
    """Unpack the wanted files of an export.

    Args:
        archive: the .zip.
        folder: an empty folder. It gets the wanted files of the archive under their plain names, and nothing else.
        wanted: names of files; the archive must hold the first one once, in the export's folder.
        limit: the largest size in bytes of one file.

    Returns:
        The export's folder in the archive ("", or such as "name/"), and the sorted names in it.

    Raises:
        UserError: the archive cannot be read, holds no export, or is refused by `open_zip`.
    """
    try:
        with open_zip(archive, MAX_NAMES, MAX_BYTES) as opened:
            return _unpack(archive, opened, folder, wanted, limit)
    except OSError as error:
        raise UserError(f"cannot be read or unpacked ({error.strerror or error})", value=archive) from None


def _check_end(archive: Path, stream: BinaryIO, max_names: int) -> None:
    """Check the size of the list of names, at the place where `zipfile` will look for it.

    Raises:
        ArchiveError: the list is larger than `max_names` bytes, or missing.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 66_000))
    tail = stream.read()
    plain = tail[-22:]  # as zipfile: first an end record without a comment, then the last signature
    at = len(tail) - 22 if plain[:4] == b"PK\5\6" and plain[-2:] == b"\0\0" else tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise ArchiveError("not a .zip archive, or truncated; get it again", value=archive)
    entries, names = (
        int.from_bytes(tail[at + 10 : at + 12], "little"),
        int.from_bytes(tail[at + 12 : at + 16], "little"),
    )
    if names > max_names or entries == 0xFFFF or tail[max(0, at - 20) :][:4] == b"PK\6\7":
        raise ArchiveError("lists more files than such an archive has; do not unpack it", value=archive)
    stream.seek(0)


def _check_entries(archive: Path, entries: list[zipfile.ZipInfo], max_bytes: int) -> None:
    for entry in entries:
        if fault := _entry_fault(entry):
            raise ArchiveError(f"{shown(entry.orig_filename)}: {fault}; do not unpack it", value=archive)
    if sum(entry.file_size for entry in entries) > max_bytes:
        raise ArchiveError(f"unpacks to more than {decimal(max_bytes)}; do not unpack it", value=archive)


def check_names(archive: Path, paths: Collection[PurePosixPath]) -> None:
    """Check that no two files of an archive would be unpacked to one file.

    Raises:
        ArchiveError: two paths are equal; A/b and a/b are equal on many systems.
    """
    if len({str(path).casefold() for path in paths}) < len(paths):
        raise ArchiveError("holds two files of one name; do not unpack it", value=archive)


def _entry_fault(entry: zipfile.ZipInfo) -> str | None:
    """Return what is wrong with an entry by its header, or None."""
    name = entry.orig_filename  # `filename` ends at a zero byte, and has slashes for backslashes on Windows
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if "\\" in name or PureWindowsPath(name).drive or name.startswith("/") or ".." in name.split("/"):
        return "a name that leaves the folder it is unpacked into"
    if UNPRINTABLE.search(name) or name in ("", "."):
        return "an unprintable name"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or a device, not a file"
    if entry.flag_bits & 0x1:
        return "encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"packed by method {entry.compress_type}; only stored and deflated files are supported"
    if entry.file_size > max(SMALL, RATIO * entry.compress_size):
        return f"a bomb: {entry.compress_size:,} bytes that unpack to {entry.file_size:,}"
    return None


def _unpack(
    archive: Path, opened: zipfile.ZipFile, folder: Path, wanted: Sequence[str], limit: int
) -> tuple[str, list[str]]:
    names = opened.namelist()
    check_names(archive, [PurePosixPath(name) for name in names])
    roots = [name.removesuffix(wanted[0]) for name in names if f"/{name}".endswith(f"/{wanted[0]}")]
    if len(roots) != 1:
        count = f"{len(roots)} exports" if roots else "no export"
        message = f"{count} in it (it must hold {wanted[0]} once); give a .zip of one export"
        raise ArchiveError(message, value=archive)
    (root,) = roots
    for name in wanted:
        if root + name in names:
            _extract(archive, opened, opened.getinfo(root + name), folder / name, limit)
    inside = {name.removeprefix(root).split("/")[0] for name in names if name.startswith(root) and name != root}
    return root, sorted(inside)


def _extract(archive: Path, opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, limit: int) -> None:
    too_large = ArchiveError(f"{entry.filename}: more than the {limit:,} bytes allowed", value=archive)
    if entry.file_size > limit:
        raise too_large
    with opened.open(entry) as source, path.open("xb") as target:
        remaining = limit
        while remaining >= 0 and (chunk := source.read(1 << 20)):  # its header may give a smaller size
            remaining -= len(chunk)
            target.write(chunk)
        if remaining < 0:
            raise too_large
