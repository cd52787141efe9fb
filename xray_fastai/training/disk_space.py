"""Checks before a fit trains that its checkpoints and its export have space on the disk."""

import shutil
from pathlib import Path

import torch

from xray_fastai.export.run_folder import CHECKPOINT
from xray_fastai.system.errors import UserError


def check_space(folder: Path, model: torch.nn.Module, features: int = 0, members: int = 1) -> None:
    """Check that the disk has space for the checkpoints and the export of a model, and for `features` bytes more.

    At most there are two checkpoints with the weights and Adam's two averages, and the best epoch's weights: seven
    times the weights. The export needs less, and the other checkpoints are deleted before it. Of an ensemble's networks
    each keeps its weights, beside those that all start from, and the export holds all twice.

    Raises:
        UserError: there is too little space.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    reusable, copies = folder_size(folder / CHECKPOINT), 7 if members == 1 else max(7 + members, 1 + 3 * members)
    needed, free = copies * weights + 2**24 + features, shutil.disk_usage(folder).free + reusable
    if free < needed:
        what = "the features of the images, the checkpoints" if features else "the checkpoints"
        fewer = ", or fewer frozen_views=" if features else ""
        raise UserError(
            f"{folder.parent}: {free / 1e6:,.0f} MB are free, but {what} and the export of this fit need "
            f"{needed / 1e6:,.0f} MB; free space ('xray-fastai data cache --clear' and then cache=False save the space "
            f"of decoded images), or give another folder by exports={fewer}"
        )


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder and its subfolders."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
