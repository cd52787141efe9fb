"""The public collection that this work is about: where it is, how it is got and unpacked, what may be done with it.

Kermany, Goldbaum, Cai et al., Identifying Medical Diagnoses and Treatable Diseases by Image-Based Deep Learning, Cell
172 (2018), 1122-1131. Its archive has train/ and test/; Kaggle's copy has the same images, 16 of train/ as val/.

    chest_xray.zip.part    beside the folder, until all is done: what has come of the archive
    .chest_xray.unpacking  beside it, too: the images, until they are all there and get the folder's name in one step
"""

import contextlib
import os
import shlex
import shutil
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout
from rich.filesize import decimal

from xray_fastai.data.images import EXTENSIONS, is_hidden
from xray_fastai.data.sources.download import DownloadError, discard, fetch
from xray_fastai.system.errors import UserError, reason
from xray_fastai.system.progress import track
from xray_fastai.system.signals import sigterm_raises
from xray_fastai.system.text import count_of, shown
from xray_fastai.system.zip_files import check_end, entry_fault

ADDRESS = (
    "https://data.mendeley.com/public-files/datasets/rscbjbr9sj/files/"
    "f12eaf6d-6023-432f-acc9-80c9d7393433/file_downloaded"
)
LICENCE = "CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/): use it as you like, and name its authors"
CITATION = (
    "Kermany, Daniel; Zhang, Kang; Goldbaum, Michael (2018), “Labeled Optical Coherence Tomography (OCT) and Chest "
    "X-Ray Images for Classification”, Mendeley Data, V2, doi: 10.17632/rscbjbr9sj.2"
)
KAGGLE = "kaggle datasets download paultimothymooney/chest-xray-pneumonia"
SIZES = (1_000_000_000, 1_500_000_000)
"""Bytes that the archive at `ADDRESS` may have: it is said to have 1.2 GB, to the byte is not published."""
PUBLISHED = {
    ("train", "NORMAL"): 1349,
    ("train", "PNEUMONIA"): 3883,
    ("test", "NORMAL"): 234,
    ("test", "PNEUMONIA"): 390,
}
"""Images, by the paper; those of val/ are counted to train/."""
SPLITS = ("train", "val", "test")
NAMES = 50_000_000
"""Bytes that an archive's list of names may have; those of 5,856 images, with as many files in __MACOSX, have some
2,000,000."""
BYTES = 20_000_000_000
"""What all files of an archive together may become; Kaggle's, which has each image twice, becomes 2.5 GB."""


class _Faulty(UserError):
    """An archive that is of no use."""


@dataclass(frozen=True)
class Obtained:
    """A collection that was unpacked."""

    folder: Path
    counts: dict[tuple[str, str], int]  # images, by split and class
    left: int  # files of the archive that are none of its images

    @property
    def differences(self) -> list[str]:
        """Where the numbers of images are not the published ones."""
        found = Counter()
        for (split, label), count in self.counts.items():
            found["train" if split == "val" else split, label] += count
        return [
            f"{split}/{label} {found[split, label]:,} instead of {PUBLISHED.get((split, label), 0):,}"
            for split, label in sorted(found.keys() | PUBLISHED.keys(), reverse=True)
            if found[split, label] != PUBLISHED.get((split, label), 0)
        ]

    def __str__(self) -> str:
        lines = []
        for split in SPLITS:
            counts = [f"{n:,} {label}" for (where, label), n in sorted(self.counts.items()) if where == split]
            lines += [f"{split:<14}{', '.join(counts)}"] if counts else []
        if self.left:
            lines.append(f"{'left out':<14}{count_of(self.left, 'file')} of the archive that belong to no split")
        if self.differences:
            lines.append(f"{'WARNING':<14}not as published: {shown('; '.join(self.differences), 300)}")
        return "\n".join([
            *lines,
            f"{'licence':<14}{LICENCE}",
            f"{'citation':<14}{CITATION}",
            f"{'written':<14}{self.folder}",
            f"next: xray-fastai data check {shlex.quote(str(self.folder))}",
            f"      xray-fastai fit --data {shlex.quote(str(self.folder))}",
        ])  # fmt: skip


def obtain(folder: str | Path, url: str | None = None, archive: str | Path | None = None) -> Obtained:
    """Download the collection's archive, or go on with its download, check it, and unpack it.

    Args:
        folder: gets train/ and test/, and val/ where there is one; not there yet, or empty.
        url: another address of the archive.
        archive: the archive, where it is here already; it stays as it is.

    Raises:
        UserError: no connection, no room, a damaged, wrong or harmful archive, or (from the address that it was
            published at) not as many images as were published. What was downloaded stays, to go on from, unless it is
            of no use; of the images, none.
    """
    folder = Path(folder)
    if url is not None and archive is not None:
        raise UserError("give this or --archive, not both", option="url", value=url)
    _check_place(folder)
    part = folder.with_name(f"{folder.name}.zip.part")
    if archive is not None:
        _check_archive(Path(archive))
        with sigterm_raises(), _alone(part):
            return _unpack(Path(archive), folder)
    with sigterm_raises(), _alone(part), _kept(part):
        try:
            fetch(url or ADDRESS, part, b"PK\3\4", lambda size, left: _check_room(folder, url is None, size, left))
        except OSError as error:
            raise UserError(f"{part}: can't be written ({reason(error)}); make room, or give another folder") from None
        except DownloadError as error:
            error.add_note(f"or get it by a browser, or by '{KAGGLE}', and give the .zip by --archive FILE")
            raise
        try:
            found = _unpack(part, folder, as_published=url is None)
        except _Faulty as error:
            discard(part)
            error.add_note("so it was removed; try again, or give another by --url or --archive")
            raise
        discard(part)
        return found


