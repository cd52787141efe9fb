"""List the images, with their true classes, that an export is evaluated or interpreted on, and say which of them its
fit has seen.

An export has a key of the content of each image of its fit: 6 bytes of a hash, with a salt of its own. So it grows by 8
bytes an image (5,232: 42 kB), and the keys of two exports cannot be compared. One of 100,000 other images is mistaken
for one of 5,232 with a probability of 2e-6. Who has an image can tell whether it was trained on, and no more. A file
that was saved again has another content, and is not found. (Hashes of what it shows are not stored: they show it,
blurred.)
"""

import base64
import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from xray_fastai.data.dataset import Collection, class_folders, class_of, find_root, read_split
from xray_fastai.data.exclusions import leave_out
from xray_fastai.data.patients import check_listed, numbered, patient_rule
from xray_fastai.data.sources.phantom import cached
from xray_fastai.system.errors import UserError
from xray_fastai.system.parallel import map_in_threads
from xray_fastai.system.text import count_of

KEY_BYTES = 6


@dataclass(frozen=True)
class Labelled:
    """The images of a split.

    `table` is like that of `dataset.read_split`.
    """

    table: pd.DataFrame
    notes: list[str]  # on images that were left out, and on those that the fit has seen
    seen: dict[str, int] | None  # images by their use in the fit, train or valid; None: the export does not know it


@dataclass(frozen=True)
class Request:
    """Which images are wanted."""

    data: str | Path | None  # the folder that holds the split; None is the data of the fit
    split: str | None  # train, test or valid; None: `data` itself holds the folders of the classes
    exclude: str | None = None  # a list of files to leave out (`exclusions`)
    patients: str | None = None  # a list of patients (`patients.patient_rule`); None: the fit's, if `data` is None


def file_key(file: str) -> str:
    """Return the key of a file in `model.json`: the first 12 hexadecimal digits of the SHA-256 of its relative name.

    The key is enough to find the validation files again. File names may hold a patient's name, so an export has none.
    """
    return hashlib.sha256(file.encode()).hexdigest()[:12]


def contents_of(data: Collection) -> dict[str, str]:
    """Return the keys of the contents of a fit's images for `model.json`: sorted, in base64, with their salt."""
    salt = secrets.token_bytes(8)
    return {
        "salt": salt.hex(),
        "train": _packed(data.train.digest, salt),
        "valid": _packed(data.valid.digest, salt),
    }


def _packed(digests: Iterable[str], salt: bytes) -> str:
    return base64.b64encode(b"".join(sorted({_content_key(digest, salt) for digest in digests}))).decode()


def _content_key(digest: str, salt: bytes) -> bytes:
    return hashlib.blake2b(bytes.fromhex(digest), key=salt, digest_size=KEY_BYTES).digest()


def _uses(table: pd.DataFrame, contents: dict[str, str]) -> np.ndarray:
    """Return for each image what the fit used its content for (N,): "train", "valid" or ""."""
    salt, uses = bytes.fromhex(contents["salt"]), {}
    for use in ("valid", "train"):
        packed = base64.b64decode(contents[use])
        uses |= {packed[i : i + KEY_BYTES]: use for i in range(0, len(packed), KEY_BYTES)}

    def use_of(path: str) -> str:
        with contextlib.suppress(OSError), open(path, "rb") as stream:  # the reader of the pixels reports an error
            return uses.get(_content_key(hashlib.file_digest(stream, _md5).hexdigest(), salt), "")
        return ""

    return np.array(list(map_in_threads(use_of, table.path)), dtype=object)


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)  # as `image_facts.Facts.digest`


def labelled_images(model: dict[str, Any], wanted: Request) -> Labelled:
    """List the images of a split.

    `valid` is exactly the files that the fit validated on, from train/ and val/. `train` is what it trained on: train/
    without these, and without what the fit left out.

    Args:
        model: the content of the export's `model.json`.
        wanted: which images. Classes may be missing.

    Raises:
        UserError: the folder or split is missing, a class is unknown to the model, validation files are missing, or no
            image is left.
    """
    split, contents = wanted.split, model["data"].get("contents")
    table, root = _listed(model, wanted)
    notes = []
    if wanted.exclude is not None:
        table, notes = leave_out(table, root, wanted.exclude)
    uses = None if contents is None else _uses(table, contents)
    if split == "train":
        table, uses, note = _trained_on(table, uses)
        notes += note
    seen = None if uses is None else {use: int((uses == use).sum()) for use in ("train", "valid")}
    if split in ("test", None) and seen is not None and any(seen.values()):
        notes.append(
            f"WARNING: of {count_of(len(table), 'image')}, the model was trained on {seen['train']:,} and chosen on "
            f"{seen['valid']:,}: expect less of new images"
        )
    return Labelled(table, notes, seen)


