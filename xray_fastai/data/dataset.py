"""Read the images of a fit as a table with the path, label, split and patient of each, and check every file."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pandas as pd

from xray_fastai.config.checks import VALID_GROUP
from xray_fastai.config.class_names import check_classes
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.classes import positive_class
from xray_fastai.data.duplicates import same_image
from xray_fastai.data.exclusions import leave_out
from xray_fastai.data.folders import (
    count_other_files,
    find_root,
    note_on_unused,
    read_split,
    split_folder,
    unused_folders,
)
from xray_fastai.data.image_facts import Facts, examine_all
from xray_fastai.data.images import check_not_blank
from xray_fastai.data.patients import check_listed, note_on, numbered, patient_rule
from xray_fastai.data.sources.phantom import cached
from xray_fastai.data.splits import assign_folds, assign_validation, is_enough, of_one_patient
from xray_fastai.data.table import Source, check_for_table, is_table, read_table, with_patients
from xray_fastai.data.table_columns import GROUP
from xray_fastai.data.table_labels import Naming
from xray_fastai.system.errors import ImageError, UserError
from xray_fastai.system.progress import track
from xray_fastai.system.text import count_of, shown

PHANTOM_NAME = "built-in phantom"
"""The displayed name of the X-rays that the package draws."""
DEFAULT_FOLDER = "chest_xray"
ARCHITECTURE = "resnet50"
DEFAULTS = {"weights": "imagenet", "size": 224, "batch_size": 80, "lr": 2e-3, "patience": 20, "min_delta": 0.0}
REHEARSAL = {"weights": "none", "size": 48, "batch_size": 16, "lr": 1e-3, "patience": 4, "min_delta": 0.1}
"""The defaults of options by data: of images that the user has, and of drawn ones.

