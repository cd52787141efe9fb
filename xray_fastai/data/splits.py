"""Split images into training and validation by patient.

Copies of one image are never on both sides.
"""

import warnings
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pandas as pd

from xray_fastai.data.patients import source_of, unknown
from xray_fastai.system.errors import UserError

ENOUGH_TO_VALIDATE = 50
"""`val/` alone is the validation set if each class has this many images or more."""


def patient_groups(table: pd.DataFrame) -> np.ndarray:
    """Number the groups of images that must stay on one side.

    Images of one patient are in the same group, and so are copies of one image. Groups that share an image are joined.

    Args:
        table: has the columns `patient` and `image`.

    Returns:
        (N,): the number of each image's group.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    patient, image = (pd.factorize(table[column])[0] for column in ("patient", "image"))
    nodes = patient.max() + 1 + image.max() + 1
    edges = coo_array((np.ones(len(table)), (patient, patient.max() + 1 + image)), shape=(nodes, nodes))
    return connected_components(edges, directed=False)[1][patient]


def hold_out(table: pd.DataFrame, fraction: float, seed: int, use: str = "validation") -> np.ndarray:
    """Choose images to validate or test on, stratified by class and grouped by patient.

    Args:
        table: has the columns `label`, `patient` and `image`.
        fraction: the share of images to hold out. The result is as close to it as the groups allow.
        seed: the seed of the random choice.
        use: for errors, what they are held out for.

    Returns:
        (N,): True for the images held out.

    Raises:
        UserError: a class has too few patients to be on both sides.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    groups = patient_groups(table)
    patients = pd.Series(groups).groupby(table.label.to_numpy()).nunique()  # of each class
    rarest = patients.idxmin()
    advice = "add patients"
    if use == "validation":
        advice += ', or give a validation split in val/ and valid="folder"'
    if patients.min() < 2:
        sources = " and ".join(sorted(set(table.patient[table.label == rarest].map(source_of))))
        by = sources.replace("--patients", "patients=")
        source = f" (by {by}; if that is wrong, give patient_pattern= or patients=)"
        raise UserError(
            f"all images are of one patient{source}, so none can be held out for {use}; {advice}",
            value=f"train/{rarest}",
        )
    most = min(Fraction(fraction).limit_denominator(20).denominator, groups.max() + 1)
    for folds in range(most, 1, -1):  # with few patients, folds lack a class; fewer and larger folds may not
        wanted = max(1, min(folds - 1, round(fraction * folds)))
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The least populated class", UserWarning)
                chosen = [fold for _, fold in splitter.split(table.path, table.label, groups)]
        except ValueError:  # more folds than images of every class
            continue
        for start in range(folds):
            held_out = np.zeros(len(table), bool)
            held_out[np.concatenate((chosen[start:] + chosen[:start])[:wanted])] = True
            if table.label[held_out].nunique() == table.label[~held_out].nunique() == table.label.nunique():
                return held_out
    raise UserError(
        f"{patients.min()} patients are too few for training and {use}; {advice}",
        value=f"train/{rarest}",
    )


def assign_validation(
    train: pd.DataFrame,
    val: pd.DataFrame | None,
    valid: str,
    seed: int,
    names: Sequence[str] = ("train/", "val/"),
) -> tuple[pd.DataFrame, str, int]:
    """Decide which images train and which validate.

    Args:
        train: the table of train/, from `check_files`.
        val: the table of val/, or None if it is missing or not wanted.
        valid: auto, folder, or a fraction as text.
        seed: the seed of `hold_out`.
        names: what to call the two tables in the line and in errors.

    Returns:
        The table with a column `is_valid`; a line for the user about the choice; the number of training images left
        out because their patient, or a copy, is in `val`.

    Raises:
        UserError: see `hold_out`; or no image of a class is left to train on.
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
        held_out, line = np.zeros(len(train), bool), f"{names[1]} ({len(val):,} images)"
    else:
        fraction = 0.1 if valid == "auto" else float(valid)
        held_out = hold_out(train, fraction, seed)
        line = f"{held_out.sum():,} images held out of {names[0]}, by {'image' if unknown(train).all() else 'patient'}"
        if not 0.5 <= held_out.mean() / fraction <= 2:
            line += f", {held_out.mean():.0%} instead of {fraction:.0%}: a class has too few patients for less"
        if val is not None:
            line += f", and {names[1]}, which is too small alone ({len(val)} images)"
    frames = [train.assign(is_valid=held_out)]
    if val is not None:
        frames.append(val.assign(is_valid=True))
    table = pd.concat(frames, ignore_index=True)
    if missing := sorted(set(table.label) - set(table.label[~table.is_valid])):
        raise UserError(
            f"every image's patient is also in {names[1]}, so none is left to train on; remove these patients from it",
            value=f"train/{missing[0]}",
        )
    return table, line, leaking


def of_one_patient(table: pd.DataFrame) -> list[str]:
    """Return a note for each class whose validation images, two or more, are all of one patient.

    Args:
        table: the images, with the column `is_valid`.
    """
    return [
        f"WARNING: the {len(images)} validation images of {label} are all of one patient: epoch, threshold and "
        "calibration rest on that patient; give more patients"
        for label, images in table[table.is_valid].groupby("label")
        if len(images) > 1 and images.patient.nunique() == 1
    ]
