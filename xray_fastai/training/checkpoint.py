"""Writes and reads a fit's checkpoints: each is written completely or not at all, without pickle, with checksums.

    checkpoint/settings.json                  the fit's settings, written at its start
               00012.json                     counters, history, random states, and the list of its files
               00012.model.safetensors        the weights after that epoch
               00012.optimizer.safetensors    Adam's averages
               00007.model.safetensors        the best epoch's weights: that epoch's own file, kept; or
                                              00008.best.model.safetensors, if epoch 7 has no checkpoint
               00007.outputs.safetensors      its validation outputs

The networks of an ensemble have such files in a folder each, `member-1`, `member-2`, ..., beside `start.safetensors`,
the weights that they start from. The last checkpoint of a network that is done holds its best weights and outputs.

In the frozen phase the backbone is written once, and then only the head. The `.json` file is written last;
it lists the checkpoint's files with size and CRC-32. The two newest checkpoints are kept.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from xray_fastai.export.run_folder import SETTINGS_FILE, Reservation
from xray_fastai.system.errors import UserError, is_write_error, reason
from xray_fastai.training.checked_files import checksum, read_json, write_json, write_tensors

FORMAT = 2
"""The version of the layout; a checkpoint of another version is refused."""

Tensors = dict[str, torch.Tensor]
Parts = dict[str, Tensors]
"""Tensors by the part of the file name (`model`, `head`, `backbone`)."""

UNCHANGING = "backbone"
"""The part that does not change in the frozen phase and is written once."""


@dataclass(frozen=True)
class Best:
    """Holds the best epoch so far."""

    row: int  # its index in the history
    parts: Parts  # its weights, on the CPU
    outputs: Tensors  # logits (validation images, classes) and targets (validation images,)


@dataclass
class Saved:
    """Holds a checkpoint as it was read."""

    state: dict[str, Any]
    weights: Tensors
    optimizer: Tensors  # empty between two phases
    best: Tensors
    outputs: Tensors  # empty if there was no best epoch yet
    best_row: int | None  # the best epoch's index in the history

    def is_done(self, phases: Sequence[tuple[str, int]]) -> bool:
        """Return whether it is the last of a network: all phases, as in `Plan`, have ended."""
        return self.state["phase"] == len(phases)


class Checkpoints:
    """Writes a fit's checkpoints in a thread while the next epoch trains; the context waits for it at the end."""

    def __init__(
        self,
        run: Reservation,  # its folder is kept after an error, once it has a checkpoint
        member: int | None = None,  # of an ensemble, from 0 on
    ):
        self.run, self.folder = run, run.checkpoint
        if member is not None:
            self.folder = run.checkpoint / f"member-{member + 1}"
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.number = 0  # of the newest checkpoint
        self.files: dict[str, dict] = {}  # of the newest checkpoint: name -> size, CRC-32
        self.best: dict[str, Any] | None = None  # of the newest checkpoint: row, weights (files), outputs (file)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.join()

    def keep(self, settings: dict[str, Any]) -> None:
        """Write the settings that a fit begins with.

        Raises:
            UserError: they cannot be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            write_json(self.folder / SETTINGS_FILE, {"format": FORMAT, **settings})
        except OSError as error:
            raise self._write_error(error) from None

    def keep_tensors(self, name: str, tensors: Tensors) -> dict[str, int] | None:
        """Write tensors beside the settings, and return the file's size and checksum; None if there are none.

        Raises:
            UserError: they cannot be written.
        """
        try:
            return write_tensors(self.folder / name, tensors) if tensors else None
        except (OSError, SafetensorError) as error:
            raise self._write_error(error) from None

    def take_over(self, folder: Path) -> None:
        """Move the checkpoints of an unfinished fit from `folder` into this run."""
        if folder != self.folder:
            try:
                os.rename(folder, self.folder)
            except OSError as error:
                raise UserError(f"{folder}: cannot be moved to {self.folder} ({error.strerror})") from None
            self.run.resumable = True

    def begin(self) -> None:
        """Make the folder of a member, and delete what it holds: what a network wrote that is trained again.

        Raises:
            UserError: it cannot be written to.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            self._delete_all_but(set())
        except OSError as error:
            raise self._write_error(error) from None
        self.number, self.files, self.best = 0, {}, None

    def keep_newest(self) -> None:
        """Delete all but the newest checkpoint, which is on the disk."""
        self._delete_all_but({*self.files, f"{self.number:05}.json"})

    @property
    def failed(self) -> bool:
        return self.error is not None

    def has_backbone(self) -> bool:
        """Return whether a checkpoint has written the backbone already."""
        return any(f".{UNCHANGING}." in name for name in self.files)

    def save(self, state: dict[str, Any], parts: Parts | None, optimizer: Tensors, best: Best | None):
        """Start to write a checkpoint; the tensors must not change afterwards.

        Args:
            state: everything but tensors, as JSON.
            parts: the weights; None if they are the best epoch's.
            optimizer: its tensors.
            best: the best epoch, if there is one.

        Raises:
            UserError: the previous checkpoint could not be written.
        """
        self.wait()
        self.number += 1
        new: Parts = {}

        def named(parts: Parts, of: str = "") -> list[str]:
            names = []
            for part, tensors in parts.items():
                kept = None
                if part == UNCHANGING:
                    kept = next((name for name in [*self.files, *new] if f".{part}." in name), None)
                names.append(kept or f"{self.number:05}{of}.{part}.safetensors")
                if kept is None:
                    new[names[-1]] = tensors
            return names

        if best is not None and (self.best is None or self.best["row"] != best.row):
            new[outputs := f"{self.number:05}.outputs.safetensors"] = best.outputs
            of = "" if parts is None else ".best"  # an epoch since the previous checkpoint, but not this one
            self.best = {"row": best.row, "weights": named(best.parts, of), "outputs": outputs}
        weights = self.best["weights"] if parts is None else named(parts)
        if optimizer:
            new[f"{self.number:05}.optimizer.safetensors"] = optimizer
        manifest = {"format": FORMAT, "weights": weights, "best": self.best, "state": state}
        kept = {*weights, *(self.best["weights"] + [self.best["outputs"]] if self.best else [])} - new.keys()
        files = {name: self.files[name] for name in kept}
        earlier, self.files = set(self.files), files
        self.thread = threading.Thread(
            target=self._write, args=(self.number, manifest, new, files, earlier), name="checkpoint"
        )
        self.thread.start()

    def join(self) -> None:
        """Wait for the thread that writes."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def wait(self) -> None:
        """Wait until the checkpoint is on the disk.

        Raises:
            UserError: it could not be written; the previous checkpoint is unchanged.
        """
        self.join()
        if self.error is not None:
            raise self._write_error(self.error) if is_write_error(self.error) else self.error from None

    def _write_error(self, error: Exception) -> UserError:
        return UserError(
            f"{self.run.partial}: a checkpoint could not be written ({reason(error)}); "
            "free space, or check that the folder exists and is writable"
        )

    def _write(self, number: int, manifest: dict, new: Parts, files: dict[str, dict], earlier: set[str]) -> None:
        try:
            # the previous checkpoint stays until this one is complete
            self._delete_all_but(earlier | {SETTINGS_FILE, f"{number - 1:05}.json"})
            for name, tensors in new.items():
                files[name] = write_tensors(self.folder / name, tensors)
            write_json(self.folder / f"{number:05}.json", manifest | {"files": files})
            self.run.resumable = True
        except Exception as error:  # `wait` raises it, in the fit's own thread
            self.error = error

    def _delete_all_but(self, needed: set[str]) -> None:
        """Delete older checkpoints, and temporary files that a killed process left."""
        for file in self.folder.iterdir():
            if file.name not in needed:
                file.unlink()

    def load(self, folder: Path | None = None) -> tuple[Saved | None, list[str]]:
        """Read the newest checkpoint that is not damaged.

        Args:
            folder: where the checkpoints are, if `take_over` has not moved them yet.

        Returns:
            The checkpoint, or None if none was written; and what is wrong with each newer one.

        Raises:
            UserError: all checkpoints are damaged.
        """
        folder = folder or self.folder
        saved, faults = self.newest(folder)
        if saved is None and faults:
            raise UserError(
                f"{faults[0]}, and no undamaged checkpoint is left; delete {folder.parent}, and start a new fit"
            )
        return saved, faults

    def newest(self, folder: Path) -> tuple[Saved | None, list[str]]:
        """Read the newest checkpoint of a folder that is not damaged, as `load`; None if all are damaged, too."""
        faults: list[str] = []
        for path in sorted(folder.glob("[0-9]*.json"), reverse=True):
            try:
                return self._read(path), faults
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                faults.append(f"{path}: damaged ({reason(error)})")
        return None, faults

    def _read(self, path: Path) -> Saved:
        manifest = read_json(path)
        check_format(path, manifest["format"])
        files, best = manifest["files"], manifest["best"]
        for name, known in files.items():
            if Path(name).name != name:
                raise ValueError(f"{name} is not a file name")
            if checksum(path.with_name(name)) != known:
                raise ValueError(f"{name} has changed since it was written")

        def merged(names: list[str]) -> Tensors:
            # cloned: a tensor that was read may be mapped to its file, which is deleted later
            return {k: t.clone() for name in names if name in files for k, t in load_file(path.with_name(name)).items()}

        self.number, self.files, self.best = int(path.stem), files, best
        return Saved(
            manifest["state"],
            weights=merged(manifest["weights"]),
            optimizer=merged([f"{path.stem}.optimizer.safetensors"]),
            best=merged(best["weights"] if best else []),
            outputs=merged([best["outputs"]] if best else []),
            best_row=best["row"] if best else None,
        )


def kept_settings(folder: Path) -> dict[str, Any]:
    """Read the settings that `Checkpoints.keep` wrote.

    Raises:
        UserError: they are damaged, or of another version.
    """
    path = folder / SETTINGS_FILE
    try:
        kept = read_json(path)
        check_format(path, kept["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({reason(error)}); delete {folder.parent}, and start a new fit") from None
    return kept


def check_format(path: Path, version: int) -> None:
    """Check that a file has this version's format.

    Raises:
        UserError: it has another.
    """
    if version > FORMAT:
        raise UserError(f"{path}: written by a newer version (format {version}); update xray-fastai")
    if version < FORMAT:
        raise UserError(
            f"{path}: written by an older version (format {version}), which cannot be resumed; delete {path.parent}, "
            "and start a new fit"
        )