def _check_place(folder: Path) -> None:
    try:
        there = folder.is_symlink() or folder.exists()
        if there and not (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())):
            raise UserError(f"{folder}: is there already; give a new folder or an empty one")
        if folder.resolve() == Path.cwd():
            raise UserError(f"{folder}: the folder that you are in; give a new one")
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: can't be made ({error.strerror}); give another folder") from None


def _check_archive(archive: Path) -> None:
    try:
        if not stat.S_ISREG(archive.stat().st_mode):
            raise UserError("not a file; give the collection's .zip", option="archive", value=archive)
    except OSError as error:
        raise UserError(
            f"can't be read ({error.strerror}); give the collection's .zip", option="archive", value=archive
        ) from None


def _check_room(folder: Path, as_published: bool, size: int, left: int) -> None:
    """Before an archive is downloaded: X-rays are JPEG files, which no archive makes smaller, so it is needed twice."""
    if as_published and not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"{ADDRESS}: has {decimal(size)}, where the collection has some 1.2 GB")
    _check_free(folder, left + size, "for the archive and its images")


def _check_free(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise UserError(f"{folder.parent}: {decimal(free)} free, {decimal(needed)} needed {what}; make room")


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[None]:
    """One download at a time into the same file."""
    lock = FileLock(part.with_name(f"{part.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{part}: another download is at it; wait for it, or give another folder") from None
    except OSError as error:
        raise UserError(f"{part}: can't be written ({error.strerror}); give another folder") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


@contextlib.contextmanager
def _kept(part: Path) -> Iterator[None]:
    """Whatever ends it says what stays of a download."""
    try:
        yield
    except BaseException as error:
        if part.is_file() and (size := part.stat().st_size):
            error.add_note(f"{part} ({decimal(size)}) is kept, the same command goes on from there")
        raise


def _unpack(archive: Path, folder: Path, as_published: bool = False) -> Obtained:
    """Unpack the images beside the folder, and give them its name once they are all there.

    Raises:
        _Faulty: damaged, no collection, or made to do harm.
        UserError: no room, or not as published; the archive itself may be of use.
    """
    unpacked = folder.with_name(f".{folder.name}.unpacking")
    try:
        shutil.rmtree(unpacked, ignore_errors=True)  # of a process that was killed
        with _opened(archive) as opened:
            images, others = _contents(archive, opened)
            found = Obtained(folder, dict(Counter(path.parts[:2] for path in images)), len(others))
            if as_published and found.differences:
                told = shown("; ".join(found.differences), 200)
                raise UserError(f"{archive}: not as published: {told}; to take it as it is, give it by --archive")
            _check_free(folder, sum(entry.file_size for entry in images.values()), "to unpack the images")
            print(f"{'unpacking':<14}{count_of(len(images), 'image')}", flush=True)
            steps = [(entry, unpacked / path) for path, entry in images.items()]
            steps += [(entry, None) for entry in others]
            for entry, path in track(steps, "unpacking", len(steps)):
                _extract(opened, entry, path)
        if folder.exists():
            folder.rmdir()  # empty
        unpacked.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: can't be written, or {archive} not read ({reason(error)})") from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return found


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    with archive.open("rb") as stream:
        try:
            check_end(archive, stream, NAMES)
        except UserError as error:
            raise _Faulty(str(error)) from None
        try:
            with zipfile.ZipFile(stream) as opened:
                yield opened
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
            raise _Faulty(f"{archive}: a damaged archive: {shown(error, 120)}") from None


def _extract(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path | None) -> None:
    """Read a file to its end, where `zipfile` compares its CRC-32; None writes it nowhere."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    with opened.open(entry) as source, open(os.devnull, "wb") if path is None else path.open("xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def _contents(
    archive: Path, opened: zipfile.ZipFile
) -> tuple[dict[PurePosixPath, zipfile.ZipInfo], list[zipfile.ZipInfo]]:
    """The images by their place in the collection (train/NORMAL/IM-0115-0001.jpeg), and the other files."""
    for entry in opened.infolist():
        if fault := entry_fault(entry):
            raise _Faulty(f"{archive}: {shown(entry.orig_filename)}: {fault}; don't unpack it")
    entries = [entry for entry in opened.infolist() if not entry.is_dir()]
    if sum(entry.file_size for entry in entries) > BYTES:
        raise _Faulty(f"{archive}: becomes more than {decimal(BYTES)}; don't unpack it")
    by_root: dict[PurePosixPath, list[tuple[PurePosixPath, zipfile.ZipInfo]]] = {}
    for entry in entries:
        path = PurePosixPath(entry.filename)
        at = next((i for i, name in enumerate(path.parts[:-2]) if name in SPLITS), None)
        if at is not None and path.suffix.lower() in EXTENSIONS and not any(map(is_hidden, path.parts)):
            root = PurePosixPath(*path.parts[:at])
            by_root.setdefault(root, []).append((path.relative_to(root), entry))
    # the outermost: Kaggle's archive has a second chest_xray within the first
    depths = {root: len(root.parts) for root, found in by_root.items() if any(p.parts[0] == "train" for p, _ in found)}
    roots = [root for root in depths if depths[root] == min(depths.values())]
    if len(roots) != 1:
        what = "no collection in it: no train/CLASS/IMAGE" if not roots else f"{len(roots)} collections in it"
        raise _Faulty(f"{archive}: {what}")
    found = by_root[roots[0]]
    if len({str(path).casefold() for path, _ in found}) < len(found):
        raise _Faulty(f"{archive}: holds two files of one name; don't unpack it")
    images = dict(found)
    taken = set(map(id, images.values()))
    return images, [entry for entry in entries if id(entry) not in taken]
