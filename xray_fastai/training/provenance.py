"""Writes into a fit's log where the fit came from: command, folder, versions, machine, settings, images."""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from xray_fastai import __version__
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.export.run_folder import LOG, Reservation, Unfinished
from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError
from xray_fastai.system.run_log import RunLog

LIBRARIES = ("torch", "torchvision", "fastai", "numpy", "pillow", "scikit-learn", "safetensors")
"""The libraries whose versions an export and a log record."""


def log_path(run: Reservation) -> Path:
    """Return the log of a run: in its unfinished folder, or in its export."""
    return (run.partial if run.partial.is_dir() else run.final) / LOG


def take_over_log(found: Unfinished, run: Reservation) -> None:
    """Begin the log of a resumed run with that of the run before.

    Raises:
        UserError: it cannot be read or written.
    """
    before, path = found.path / LOG, log_path(run)
    if before == path or not before.is_file():
        return
    try:
        path.write_bytes(before.read_bytes())
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be copied to {path} ({error.strerror})") from None


def folder_of(config: FitConfig) -> str | None:
    """Return the absolute path of the data; None for the X-rays that the package draws.

    It stays in the run's own folder (log, checkpoint). `model.json`, which is handed over, has it as it was typed.
    """
    return None if config.data is None else os.path.abspath(os.path.expanduser(config.data))


def log_start(log: RunLog, config: FitConfig) -> None:
    """Log what started a fit, and on which machine."""
    names = "".join(f", {name} {version(name)}" for name in LIBRARIES)
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    for line in (
        f"command       {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        f"folder        {os.getcwd()}",
        f"versions      xray-fastai {__version__}, python {platform.python_version()}{names}",
        f"machine       {platform.platform()}, {platform.machine()}, {os.cpu_count()} cores{processes}",
        f"settings      {json.dumps(config.to_dict())}",
    ):
        log.add(line)


def log_images(log: RunLog, config: FitConfig, images: dict) -> None:
    """Log the folder of the images, and what `fingerprint` returned of them."""
    log.add(f"images        {folder_of(config) or 'drawn by this package'}")
    log.add(f"              SHA-256 of names, labels, patients, contents and split: {images['sha256']}")
