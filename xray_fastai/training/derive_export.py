"""Writes an export that comes from another one: the same network, or its batch norm adapted, with other settings."""

import contextlib
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from xray_fastai.evaluation.learning_curves import LR_FIND
from xray_fastai.evaluation.report import write_report
from xray_fastai.export.layout import PICKLE, SETTINGS, WEIGHTS
from xray_fastai.export.learner import load_learner
from xray_fastai.export.reader import lineage_of
from xray_fastai.export.run_folder import reserve
from xray_fastai.export.weights_file import FACTS, facts_hash
from xray_fastai.inference.model import Model
from xray_fastai.system.errors import UserError, is_write_error, reason
from xray_fastai.system.files import sha256
from xray_fastai.training.write_export import CURVES, AnySystem

COPIED = ("history.csv", CURVES, LR_FIND, "batch.png")
"""What the new export takes over: how the network was trained."""


def derive_export(parent: Model, network: nn.Module, settings: dict[str, Any], folder: Path) -> Path:
    """Write an export that comes from `parent`, and return its folder.

    Args:
        parent: an open export.
        network: its own, whose file is then copied byte for byte, or an adapted copy.
        settings: the content of the new `model.json`; date, lineage and weights are added here.
        folder: of the new export.

    Raises:
        UserError: the folder exists, or cannot be written to; nothing is left of it.
    """
    model = settings | {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "lineage": lineage_of(parent.path, parent.settings),
    }
    with reserve(folder.parent, folder.name) as run:
        try:
            _write(parent, network, model, run.partial, run.final.name)
            return run.publish()
        except (OSError, UserError) as error:
            cause = (error.__context__ or error) if isinstance(error, UserError) else error
            if not is_write_error(cause):
                raise
            message = f"{run.final}: the export could not be written ({reason(cause)}); free space, or give another one"
            raise UserError(message, option="output") from None


def _write(parent: Model, network: nn.Module, model: dict[str, Any], folder: Path, name: str) -> None:
    for file in COPIED:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(parent.path / file, folder / file)
    if network is parent.network:
        shutil.copyfile(parent.path / WEIGHTS, folder / WEIGHTS)
    else:
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
        (folder / WEIGHTS).write_bytes(save(state, metadata={FACTS: facts_hash(model)}))
        model["weights"] = model["weights"] | {"tensors": len(state)}  # without those of the gate
    model["weights"] = model["weights"] | {"sha256": sha256(folder / WEIGHTS)}
    text = json.dumps(model, indent=2, allow_nan=False)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
    write_report(folder, name=name)
    learn = load_learner(folder)
    learn.export(folder.resolve() / PICKLE, pickle_module=AnySystem)
    for file in filter(Path.is_file, folder.iterdir()):
        with file.open("rb+") as stream:  # Windows writes no file to the disk that is open for reading only
            os.fsync(stream.fileno())
