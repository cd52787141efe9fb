"""Download and unpack the public collection of chest X-rays, with its licence and citation.

Kermany, Goldbaum, Cai et al., Identifying Medical Diagnoses and Treatable Diseases by Image-Based Deep Learning, Cell
172 (2018), 1122-1131. The archive has train/ and test/. Kaggle's copy has the same images, with 16 of train/ in val/.

Two files exist beside the target folder until everything is complete:

    chest_xray.zip.part    the part of the archive that was downloaded
    .chest_xray.unpacking  the unpacked images; the folder is renamed when all of them are there
"""

import contextlib
import os
import shlex
import shutil
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.filesize import decimal

from xray_fastai.data.images import EXTENSIONS, is_hidden
from xray_fastai.data.sources.download import DownloadError, discard, fetch
from xray_fastai.system.errors import UserError, reason
from xray_fastai.system.files import acquire, release
from xray_fastai.system.progress import track
from xray_fastai.system.signals import sigterm_raises
from xray_fastai.system.text import count_of, shown
from xray_fastai.system.zip_files import ArchiveError, check_names, open_zip

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
"""The smallest and largest size in bytes of the archive at `ADDRESS`: about 1.2 GB; the exact size is not published."""
PUBLISHED = {
    ("train", "NORMAL"): 1349,
    ("train", "PNEUMONIA"): 3883,
    ("test", "NORMAL"): 234,
    ("test", "PNEUMONIA"): 390,
}
"""The numbers of images in the paper. Those of val/ count as train/."""
SPLITS = ("train", "val", "test")
MAX_NAMES = 50_000_000
"""Bytes of the archive's list of names; that of 5,856 images, with as many files in __MACOSX, has about 2,000,000."""
MAX_BYTES = 20_000_000_000
"""Bytes of all unpacked files; Kaggle's archive, which has each image twice, unpacks to 2.5 GB."""


@dataclass(frozen=True)
class Obtained:
    """The unpacked collection."""

    folder: Path
    counts: dict[tuple[str, str], int]  # images by split and class
    left_out: int  # files of the archive that are not images of the collection

    @property
    def differences(self) -> list[str]:
        """The differences from the published numbers of images, as text."""
        counts = Counter()
        for (split, label), count in self.counts.items():
            counts["train" if split == "val" else split, label] += count
        return [
            f"{split}/{label} {counts[split, label]:,} instead of {PUBLISHED.get((split, label), 0):,}"
            for split, label in sorted(counts.keys() | PUBLISHED.keys(), reverse=True)
            if counts[split, label] != PUBLISHED.get((split, label), 0)
        ]

    def __str__(self) -> str:
        lines = []
        for split in SPLITS:
            counts = [f"{n:,} {label}" for (where, label), n in sorted(self.counts.items()) if where == split]
            lines += [f"{split:<14}{', '.join(counts)}"] if counts else []
        if self.left_out:
            lines.append(f"{'left out':<14}{count_of(self.left_out, 'file')} of the archive that belong to no split")
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
    """Download the collection's archive or resume its download, check it, and unpack it.

    Args:
        folder: gets train/ and test/, and val/ if the archive has one; it must be empty or not exist.
        url: another address of the archive.
        archive: an archive on this machine, used instead of a download; it is not changed.

    Raises:
        UserError: there is no connection or no space, or the archive is damaged, wrong or harmful, or (from the
            published address) it has other numbers of images than published. A usable partial download is kept, so that
            the same command resumes it. No image is left unpacked.
    """
    folder = Path(folder)
    if url is not None and archive is not None:
        raise UserError("give this or --archive, not both", option="url", value=url)
    _check_place(folder)
    part = folder.with_name(f"{folder.name}.zip.part")
    if archive is not None:
        _check_archive(Path(archive))
        with sigterm_raises(), _locked(part):
            return _unpack(Path(archive), folder)
    with sigterm_raises(), _locked(part), _noting(part):
        try:
            fetch(url or ADDRESS, part, b"PK\3\4", lambda size, left: _check_room(folder, url is None, size, left))
        except OSError as error:
            text = f"cannot be written ({reason(error)}); free some space, or give another folder"
            raise UserError(text, value=part) from None
        except DownloadError as error:
            error.add_note(f"or download it by a browser, or by '{KAGGLE}', and give the .zip by --archive FILE")
            raise
        try:
            obtained = _unpack(part, folder, as_published=url is None)
        except ArchiveError as error:
            discard(part)
            error.add_note("it was deleted; try again, or give another by --url or --archive")
            raise
        discard(part)
        return obtained