A rehearsal starts from random weights and should end in minutes on two cores without bf16. From scratch, a ResNet50
learns by steps rather than by images, so it takes many small ones. Without `min_delta`, the loss falls a little for
many more epochs. With it, seeds 42, 1 and 2 end after 11, 10 and 13 epochs, with a test AUC of 0.999, 0.987 and 0.996.
"""


@dataclass(frozen=True)
class Collection:
    """The images of a fit.

    `table` has one row for each image. Its columns are path, file (relative to the root), label, split, patient,
    is_valid, the fields of `image_facts.Facts`, and image (a number, equal for files that show the same image). Where
    the members of an ensemble validate on folds, it has a column fold, from 0 on, and is_valid is False.
    """

    name: str
    rehearsal: bool  # the images are the X-rays that the package draws
    classes: list[str]
    positive: str | None
    table: pd.DataFrame
    notes: list[str]
    skipped: list[str]  # lines that name files that are not used: they are printed, not stored

    @property
    def train(self) -> pd.DataFrame:
        return self.table[~self.table.is_valid]

    @property
    def valid(self) -> pd.DataFrame:
        return self.table[self.table.is_valid]

    @property
    def has_folds(self) -> bool:
        return "fold" in self.table

    def of_member(self, member: int) -> "Collection":
        """Return the images of one member of an ensemble, numbered from 0: it validates on the fold of this number."""
        if not self.has_folds:
            return self
        return replace(self, table=self.table.assign(is_valid=self.table.fold == member).drop(columns="fold"))


@dataclass(frozen=True)
class _Listed:
    """The images of a fit as folders or a table list them, before a file is read."""

    name: str
    root: Path  # the files of the table are relative to it
    classes: list[str]
    table: pd.DataFrame
    names: tuple[str, str]  # what messages call the images to train on, and those to validate on
    notes: list[str]
    valid: str  # as `assign_validation` takes it
    skipped: list[str] = field(default_factory=list)  # as in `Collection`


def read_collection(
    config: FitConfig, frame: pd.DataFrame | None = None, classes: Sequence[str] | None = None
) -> tuple[FitConfig, Collection]:
    """Read and check the images of a fit. The test split is not read.

    Args:
        config: the settings.
        frame: the table of images, if `config.data` is `table.FRAME`.
        classes: the classes that labels of 0 and 1 are of; None names them by `config.positive` (`table_labels`).

    Returns:
        The settings, completed by `with_data_defaults` and `with_weights_of`, and the images.

    Raises:
        UserError: the folder or table is not such a collection, or an image cannot be read.
    """
    config = with_data_defaults(config)
    check_for_table(config.data, config.images, config.column)
    listed = _listed_table(config, frame, classes) if is_table(config.data) else _listed_folders(config)
    data = _read_collection(config, listed)
    return config.with_weights_of(data.classes, data.positive), data


def with_data_defaults(config: FitConfig) -> FitConfig:
    """Fill in the settings that depend on the data. Without a data folder (`data` None) the fit is a rehearsal."""
    config = config.with_choices(data=default_data(), arch=ARCHITECTURE)
    config = config.with_choices(**(REHEARSAL if config.data is None else DEFAULTS))
    return config.with_choices(freeze_epochs=config.epochs)


def default_data() -> str | None:
    """Return the data folder to use if none is given: ./chest_xray, or None for the X-rays that the package draws."""
    return DEFAULT_FOLDER if Path(DEFAULT_FOLDER).is_dir() else None


def _read_collection(config: FitConfig, listed: _Listed) -> Collection:
    table, classes = listed.table, listed.classes
    positive = positive_class(classes, config.positive)
    check_listed(table, config.patients)
    exclusions = []
    if config.exclude is not None:
        table, exclusions = leave_out(table, listed.root, config.exclude)
    table, skipped = check_files(table, skip_bad=config.skip_bad)
    parts = {split: rows.reset_index(drop=True) for split, rows in table.groupby("split")}
    train, val, leaking = parts["train"], parts.get("val"), 0
    if config.members > 1 and listed.valid == "auto" and not is_enough(val, listed.valid):
        table, line = assign_folds(train, val, config.members, config.seed, listed.names)
    else:
        table, line, leaking = assign_validation(train, val, listed.valid, config.seed, listed.names)
        if config.members > 1:
            networks = "both networks" if config.members == 2 else f"all {config.members} networks"
            line += f", on which {networks} validate"
    notes = [line, *of_one_patient(table), *filter(None, [note_on(table)]), *exclusions, *listed.notes]
    if leaking:
        notes.append(f"left out of training: {leaking} images whose patient, or a copy, is in {listed.names[1]}")
    if skipped:
        notes.append(f"left out, as they cannot be read: {count_of(len(skipped), 'image')}")
    skipped = [*listed.skipped, *skipped]
    return Collection(listed.name, config.data is None, classes, positive, table, notes, skipped)


def _listed_folders(config: FitConfig) -> _Listed:
    root = cached() if config.data is None else find_root(config.data)
    rule = patient_rule(config.patient_pattern, config.patients)
    train, val = read_split(root, "train", rule=rule), None
    classes = _checked_classes(config, train)
    folder = split_folder(root, "val")
    if config.valid == "folder" or (config.valid == "auto" and folder is not None):
        val = read_split(root, "val", classes, rule)
    table = numbered(pd.concat([train, val], ignore_index=True))
    used = sorted(table.split.unique())
    notes = note_on_unused(unused_folders(root, {"test", *used}, classes))
    if others := count_other_files(root, used):
        notes.append(f"not read, as their names are no images': {count_of(others, 'file')}; data check names them")
    names = (f"{train.file[0].partition('/')[0]}/", "val/" if folder is None else f"{folder.name}/")
    return _Listed(PHANTOM_NAME if config.data is None else str(root), root, classes, table, names, notes, config.valid)


def _listed_table(config: FitConfig, frame: pd.DataFrame | None, of_model: Sequence[str] | None) -> _Listed:
    source = Source(
        config.data if frame is None else frame, config.images, config.column, Naming(config.positive, of_model)
    )
    listing = read_table(source)
    table, part, valid = listing.table, "the validation part", config.valid
    notes = listing.summary
    if valid.startswith(VALID_GROUP):
        table, part, valid = _with_group_held_out(table, valid), f"group {valid.removeprefix(VALID_GROUP)}", "folder"
    elif valid == "auto" and listing.is_decided:
        valid = "folder"
    has_val = (table.split == "val").any()
    if valid == "folder" and not has_val:
        message = "no row of the table is for validation (column split or is_valid); leave it out, or give a fraction"
        raise UserError(message, option="valid", value=config.valid)
    wanted = ["train", "val"] if valid in ("auto", "folder") else ["train"]
    if has_val and "val" not in wanted:
        notes.append(f"not used: {count_of(int((table.split == 'val').sum()), 'row')} of the validation part")
    table = table[table.split.isin(wanted)].reset_index(drop=True)
    if not (table.split == "train").any():
        raise UserError("none of its rows is for training", option="data", value=source.name)
    table = with_patients(table, listing, patient_rule(config.patient_pattern, config.patients))
    classes = _checked_classes(config, table[table.split == "train"])
    if len(classes) < 2:
        message = f"one class only to train on ({classes[0]}); give rows of two or more, or another column of labels"
        raise UserError(message, option="data", value=source.name)
    if has_val and "val" in wanted:
        _check_classes_of_val(table, classes, part)
    names = ("the training part" if listing.has_splits else "the table", part)
    name = f"{source.name} (images in {source.root})"
    return _Listed(name, source.root, classes, table, names, notes, valid, listing.examples)


def _with_group_held_out(table: pd.DataFrame, valid: str) -> pd.DataFrame:
    """Make one group of a table the validation part, and all others that are not for testing the training part."""
    name, column = valid.removeprefix(VALID_GROUP), f"{GROUP}group"
    if column not in table:
        raise UserError('needs the column of the groups, by column="group=HEADER"', option="valid", value=valid)
    table = table[table.split != "test"]
    inside = table[column] == name
    if not inside.any() or inside.all():
        known = ", ".join(shown(group, 30) for group in sorted(table[column].unique())[:10])
        fault = "no image of this group" if not inside.any() else "every image is of this group"
        raise UserError(f"{fault}; the groups are {known}", option="valid", value=valid)
    return table.assign(split=inside.map({True: "val", False: "train"}))


def _check_classes_of_val(table: pd.DataFrame, classes: list[str], part: str) -> None:
    found = set(table.label[table.split == "val"])
    for names, fault in ((found - set(classes), "the training images have not"), (set(classes) - found, "it lacks")):
        if names:
            message = f"{part} has other classes than the training images: {', '.join(sorted(names))}, which {fault}"
            raise UserError(f"{message}; correct the labels or the splits", option="data")


def _checked_classes(config: FitConfig, train: pd.DataFrame) -> list[str]:
    """Return the classes; a fault of them or of their weights is found before the files are read."""
    classes = sorted(train.label.unique())
    check_classes(classes)
    config.with_weights_of(classes, positive_class(classes, config.positive))
    return classes


def fingerprint(data: Collection) -> dict:
    """Return what identifies the images and their split: counts, and a SHA-256 over names, labels and contents."""
    digest = hashlib.sha256()
    side = "fold" if data.has_folds else "is_valid"
    for row in data.table[["file", "label", "patient", "digest", side]].itertuples(index=False):
        digest.update(repr(tuple(map(str, row))).encode())
    return {"train": len(data.train), "valid": len(data.valid), "sha256": digest.hexdigest()}


def check_files(table: pd.DataFrame, *, skip_bad: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """Decode every file once, so that a bad or blank file is found before the training.

    Returns:
        The table with the fields of `image_facts.Facts` and a column `image`, a number that is equal for identical and
        near-identical images; and the errors of the rows that `skip_bad` left out.

    Raises:
        UserError: a file cannot be read and `skip_bad` is off, or a class has no readable file left.
    """
    facts = [
        _unless_blank(path, item)
        for path, item in zip(table.path, track(examine_all(table.path), "reading", len(table)), strict=True)
    ]
    errors = [str(item) for item in facts if isinstance(item, ImageError)]
    if errors and not skip_bad:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}; repair or remove it, or leave out such files by skip_bad=True")
    kept = with_facts(table, facts)
    for split, label in {(s, c) for s, c in zip(table.split, table.label, strict=True)}:
        if not ((kept.split == split) & (kept.label == label)).any():
            raise UserError(f"{split}/{label}: no readable image in it; the first error: {errors[0]}")
    return kept.assign(image=same_image(kept)), errors


def _unless_blank(path: str, facts: Facts | ImageError) -> Facts | ImageError:
    try:
        if isinstance(facts, Facts):
            check_not_blank(facts.contrast)
    except ImageError as error:
        return ImageError(error.message, value=path)
    return facts


def with_facts(table: pd.DataFrame, facts: Sequence[Facts | ImageError]) -> pd.DataFrame:
    """Return the readable rows of a table, with a column for each field of their facts."""
    readable = [isinstance(item, Facts) for item in facts]
    names = [field.name for field in fields(Facts)]
    values = [[getattr(item, name) for name in names] for item in facts if isinstance(item, Facts)]
    kept = table[readable].reset_index(drop=True)
    return kept.assign(**pd.DataFrame(values, columns=names))
