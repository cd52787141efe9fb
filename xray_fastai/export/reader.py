"""An export on disk: written whole or not at all, and read without pickle.

    exports/<run>/model.safetensors   the weights
                  model.json          all else needed to rebuild the learner and to trust it
                  learner.pkl         fastai's own export
                  history.csv         one row an epoch
                  curves.png          the same as a picture
                  batch.png           training images as the network saw them
                  report.html         all of it for people: opens anywhere, loads nothing

While a run is under way its folder has another name (`runs.py`), so what has the run's name is complete. The export of
an interrupted fit also holds `checkpoint/`, to go on from.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from xray_fastai.export.schema import LIMIT, SETTINGS, WEIGHTS, parse, warn
from xray_fastai.export.weights_file import read_tensors
from xray_fastai.model.learner import build_learner, set_temperature
from xray_fastai.model.loaders import empty_loaders
from xray_fastai.system.errors import UserError
from xray_fastai.system.untrusted import read_received

if TYPE_CHECKING:
    from fastai.vision.all import Learner


def read(path: str | Path) -> dict[str, Any]:
    """The settings of an export (`model.json`), checked against `schema.Export`; the weights are not looked at.

    Raises:
        UserError: not an export, written by a newer version, or damaged.
    """
    folder = find_export(path)
    model, unknown = parse(read_received(folder, SETTINGS, LIMIT), folder / SETTINGS)
    warn(folder / SETTINGS, unknown)
    return model


def find_export(path: str | Path) -> Path:
    """The folder, once it is seen to be one that holds an export's two files.

    Raises:
        UserError: it is not.
    """
    path = Path(path)
    try:
        there, folder, complete = path.exists(), path.is_dir(), all((path / n).exists() for n in (SETTINGS, WEIGHTS))
        archive = path.is_file() and path.suffix.lower() == ".zip"
    except OSError as error:
        raise UserError(f"{path}: can't be looked at ({error.strerror}); give a folder that fit wrote") from None
    if archive:
        raise UserError(f"{path}: an archive; check it by 'xray-fastai verify {path}', unpack it, and give the folder")
    if not there:
        meant = f"; did you mean {Path('exports') / path}?" if (Path("exports") / path).is_dir() else ""
        raise UserError(f"{path}: not an export: there is no such folder{meant}")
    if not folder or not complete:
        raise UserError(f"{path}: not an export (it has no {SETTINGS} and {WEIGHTS}); give a folder that fit wrote")
    return path


def load_learner(path: str | Path) -> "Learner":
    """A fastai `Learner` from an export's `model.safetensors` and `model.json` alone: nothing is unpickled.

    Args:
        path: the export's folder.

    Returns:
        A learner on the CPU, in evaluation mode. `learn.predict(image)` takes a path, a PIL image or an array and gives
        label, index and calibrated probabilities (classes,), in the order of `learn.dls.vocab`.

    Raises:
        UserError: not an export, written by a newer version, or damaged.
    """
    return load(path)[1]


def load(path: str | Path) -> tuple[dict[str, Any], "Learner"]:
    """As `load_learner`, with what `model.json` holds."""
    model = read(path)
    return model, rebuild(Path(path), model)


def rebuild(folder: Path, model: dict[str, Any]) -> "Learner":
    """The learner of checked settings, with the weights in `folder`; see `load_learner`."""
    import torch
    from fastai.vision.all import ProgressCallback

    seen = model["preprocessing"]
    dls = empty_loaders(model["classes"], seen["size"], seen.get("contrast", "none"))
    arch = model["architecture"]
    with torch.device("meta"):  # no memory, and no time for random weights: ResNet50 loads in 0.2 s instead of 0.3 s
        learn = build_learner(dls, arch, dropout=model["dropout"], class_weights=model["class_weights"])
    tensors = read_tensors(folder, WEIGHTS, model["weights"]["sha256"], learn.model.state_dict(), arch)
    learn.model.to_empty(device="cpu")
    learn.model.load_state_dict(tensors)
    set_temperature(learn, model["temperature"])
    learn.remove_cb(ProgressCallback)  # its bar would come before each prediction; add it again to train on
    learn.model.eval()
    return learn
