"""Which images train and which validate: by patient, never with copies of one image on both sides."""

from fractions import Fraction

import numpy as np
import pandas as pd

from xray_fastai.data.patients import is_numbered
from xray_fastai.system.errors import UserError

ENOUGH_TO_VALIDATE = 50
"""Images of each class from which `val/` is used as it stands."""


def patient_groups(table: pd.DataFrame) -> np.ndarray:
    """A number for each image, equal for images of one patient and for copies of one image, and for what these link.

    Args:
        table: with columns `patient` and `image`.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    patient, image = (pd.factorize(table[column])[0] for column in ("patient", "image"))
    nodes = patient.max() + 1 + image.max() + 1
    edges = coo_array((np.ones(len(table)), (patient, patient.max() + 1 + image)), shape=(nodes, nodes))
    return connected_components(edges, directed=False)[1][patient]


def hold_out(table: pd.DataFrame, fraction: float, seed: int) -> np.ndarray:
    """Choose images to validate on, stratified by class and grouped by patient.

    Args:
        table: with columns `label`, `patient` and `image`.
        fraction: the share of images to hold out; met as closely as the groups allow.
        seed: of the choice.

    Returns:
        A boolean a row, True for those held out.

    Raises:
        UserError: a class has too few patients to be on both sides.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    groups = patient_groups(table)
    least = pd.Series(groups).groupby(table.label.to_numpy()).nunique()
    if least.min() < 2:
        by_header = table.patient[table.label == least.idxmin()].map(is_numbered).any()
        names = " (by PatientID; if that is not so, --patient-pattern tells them by file names)" if by_header else ""
        raise UserError(
            f"train/{least.idxmin()}: all images are of one patient{names}, so none can be held out to validate on; "
            "add patients, or give a validation split in val/ and --valid folder"
        )
    share = Fraction(fraction).limit_denominator(20)
    folds = min(share.denominator, int(least.min()))
    wanted = max(1, min(folds - 1, round(fraction * folds)))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    chosen = [fold for _, fold in splitter.split(table.path, table.label, groups)]
    for start in range(folds):  # of few patients, a fold may lack a class
        held_out = np.zeros(len(table), bool)
        held_out[np.concatenate((chosen[start:] + chosen[:start])[:wanted])] = True
        if table.label[held_out].nunique() == table.label[~held_out].nunique() == table.label.nunique():
            return held_out
    raise UserError(
        f"train/{least.idxmin()}: {least.min()} patients are too few to have some in training and some in validation; "
        "add patients, or give a validation split in val/ and --valid folder"
    )


def assign_validation(
    train: pd.DataFrame, val: pd.DataFrame | None, valid: str, seed: int
) -> tuple[pd.DataFrame, str, int]:
    """Say which images train and which validate.

    Args:
        train: as from `check_files`.
        val: likewise; None where there is no such folder, or it is not wanted.
        valid: auto, folder, or a fraction as text.
        seed: of what is held out.

    Returns:
        The table with a column `is_valid`; a line that says what was done; the number of training images left out
        because their patient, or a copy, is in `val`.
    """
    leaking = 0
    if val is not None:
        both = pd.concat([train, val], ignore_index=True)
        groups = patient_groups(both)
        shared = np.isin(groups[: len(train)], groups[len(train) :])
        leaking = int(shared.sum())
        train = train[~shared].reset_index(drop=True)
    by_folder = valid == "folder" or (
        valid == "auto" and val is not None and val.label.value_counts().min() >= ENOUGH_TO_VALIDATE
    )
    if by_folder:
        held_out, line = np.zeros(len(train), bool), f"val/ ({len(val):,} images)"
    else:
        fraction = 0.1 if valid == "auto" else float(valid)
        held_out = hold_out(train, fraction, seed)
        line = f"{held_out.sum():,} images held out of train/, by patient"
        if val is not None:
            line += f", and val/, which is too small alone ({len(val)} images)"
    frames = [train.assign(is_valid=held_out)]
    if val is not None:
        frames.append(val.assign(is_valid=True))
    table = pd.concat(frames, ignore_index=True)
    if missing := sorted(set(table.label) - set(table.label[~table.is_valid])):
        raise UserError(f"train/{missing[0]}: every image's patient is also in val/, so none is left to train on")
    return table, line, leaking
