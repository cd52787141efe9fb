"""Checkpoints of a fit on disk: each written whole or not at all, read without pickle, checked before use.

    checkpoint/settings.json                  the fit's settings, from its start on
               00012.json                     what is no tensor: counters, history, random states, and its files
               00012.model.safetensors        the weights after that epoch
               00012.optimizer.safetensors    Adam's averages
               00007.model.safetensors        the best epoch's weights: that epoch's own file, kept
               00007.outputs.safetensors      its validation outputs

In the frozen phase the backbone is written once, and after each epoch the head alone. A checkpoint's `.json` is written
last; it names its files with size and CRC-32. The newest checkpoint and the one before it are kept.
"""

import json
import os
import shutil
import threading
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from xray_fastai.export.run_folder import CHECKPOINT, SETTINGS, Reservation
from xray_fastai.system.errors import UserError, reason
from xray_fastai.system.files import sync_folder

FORMAT = 2
"""The layout of a checkpoint; another is refused."""

Tensors = dict[str, torch.Tensor]
Parts = dict[str, Tensors]
"""Tensors by the file that they go into."""

UNCHANGING = "backbone"
"""The part that is written once."""


@dataclass(frozen=True)
class Best:
    """The best epoch so far."""

    row: int  # its place in the history
    parts: Parts  # its weights, on the CPU
    outputs: Tensors  # logits (validation images, classes) and targets (validation images,)


@dataclass
class Saved:
    """A checkpoint as it was read."""

    state: dict[str, Any]
    weights: Tensors
    optimizer: Tensors  # empty between two phases
    best: Tensors
    outputs: Tensors  # empty where there was no best epoch yet
    best_row: int | None  # its place in the history


class Checkpoints:
    """Writes a fit's checkpoints, in a thread of its own while the next epoch trains; as a context, waits for it."""

    def __init__(
        self,
        run: Reservation,  # whose folder stays, from the first checkpoint on
    ):
        self.run, self.folder = run, run.checkpoint
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.number = 0  # of the newest checkpoint
        self.files: dict[str, dict] = {}  # those of the newest checkpoint: name -> size, CRC-32
        self.best: dict[str, Any] | None = None  # row, weights (files), outputs (file), as in the newest checkpoint

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.join()

    def keep(self, settings: dict[str, Any]) -> None:
        """Write what a fit begins with.

        Raises:
            UserError: it can't be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            write_json(self.folder / SETTINGS, {"format": FORMAT, **settings})
        except OSError as error:
            raise self._unwritten(error) from None

    def take_over(self, folder: Path) -> None:
        """Go on in place of the fit that has left its checkpoints in `folder`."""
        if folder != self.folder:
            try:
                os.rename(folder, self.folder)
            except OSError as error:
                raise UserError(f"{folder}: can't be moved to {self.folder} ({error.strerror})") from None
            self.run.resumable = True

    @property
    def failed(self) -> bool:
        return self.error is not None

    def has_backbone(self) -> bool:
        """Whether the part that never changes is on the disk already."""
        return any(f".{UNCHANGING}." in name for name in self.files)

    def save(self, state: dict[str, Any], parts: Parts | None, optimizer: Tensors, best: Best | None):
        """Start writing a checkpoint; the tensors must not change any more.

        Args:
            state: what is no tensor, as JSON takes it.
            parts: the weights; None where they are the best epoch's.
            optimizer: its tensors.
            best: the best epoch, where there is one.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        self.number += 1
        new: Parts = {}

        def named(parts: Parts) -> list[str]:
            names = []
            for part, tensors in parts.items():
                kept = next((name for name in self.files if f".{part}." in name), None) if part == UNCHANGING else None
                names.append(kept or f"{self.number:05}.{part}.safetensors")
                if kept is None:
                    new[names[-1]] = tensors
            return names

        if best is not None and (self.best is None or self.best["row"] != best.row):
            new[outputs := f"{self.number:05}.outputs.safetensors"] = best.outputs
            self.best = {"row": best.row, "weights": named(best.parts), "outputs": outputs}
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
        """Let what was started end."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def wait(self) -> None:
        """Have what was started on the disk.

        Raises:
            UserError: it could not be written; the checkpoint before it stands.
        """
        self.join()
        if isinstance(self.error, OSError | SafetensorError):
            raise self._unwritten(self.error) from None
        if self.error is not None:
            raise self.error

    def _unwritten(self, error: Exception) -> UserError:
        return UserError(
            f"{self.run.partial}: a checkpoint could not be written ({reason(error)}); "
            "free space, or see that the folder is there and can be written to"
        )

    def _write(self, number: int, manifest: dict, new: Parts, files: dict[str, dict], earlier: set[str]) -> None:
        try:
            for stale in self.folder.iterdir():  # what the newest checkpoint doesn't need; that one stays till the next
                if stale.name not in earlier | {SETTINGS, f"{number - 1:05}.json"}:
                    stale.unlink()
            for name, tensors in new.items():
                files[name] = write_tensors(self.folder / name, tensors)
            write_json(self.folder / f"{number:05}.json", manifest | {"files": files})
            self.run.resumable = True
        except Exception as error:  # `wait` raises it, in the fit's own thread
            self.error = error
            with suppress(OSError):
                for half in self.folder.glob("*.tmp"):
                    half.unlink()

    def load(self, folder: Path | None = None) -> tuple[Saved | None, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with each newer one; None where none was written.

        Args:
            folder: where they are, if `take_over` has yet to bring them here.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        folder, faults = folder or self.folder, []
        for path in sorted(folder.glob("[0-9]*.json"), reverse=True):
            try:
                return self._read(path), faults
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                faults.append(f"{path}: damaged ({reason(error)})")
        if faults:
            raise UserError(f"{faults[0]}, and no other is whole; start anew, and delete {folder.parent}")
        return None, []

    def _read(self, path: Path) -> Saved:
        manifest = read_json(path)
        check_format(path, manifest["format"])
        files, best = manifest["files"], manifest["best"]
        for name, known in files.items():
            if Path(name).name != name:
                raise ValueError(f"{name} is no file name")
            if checked(path.with_name(name)) != known:
                raise ValueError(f"{name} is not as it was written")

        def merged(names: list[str]) -> Tensors:
            # cloned: what was read may be mapped from a file that is deleted later
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


def check_space(folder: Path, model: torch.nn.Module, features: int = 0) -> None:
    """See that the checkpoints and the export of a model will fit, and besides them so many bytes of features.

    At most there are two checkpoints of weights and Adam's two averages, and the best epoch's weights: seven times the
    weights. The export's two come when all but the best are gone.

    Raises:
        UserError: there is too little space.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    there = sum(file.stat().st_size for file in (folder / CHECKPOINT).iterdir())
    needed, free = 7 * weights + 2**24 + features, shutil.disk_usage(folder).free + there
    if free < needed:
        what = "the features of the images, the checkpoints" if features else "the checkpoints"
        fewer = ", or fewer --frozen-views" if features else ""
        raise UserError(
            f"{folder.parent}: {free / 1e6:,.0f} MB are free, and {what} and the export of this fit need "
            f"{needed / 1e6:,.0f} MB; free space ('xray-fastai data cache --clear', then --no-cache, does without "
            f"decoded images), or give another folder by --exports{fewer}"
        )


