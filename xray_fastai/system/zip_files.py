"""A .zip from others is looked at before anything of it is unpacked; of an export's, no more than needed is.

`zipfile` reads the whole list of names before it answers, so that list's size is bounded first (APPNOTE.TXT 6.3.10,
4.3.16: the end of the archive tells it).
"""

import os
import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

from xray_fastai.system.errors import UserError
from xray_fastai.system.text import UNPRINTABLE, shown

NAMES = 1_000_000
"""Bytes that the list of names may have; that of an export with all its evaluations has some 3,000."""
BYTES = 4_000_000_000
"""What all files together may become; an export of the largest network, learner.pkl included, has 350 MB."""
RATIO, SMALL = 100, 100_000_000
"""A file that becomes more than so many bytes, and so many times its packed size, is a bomb: weights hardly shrink."""


def unpack(archive: Path, folder: Path, wanted: Sequence[str], limit: int) -> tuple[str, list[str]]:
    """Take the wanted files of an export out of an archive.

    Args:
        archive: the .zip.
        folder: an empty one; gets the wanted files that are there, by their plain names, and nothing else.
        wanted: names of files; the first is the one by which the export is found.
        limit: bytes that one may have.

    Returns:
        The export's folder in the archive ("", or as "name/"), and the names in it, sorted.

    Raises:
        UserError: not a .zip, damaged, no export in it, or made to do harm to who unpacks it.
    """
    try:
        with archive.open("rb") as stream:
            check_end(archive, stream, NAMES)
            with zipfile.ZipFile(stream) as opened:
                return _unpack(archive, opened, folder, wanted, limit)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
        raise UserError(f"{archive}: a damaged archive: {shown(error, 120)}; get it anew") from None
    except OSError as error:
        raise UserError(f"{archive}: can't be read or unpacked ({error.strerror or error})") from None


def check_end(archive: Path, stream: BinaryIO, most: int) -> None:
    """See that the list of names can be read: where `zipfile` will look for its size, that is at most so many bytes.

    Raises:
        UserError: it is larger, or there is none.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 66_000))
    tail = stream.read()
    plain = tail[-22:]  # as zipfile does: first an end without a comment, then the last mark
    at = len(tail) - 22 if plain[:4] == b"PK\5\6" and plain[-2:] == b"\0\0" else tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise UserError(f"{archive}: not a .zip archive, or cut short; get it anew")
    entries, names = (
        int.from_bytes(tail[at + 10 : at + 12], "little"),
        int.from_bytes(tail[at + 12 : at + 16], "little"),
    )
    if names > most or entries == 0xFFFF or tail[max(0, at - 20) :][:4] == b"PK\6\7":
        raise UserError(f"{archive}: lists more files than such an archive has; don't unpack it")
    stream.seek(0)


def _unpack(
    archive: Path, opened: zipfile.ZipFile, folder: Path, wanted: Sequence[str], limit: int
) -> tuple[str, list[str]]:
    entries = opened.infolist()
    for entry in entries:
        if fault := entry_fault(entry):
            raise UserError(f"{archive}: {shown(entry.orig_filename)}: {fault}; don't unpack it")
    if sum(entry.file_size for entry in entries) > BYTES:
        raise UserError(f"{archive}: becomes more than {BYTES:,} bytes; don't unpack it")
    names = [entry.filename for entry in entries]
    if len({name.casefold() for name in names}) < len(names):
        raise UserError(f"{archive}: holds two files of one name; don't unpack it")
    roots = [name.removesuffix(wanted[0]) for name in names if f"/{name}".endswith(f"/{wanted[0]}")]
    if len(roots) != 1:
        there = f"{len(roots)} exports" if roots else "no export"
        raise UserError(f"{archive}: {there} in it (it should hold {wanted[0]} once); give a .zip of one export")
    (root,) = roots
    for entry in entries:
        name = entry.filename.removeprefix(root)
        if entry.filename == root + name and name in wanted:
            _extract(archive, opened, entry, folder / name, limit)
    inside = {name.removeprefix(root).split("/")[0] for name in names if name.startswith(root) and name != root}
    return root, sorted(inside)


def _extract(archive: Path, opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, limit: int) -> None:
    if entry.file_size > limit:
        raise UserError(f"{archive}: {entry.filename}: {entry.file_size:,} bytes, more than the {limit:,} it may have")
    with opened.open(entry) as source, path.open("xb") as target:
        left = limit
        while left >= 0 and (part := source.read(1 << 20)):
            left -= len(part)
            target.write(part)
        if left < 0:
            raise UserError(f"{archive}: {entry.filename}: more than the {limit:,} bytes that it may have")


def entry_fault(entry: zipfile.ZipInfo) -> str | None:
    """What is wrong with an entry, before it is opened."""
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
        return f"packed by method {entry.compress_type}; plain and deflated files are taken"
    if entry.file_size > max(SMALL, RATIO * entry.compress_size):
        return f"a bomb: {entry.compress_size:,} bytes that become {entry.file_size:,}"
    return None
