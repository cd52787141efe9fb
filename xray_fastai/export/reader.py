"""Reads an export without pickle.

    exports/<run>/model.safetensors   the weights
                  model.json          what else is needed to rebuild the learner and to judge it (`schema.py`)
                  learner.pkl         fastai's own export
                  history.csv         one row an epoch
                  curves.png          the history as a picture
                  batch.png           training images as the network got them
                  report.html         all of it on one page that loads nothing from the network

While a fit runs, its folder has another name (`run_folder.py`), so a folder with the run's name is complete. The export
of an interrupted fit also holds `checkpoint/`, from which `fit --resume` continues.
"""

from pathlib import Path
from typing import Any

import torch
from fastai.vision.all import Learner, ProgressCallback

from xray_fastai.export.schema import LIMIT, SETTINGS, WEIGHTS, parse, warn
from xray_fastai.export.weights_file import read_tensors
from xray_fastai.model.learner import build_learner, set_temperature
from xray_fastai.model.loaders import empty_loaders
from xray_fastai.system.errors import UserError
from xray_fastai.system.untrusted import read_received


def read(path: str | Path) -> dict[str, Any]:
    """Read the settings of an export (`model.json`) and check them against `schema.Export`; the weights are not read.

    Raises:
        UserError: the folder is no export, was written by a newer version, or is damaged.
    """
    folder = find_export(path)
    model, unknown = parse(read_received(folder, SETTINGS, LIMIT), folder / SETTINGS)
    warn(folder / SETTINGS, unknown)
    return model


def find_export(path: str | Path) -> Path:
    """Check that a folder holds the two files of an export, and return it.

    Raises:
        UserError: it does not exist, or lacks a file.
    """
    path = Path(path)
    try:
        exists, complete = path.exists(), all((path / name).exists() for name in (SETTINGS, WEIGHTS))
        is_archive = path.is_file() and path.suffix.lower() == ".zip"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a folder that fit wrote") from None
    if is_archive:
        raise UserError(f"{path}: an archive; check it by 'xray-fastai verify {path}', unpack it, and give the folder")
    if not exists:
        in_exports = Path("exports") / path
        hint = f"; did you mean {in_exports}?" if in_exports.is_dir() else "; give a folder that fit wrote"
        raise UserError(f"{path}: not an export: no such folder{hint}")
    if not complete:
        raise UserError(f"{path}: not an export ({SETTINGS} or {WEIGHTS} is missing); give a folder that fit wrote")
    return path


def load_learner(path: str | Path) -> Learner:
    """Build a fastai `Learner` from an export's `model.safetensors` and `model.json`; nothing is unpickled.

    Args:
        path: the export's folder.

    Returns:
        A learner on the CPU, in evaluation mode. `learn.predict(image)` takes a path, a PIL image or an array. It
        returns the label, its index and the calibrated probabilities (classes,), in the order of `learn.dls.vocab`.

    Raises:
        UserError: the folder is no export, was written by a newer version, or is damaged.
    """
    return load(path)[1]


def load(path: str | Path) -> tuple[dict[str, Any], Learner]:
    """Return the settings of an export (`model.json`) and its learner (`load_learner`)."""
    model = read(path)
    return model, rebuild(Path(path), model)


def rebuild(folder: Path, model: dict[str, Any]) -> Learner:
    """Build the learner of checked settings, with the weights in `folder` (`load_learner`)."""
    preprocessing = model["preprocessing"]
    dls = empty_loaders(model["classes"], preprocessing["size"], preprocessing.get("contrast", "none"))
    arch = model["architecture"]
    with torch.device("meta"):  # takes no memory and makes no random weights: ResNet50 loads in 0.2 s instead of 0.3 s
        learn = build_learner(dls, arch, dropout=model["dropout"], class_weights=model["class_weights"])
    tensors = read_tensors(folder, WEIGHTS, model["weights"]["sha256"], learn.model.state_dict(), arch)
    learn.model.to_empty(device="cpu")
    learn.model.load_state_dict(tensors)
    set_temperature(learn, model["temperature"])
    learn.remove_cb(ProgressCallback)  # it shows a bar at each prediction; to train further, add it again
    learn.model.eval()
    return learn