def _check_place(folder: Path) -> None:
    """Check that the folder is empty or does not exist, and create the folder above it."""
    try:
        exists = folder.is_symlink() or folder.exists()
        if exists and not (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())):
            raise UserError("already exists; give a new folder or an empty one", value=folder)
        if folder.resolve() == Path.cwd():
            raise UserError("the current folder; give a new one", value=folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be created ({error.strerror}); give another folder", value=folder) from None


def _check_archive(archive: Path) -> None:
    try:
        if not stat.S_ISREG(archive.stat().st_mode):
            raise UserError("not a file; give the collection's .zip", option="archive", value=archive)
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror}); give the collection's .zip", option="archive", value=archive
        ) from None


def _check_room(folder: Path, as_published: bool, size: int, left: int) -> None:
    """Check the archive's size and the free space before the download.

    The X-rays are JPEG files, which an archive does not compress, so the space is needed twice.
    """
    if as_published and not SIZES[0] <= size <= SIZES[1]:
        message = f"has {decimal(size)}, but the collection has about 1.2 GB; give another address by --url"
        raise UserError(message, value=ADDRESS)
    _check_free(folder, left + size, "for the archive and its images")


def _check_free(folder: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        message = f"{decimal(free)} free, {decimal(needed)} needed {what}; free some space"
        raise UserError(message, value=folder.parent)


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[None]:
    """Allow one download at a time into the same file."""
    try:
        lock = acquire(part.with_name(f"{part.name}.lock"), timeout=0)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror}); give another folder", value=part) from None
    if lock is None:
        raise UserError("another download writes this file; wait for it, or give another folder", value=part)
    try:
        yield
    finally:
        release(lock)


@contextlib.contextmanager
def _noting(part: Path) -> Iterator[None]:
    """Add to any error a note that says what is kept of a download."""
    try:
        yield
    except BaseException as error:
        if part.is_file() and (size := part.stat().st_size):
            error.add_note(f"{part} ({decimal(size)}) is kept; the same command resumes it")
        raise


def _unpack(archive: Path, folder: Path, as_published: bool = False) -> Obtained:
    """Unpack the images into a folder beside the target, and rename that folder when all of them are there.

    Raises:
        ArchiveError: the archive is damaged or dangerous, or holds no collection.
        UserError: there is no space, or the numbers of images are not the published ones. The archive may be usable.
    """
    unpacked = folder.with_name(f".{folder.name}.unpacking")
    try:
        shutil.rmtree(unpacked, ignore_errors=True)  # of a process that was killed
        with open_zip(archive, MAX_NAMES, MAX_BYTES) as opened:
            images, others = _contents(archive, opened)
            obtained = Obtained(folder, dict(Counter(path.parts[:2] for path in images)), len(others))
            if as_published and obtained.differences:
                differences = shown("; ".join(obtained.differences), 200)
                message = f"not as published: {differences}; to use it as it is, give it by --archive"
                raise UserError(message, value=archive)
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
        message = f"cannot be written, or {archive} cannot be read ({reason(error)})"
        raise UserError(message, value=folder) from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return obtained


def _extract(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path | None) -> None:
    """Read a file to its end, where `zipfile` checks its CRC-32, and write it to `path`, if there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    with opened.open(entry) as source, open(os.devnull, "wb") if path is None else path.open("xb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def _contents(
    archive: Path, opened: zipfile.ZipFile
) -> tuple[dict[PurePosixPath, zipfile.ZipInfo], list[zipfile.ZipInfo]]:
    """Find the images by their path in the collection (train/NORMAL/IM-0115-0001.jpeg), and the other files."""
    entries = [entry for entry in opened.infolist() if not entry.is_dir()]
    by_root: dict[PurePosixPath, list[tuple[PurePosixPath, zipfile.ZipInfo]]] = {}
    for entry in entries:
        path = PurePosixPath(entry.filename)
        at = next((i for i, name in enumerate(path.parts[:-2]) if name in SPLITS), None)
        if at is not None and path.suffix.lower() in EXTENSIONS and not any(map(is_hidden, path.parts)):
            root = PurePosixPath(*path.parts[:at])
            by_root.setdefault(root, []).append((path.relative_to(root), entry))
    # Kaggle's archive has a second chest_xray inside the first: take the outermost
    depths = {root: len(root.parts) for root, files in by_root.items() if any(p.parts[0] == "train" for p, _ in files)}
    roots = [root for root in depths if depths[root] == min(depths.values())]
    if len(roots) != 1:
        content = "no collection in it: no train/CLASS/IMAGE" if not roots else f"{len(roots)} collections in it"
        raise ArchiveError(f"{content}; give the collection's .zip", value=archive)
    files = by_root[roots[0]]
    check_names(archive, [path for path, _ in files])
    images = dict(files)
    taken = set(map(id, images.values()))
    return images, [entry for entry in entries if id(entry) not in taken]
