"""Reads an export without pickle.

    exports/<run>/model.safetensors   the weights
                  model.json          what else is needed to rebuild the model and to judge it (`schema.py`)
                  learner.pkl         fastai's own export
                  history.csv         one row an epoch
                  curves.png          the history as a picture
                  lr_find.png         the searches of the learning rate, after `fit --lr find`
                  out_of_fold.csv     of an ensemble: each image, judged by the network that was not trained on it
                  batch.png           training images as the network got them
                  report.html         all of it on one page that loads nothing from the network

While a fit runs, its folder has another name (`run_folder.py`), so a folder with the run's name is complete. The export
of an interrupted fit also holds `checkpoint/`, from which `fit --resume` continues.

`network.py` makes a torch network of an export, `learner.py` a fastai `Learner`. This module imports neither library.
"""

import os
from pathlib import Path
from typing import Any

from xray_fastai.config.choices import PUBLISHED_WEIGHTS
from xray_fastai.config.setting import MAX_TEXT
from xray_fastai.export.layout import PICKLE, SETTINGS, WEIGHTS
from xray_fastai.export.model_json import LIMIT, parse, warn
from xray_fastai.export.value_types import ENTRIES
from xray_fastai.system.errors import UserError
from xray_fastai.system.files import atomic_write
from xray_fastai.system.text import shown
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


def path_of(model: Any) -> str | Path:
    """Return where a model lies that is an export's path, an open model, or a learner that `load_learner` opened.

    Neither torch nor fastai is imported for that: a learner has `xray`, and both have `path`.

    Raises:
        UserError: it is a learner that is no export, or was trained since, or something else.
    """
    path: str | Path = getattr(model, "path", model)
    if hasattr(model, "dls"):
        about = getattr(model, "xray", None)
        if about is None or about.path is None or about.changed:
            fault = "is no export" if about is None or about.path is None else "was trained after it was opened"
            advice = "save it by xray_fastai.save_export(learn, folder), and give it or the folder"
            raise UserError(f"this learner {fault}; {advice}", option="model")
        path = about.path
    if not isinstance(path, (str, os.PathLike)):
        message = "give an export, a learner that load_learner opened, or an open model"
        raise UserError(message, option="model", value=f"of type {type(path).__name__}")
    return path


DEFAULT, VARIABLE = ".default", "XRAY_FASTAI_MODEL"
"""The file in a folder of exports that holds the path of the default one, and the environment variable before it."""


def default_export(exports: str | Path = "exports") -> tuple[Path, str]:
    """Return the export that a command takes if none is given, and why it is this one.

    It is that of the environment variable XRAY_FASTAI_MODEL, else the one that `xray-fastai default` chose, else the
    newest.

    Args:
        exports: the folder of the exports.

    Raises:
        UserError: the chosen one is gone or incomplete, or there is none.
    """
    exports = Path(exports)
    if named := os.environ.get(VARIABLE):
        try:
            return find_export(named), f"by {VARIABLE}"
        except UserError as error:
            raise UserError(f"the environment variable {VARIABLE} names {error}") from None
    try:
        text = read_received(exports, DEFAULT, MAX_TEXT).decode("utf-8", "surrogateescape").strip()
    except UserError:
        if os.path.lexists(exports / DEFAULT):
            raise
        return _newest(exports), f"the newest in {'./' if exports == Path('exports') else ''}{exports}"
    path = Path(os.path.normpath(exports / text))
    if not _is_complete(path):
        advice = "choose another by 'xray-fastai default EXPORT', or none by 'xray-fastai default --clear'"
        raise UserError(f"the default export {shown(path, MAX_TEXT)} is gone or incomplete; {advice}")
    return path, "the default"


def set_default(path: str | Path | None, exports: str | Path = "exports") -> None:
    """Choose the default export of a folder of exports, which need not hold it; None clears the choice.

    Raises:
        UserError: it is no export, or the choice cannot be written.
    """
    exports = Path(exports)
    try:
        if path is None:
            (exports / DEFAULT).unlink(missing_ok=True)
            return
        found = find_export(path).resolve()
        inside = found.is_relative_to(exports.resolve())
        text = os.path.relpath(found, exports.resolve()) if inside else str(found)
        exports.mkdir(parents=True, exist_ok=True)
        with atomic_write(exports / DEFAULT) as file:
            file.write_bytes(os.fsencode(f"{text}\n"))
    except OSError as error:
        raise UserError(f"{exports / DEFAULT}: cannot be written ({error.strerror}); change its permissions") from None


def why_chosen(path: object) -> str:
    """Return why an export was taken, to stand after its name: " (the newest in ./exports)"; nothing if it was given.

    Args:
        path: what the user gave.
    """
    return "" if path is not None else f" ({default_export()[1]})"


def find_export(path: str | Path | None = None) -> Path:
    """Check that a folder holds the two files of an export, and return it; None takes the default (`default_export`).

    Args:
        path: the folder, or `model.safetensors`, `model.json` or `learner.pkl` in it.

    Raises:
        UserError: it does not exist, or lacks a file; or there is no export in ./exports.
    """
    if path is None:
        return default_export()[0]
    path = _folder_of(Path(os.path.expanduser(path)))
    try:
        exists, complete = path.exists(), _is_complete(path)
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


def _is_complete(folder: Path) -> bool:
    return all((folder / name).exists() for name in (SETTINGS, WEIGHTS))


def _folder_of(path: Path) -> Path:
    """Return the export's folder for one of its files; any other path as it is."""
    try:
        is_inside = path.name in (SETTINGS, WEIGHTS, PICKLE) and path.is_file() and _is_complete(path.parent)
    except OSError:  # `find_export` says it
        return path
    return path.parent if is_inside else path


def export_in_weights(weights: str | None) -> Path | None:
    """Return the folder of the export that `fit` is to continue from; None if `weights` is something else.

    Raises:
        UserError: it is a folder, but no export.
    """
    if weights in (None, "none", *PUBLISHED_WEIGHTS):
        return None
    path = Path(os.path.expanduser(weights))
    folder = _folder_of(path)
    if folder != path or path.is_dir() or (not path.exists() and (Path("exports") / path).is_dir()):
        return find_export(folder)
    return None


def lineage_of(folder: Path, model: dict[str, Any]) -> list[dict[str, str]]:
    """Return what the `model.json` of a model that continues from an export records about its origin.

    Args:
        folder: the export to continue from.
        model: its settings.

    Returns:
        This export, and those that it continued from itself, the nearest first.
    """
    name = shown(folder.resolve().name, 255)
    parent = {"name": name, "sha256": model["weights"]["sha256"], "created": model["created"]}
    return [parent, *(model.get("lineage") or [])][:ENTRIES]


def _newest(exports: Path) -> Path:
    folders = [path.parent for path in exports.glob(f"*/{SETTINGS}") if not path.parent.name.startswith(".")]
    complete = [path for path in folders if _is_complete(path)]
    if not complete:
        raise UserError(f"{exports}: no export in it; make one by 'xray-fastai fit', or name one by model=")
    return max(complete, key=lambda path: (path / SETTINGS).stat().st_mtime)
