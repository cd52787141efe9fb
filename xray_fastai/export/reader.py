"""Reads an export without pickle.

    exports/<run>/model.safetensors   the weights
                  model.json          what else is needed to rebuild the model and to judge it (`schema.py`)
                  learner.pkl         fastai's own export
                  history.csv         one row an epoch
                  curves.png          the history as a picture
                  batch.png           training images as the network got them
                  report.html         all of it on one page that loads nothing from the network

While a fit runs, its folder has another name (`run_folder.py`), so a folder with the run's name is complete. The export
of an interrupted fit also holds `checkpoint/`, from which `fit --resume` continues.

`network.py` makes a torch network of an export, `learner.py` a fastai `Learner`. This module imports neither library.
"""

from pathlib import Path
from typing import Any

from xray_fastai.export.schema import LIMIT, SETTINGS, WEIGHTS, parse, warn
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


def find_export(path: str | Path | None = None) -> Path:
    """Check that a folder holds the two files of an export, and return it; None takes the newest in ./exports.

    Raises:
        UserError: it does not exist, or lacks a file; or there is no export in ./exports.
    """
    if path is None:
        return _newest(Path("exports"))
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


def _newest(exports: Path) -> Path:
    complete = [path.parent for path in exports.glob(f"*/{SETTINGS}") if not path.parent.name.startswith(".")]
    if not complete:
        raise UserError(f"{exports}: no export in it; make one by 'xray-fastai fit', or name one by --model")
    return max(complete, key=lambda path: (path / SETTINGS).stat().st_mtime)
