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
from xray_fastai.system.text import count_of

ENOUGH_TO_VALIDATE = 50
"""`val/` alone is the validation set if each class has this many images or more."""
ATTEMPTS = 20
"""How many random divisions into folds are tried where one leaves a class out of a fold."""


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


def assign_folds(
    train: pd.DataFrame, val: pd.DataFrame | None, folds: int, seed: int, names: Sequence[str] = ("train/", "val/")
) -> tuple[pd.DataFrame, str]:
    """Divide all images into folds of about the same size, stratified by class and grouped by patient.

    Args:
        train: the table of train/, from `check_files`.
        val: the table of val/, whose images are divided, too; None if it is missing or not wanted.
        folds: how many, two or more.
        seed: the seed of the random choice.
        names: what to call the two tables in the line and in errors.

    Returns:
        The table with the columns `fold`, from 0 on, and `is_valid`, which is False; and a line for the user about it.

    Raises:
        UserError: a class has too few patients to be in each fold.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    table = pd.concat([train, val], ignore_index=True)
    groups, labels = patient_groups(table), table.label.to_numpy()
    patients = pd.Series(groups).groupby(labels).nunique()  # of each class
    rarest = patients.idxmin()
    for attempt in range(ATTEMPTS if patients.min() >= folds else 0):
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=(seed + attempt) % 2**32)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            parts = [part for _, part in splitter.split(table.path, labels, groups)]
        if all(set(labels[part]) == set(labels) == set(np.delete(labels, part)) for part in parts):
            fold = np.empty(len(table), int)
            for number, part in enumerate(parts):
                fold[part] = number
            of = names[0] if val is None else f"{names[0]} and {names[1]}, which is too small alone ({len(val)} images)"
            sizes = sorted({len(part) for part in parts})
            size = " to ".join(f"{n:,}" for n in dict.fromkeys([sizes[0], sizes[-1]]))
            by = "image" if unknown(table).all() else "patient"
            return table.assign(fold=fold, is_valid=False), f"{folds} folds of {size} images, by {by}: {of}"
    raise UserError(
        f"{count_of(patients.min(), 'patient')} of {rarest} in {names[0]} cannot be in as many folds; give a smaller "
        'number, add patients, or give a validation split and valid="folder"',
        option="members",
        value=folds,
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
    if is_enough(val, valid):
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


def is_enough(val: pd.DataFrame | None, valid: str) -> bool:
    """Return whether the images of `val` alone validate, given `valid` as in `assign_validation`."""
    large = val is not None and val.label.value_counts().min() >= ENOUGH_TO_VALIDATE
    return valid == "folder" or (valid == "auto" and large)


def of_one_patient(table: pd.DataFrame) -> list[str]:
    """Return a note for each class whose validation images, two or more, are all of one patient, also in a fold.

    Args:
        table: the images, with the column `is_valid`, and maybe `fold`.
    """
    if "fold" in table:
        folds, notes = table.fold.nunique(), []
        for label, images in table.groupby("label"):
            patients = images.groupby("fold").patient.agg(["size", "nunique"])
            if alone := int(((patients["size"] > 1) & (patients["nunique"] == 1)).sum()):
                notes.append(
                    f"WARNING: in {alone} of {folds} folds all images of {label} are of one patient, on whom the epoch "
                    "of the fold's network rests; give more patients, or fewer networks"
                )
        return notes
    return [
        f"WARNING: the {len(images)} validation images of {label} are all of one patient: epoch, threshold and "
        "calibration rest on that patient; give more patients"
        for label, images in table[table.is_valid].groupby("label")
        if len(images) > 1 and images.patient.nunique() == 1
    ]
