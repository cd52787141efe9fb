"""Reads what each network of an ensemble on folds said of the images that it left out, and maps these images by it."""

from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO

import pandas as pd

from xray_fastai.evaluation.contact_sheet import Cell, make_cells
from xray_fastai.export.layout import OUT_OF_FOLD
from xray_fastai.inference.model import Model
from xray_fastai.model.ensemble import split
from xray_fastai.system.errors import UserError
from xray_fastai.system.untrusted import read_received

LIMIT = 100_000_000
"""Bytes of an `out_of_fold.csv`: a million images."""
JUDGED = (
    "each image is judged by the network that was not trained on it, and its heat maps are those of this network; the "
    "export calls an image by the mean of all networks"
)


def cells(model: Model, shown: pd.DataFrame) -> Iterator[Cell]:
    """Compute the heat maps, with folds each by the network that was not trained on the image."""
    if "member" not in shown:
        yield from make_cells(model, shown)
        return
    numbers = _members(model)
    networks = dict(zip(numbers, split(model.network, len(numbers)), strict=True))
    for _, row in shown.iterrows():
        own = replace(model, network=networks[row.member])
        yield from make_cells(own, row.to_frame().T)


def _members(model: Model) -> list[int]:
    """Return the numbers of the networks, in their order: fewer than were planned after an interruption."""
    return [int(member["member"]) for member in model.settings["training"]["members"]]


def out_of_fold(model: Model) -> pd.DataFrame | None:
    """Read what each network of an ensemble on folds said of the images that it was not trained on.

    Returns:
        By the key of the file, the `member` from 1 on, and the probabilities in columns named as the classes; None if
        the export has none, as one that was calibrated again.

    Raises:
        UserError: the file is damaged.
    """
    if not (model.path / OUT_OF_FOLD).exists():
        return None
    content = read_received(model.path, OUT_OF_FOLD, LIMIT)
    columns = {f"p_{name}": name for name in model.classes}
    try:
        table = pd.read_csv(BytesIO(content), dtype={"file": str, "member": int, **dict.fromkeys(columns, float)})
        table = table.set_index("file", verify_integrity=True)[["member", *columns]].rename(columns=columns)
        right = table[model.classes].notna().all(axis=None) and table.member.isin(_members(model)).all()
    except (ValueError, KeyError):
        right = False
    if not right:
        raise UserError("damaged; get the export again", value=model.path / OUT_OF_FOLD)
    return table
