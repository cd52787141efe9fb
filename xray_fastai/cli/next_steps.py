"""Says which command comes next: in a folder, if no command is given, and at the end of a command."""

import os
import shlex
from pathlib import Path

from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import printable

TRAINING = {"train", "training"}
"""Names of the folder in a data set that holds the training images, in lower case."""
MAX_FOLDERS = 1000
"""Folders that are searched for a data set."""


def next_command(*words: object) -> None:
    """Print the command that comes next, as it is typed; of several processes the first prints it."""
    if distributed.rank() == 0:
        print(f"next: {shlex.join(['xray-fastai', *map(str, words)])}", flush=True)


def steps_in(folder: Path) -> str:
    """Return what there is in a folder, and three commands that fit it."""
    head, steps = _steps(folder)
    lines = [line for command, text in steps for line in (f"  xray-fastai {command}", f"      {text}")]
    return "\n".join([f"{head} Next:", *map(printable, lines), "All commands: xray-fastai --help"])


def _steps(folder: Path) -> tuple[str, list[tuple[str, str]]]:
    from xray_fastai.export.reader import default_export
    from xray_fastai.export.run_folder import unfinished

    exports = folder / "exports"
    crashed = [run for run in unfinished(exports) if run.usable] if exports.is_dir() else []
    steps = [(f"fit --resume {crashed[0].name}", "goes on with this unfinished run")] if crashed else []
    try:
        path, why = default_export(exports)
    except UserError as error:
        if (exports / ".default").exists() or "XRAY_FASTAI_MODEL" in os.environ:
            return f"{error}.", [*steps, ("runs", "lists the exports"), *_steps_without_export(folder)[1]][:3]
        head, others = _steps_without_export(folder)
        return head, [*steps, *others][:3]
    if not (path / "evaluation-test").is_dir():
        steps.append(("evaluate", "measures it on the test images"))
    steps += [
        ("interpret", "shows where it errs, with heat maps"),
        ("predict IMAGE_OR_FOLDER", "predicts new images"),
        ("serve --open", "shows a page to drop images on"),
    ]
    return f"Export: {os.path.relpath(path, folder)} ({why}).", steps[:3]


def _steps_without_export(folder: Path) -> tuple[str, list[tuple[str, str]]]:
    if (data := _data_in(folder)) is None:
        return "No images and no export here.", [
            ("fit --epochs 3", "rehearses on drawn X-rays, without any data"),
            ("data download", "gets the public X-rays, 1.2 GB, into ./chest_xray"),
            ("data check FOLDER", "looks for faults in a folder of your own"),
        ]
    name = shlex.quote(data)
    place = "this folder" if data == "." else printable(data)
    return f"Images in {place}.", [
        (f"data check {name}", "looks for faults before hours go into them"),
        (f"fit {name} --arch resnet18 --size 64 --epochs 3", "tries all steps in minutes"),
        (f"fit {name}", "trains a model"),
    ]


def _data_in(folder: Path) -> str | None:
    """Return the name of the first folder, `chest_xray` before others, that holds training images."""
    try:
        with os.scandir(folder) as found:
            names = sorted(entry.name for entry, _ in zip(found, range(MAX_FOLDERS), strict=False) if entry.is_dir())
    except OSError:
        return None
    for name in [".", *sorted(names, key=lambda name: name != "chest_xray")]:
        try:
            with os.scandir(folder / name) as found:
                if any(entry.name.lower() in TRAINING and entry.is_dir() for entry in found):
                    return name
        except OSError:  # a folder of others
            continue
    return None