def _listed(model: dict[str, Any], wanted: Request) -> tuple[pd.DataFrame, Path]:
    """List the files of the split by their names, and return the folder that holds it."""
    settings, split = model["settings"], wanted.split
    folder = "train" if split == "valid" else split
    if split is None:
        root, folder = _class_root(wanted.data, model["classes"])
    elif wanted.data is None and model["data"]["rehearsal"]:
        root = cached()
    else:
        root = find_root(wanted.data, folder) if wanted.data is not None else _root_of_fit(settings["data"], folder)
    of_fit = wanted.patients is None and wanted.data is None
    rule = patient_rule(settings["patient_pattern"], settings.get("patients") if of_fit else wanted.patients)
    parts = [read_split(root, folder, model["classes"], rule, partial=True)]
    if split == "valid" and (root / "val").is_dir():
        parts.append(read_split(root, "val", model["classes"], rule, partial=True))
    table = numbered(pd.concat(parts, ignore_index=True))
    check_listed(table, wanted.patients)
    if split in ("test", None):
        return table, root
    keys = set(model["data"]["valid_files"])
    validated = table.file.map(file_key).isin(keys)
    if split == "train":
        if validated.all():
            raise UserError("fit validated on all of its images; choose another split", option="split", value=split)
        return table[~validated].reset_index(drop=True), root
    if (missing := len(keys) - validated.sum()) > 0:
        raise UserError(
            f"{missing} of the {len(keys)} files that the fit validated on are missing; give its data folder by data=",
            value=root,
        )
    return table[validated].reset_index(drop=True), root


def _root_of_fit(recorded: str, split: str) -> Path:
    """Return the folder that holds the split in the data folder of the fit.

    Raises:
        UserError: it is not there, or lacks the split; the user has not typed it, so the message says whose it is.
    """
    try:
        return find_root(recorded, split)
    except UserError as error:
        where = "" if os.path.isabs(recorded) else " from the folder in which fit ran (the export's fit.log names it)"
        raise UserError(
            f"the data folder of the fit, {recorded}{where}, cannot be used ({error.message}); give its images by data="
        ) from None


def _class_root(data: str | Path | None, classes: list[str]) -> tuple[Path, str]:
    """Return the parent and the name of a folder whose subfolders are classes of the model.

    Raises:
        UserError: there is no such folder, or it holds no class.
    """
    folder = Path(os.path.expanduser(data or ".")).resolve()
    if not folder.is_dir():
        raise UserError(f"no such folder; give one with the folders {', '.join(classes)}", option="data", value=data)
    names = [path.name for path in class_folders(folder)]
    if not {class_of(name) for name in names} & {class_of(name) for name in classes}:
        splits = [name for name in names if (folder / name).is_dir() and class_folders(folder / name)]
        advice = f"; did you mean {Path(str(data), splits[0])}?" if splits else ""
        held = f"it has {', '.join(names[:5])}" if names else "it has no folders"
        message = f"none of the folders {', '.join(classes)} is in it ({held}){advice}"
        raise UserError(message, option="data", value=data)
    return folder.parent, folder.name


def _trained_on(table: pd.DataFrame, uses: np.ndarray | None) -> tuple[pd.DataFrame, np.ndarray | None, list[str]]:
    """Keep the images that the fit trained on; return them, their uses, and notes."""
    if uses is None:
        return table, None, ["the export does not know what fit left out: such images may be among these"]
    kept = uses == "train"
    if not kept.any():
        message = "fit trained on none of these images, as they are now; give its data folder by data="
        raise UserError(message, option="split", value="train")
    left_out = int((~kept).sum())
    notes = [f"left out, as fit did not train on them: {count_of(left_out, 'image')}"] if left_out else []
    return table[kept].reset_index(drop=True), uses[kept], notes