def kept_settings(folder: Path) -> dict[str, Any]:
    """What `Checkpoints.keep` wrote.

    Raises:
        UserError: it is damaged, or of another version.
    """
    path = folder / SETTINGS
    try:
        kept = read_json(path)
        check_format(path, kept["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({reason(error)}); start anew, and delete {folder.parent}") from None
    return kept


def check_format(path: Path, found: int) -> None:
    """Raises:
    UserError: a file is not of this version's format.
    """
    if found > FORMAT:
        raise UserError(f"{path}: written by a newer version (format {found}); update xray-fastai")
    if found < FORMAT:
        raise UserError(
            f"{path}: written by an older version (format {found}); start anew; {path.parent} is of no more use"
        )


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Write a `.safetensors` file under its final name only once it is on the disk; its size and CRC-32."""
    half = path.with_name(f"{path.name}.tmp")
    half.touch()
    mode = half.stat().st_mode  # safetensors makes it readable by its owner alone
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, half)
    half.chmod(mode)
    known = checked(half)
    _settle(half, path)
    return known


def write_json(path: Path, content: Any) -> None:
    """Write JSON with its CRC-32, under its final name only once it is on the disk."""
    text = json.dumps(content)
    half = path.with_name(f"{path.name}.tmp")
    half.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "content": content}))
    _settle(half, path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        OSError: it can't be read.
        ValueError: it is not as it was written.
    """
    try:
        outer = json.loads(path.read_text())
        content = outer["content"]
        whole = zlib.crc32(json.dumps(content).encode()) == outer["crc32"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no checkpoint: {error}") from None
    if not whole:
        raise ValueError("its content is not what was written")
    return content


def checked(path: Path) -> dict[str, int]:
    """A file's size and CRC-32: 0.11 s for 300 MB, where SHA-256 took 0.27 s; it is for damage, not for trust."""
    crc, size = 0, 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def _settle(half: Path, path: Path) -> None:
    with half.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(half, path)
    sync_folder(path.parent)
