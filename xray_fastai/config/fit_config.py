"""Holds the settings of `fit`.

An export records them: `FitConfig(**model["settings"])` repeats the fit. A new option needs one new field.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from xray_fastai.config.checks import (
    check_class_weights,
    check_column,
    check_log,
    check_name,
    check_patient_pattern,
    check_time_limit,
    check_valid,
    check_weights_range,
)
from xray_fastai.config.choices import (
    ARCHITECTURES,
    AUGMENTATIONS,
    CALIBRATIONS,
    CONTRASTS,
    DEVICES,
    FIND,
    MAX_MEMBERS,
    MAX_SIZE,
    MIN_SIZE,
    PRECISIONS,
    PUBLISHED_WEIGHTS,
    RECIPES,
    SCHEDULES,
    TIMM_PATTERN,
    TOOLS,
)
from xray_fastai.config.setting import check_fields, setting
from xray_fastai.system.errors import OptionError, UserError
from xray_fastai.system.text import seconds_of


@dataclass(frozen=True)
class FitConfig:
    """Holds the settings of `fit`.

    `fit` chooses a value for an option that is None: by `recipe`, by the data or by the machine. It prints its choice
    and writes it into the export.

    Raises:
        OptionError: a value is not allowed; the error names its option.
    """

    data: str | None = setting(
        None,
        "Folder with train/CLASS/* and val/CLASS/*, or a table of images, as .csv. [default: ./chest_xray, else "
        "phantom]",
        metavar="DIR|FILE",
        printable=True,
        panel="Data",
    )
    images: str | None = setting(
        None,
        "Folder of the images that a table lists. [default: that of the table]",
        metavar="DIR",
        printable=True,
        panel="Data",
    )
    column: str | None = setting(
        None,
        "Column of a table by what it holds: path, label, split, patient, or a name of your own to keep it by, such as "
        "group=Hospital. Repeat it for others. [default: by the names of the columns]",
        metavar="NAME=HEADER",
        check=check_column,
        printable=True,
        repeatable=True,
        panel="Data",
    )
    epochs: int = setting(100, "Maximum number of epochs in each phase.", min=1, panel="Training")
    freeze_epochs: int | None = setting(
        None, "Maximum number of epochs with the backbone frozen. [default: as epochs=]", min=0, panel="Training"
    )
    frozen_views: int = setting(
        1,
        "Number of views of each image that the frozen phase trains on in turn. 1 is the image as it is; more are "
        "augmented. 0 draws a new one in each epoch, which is much slower.",
        min=0,
        panel="Training",
    )
    time_limit: str | None = setting(
        None,
        "Time that the fit may take: 30m, 2h, 1h30m or seconds. Both phases are planned into it, so that the learning "
        "rate falls at the end.",
        metavar="TIME",
        check=check_time_limit,
        panel="Training",
    )
    patience: int | None = setting(
        None,
        "Stop a phase after this many epochs without a lower validation loss. [default: 20; phantom: 4]",
        min=1,
        panel="Training",
    )
    min_delta: float | None = setting(
        None,
        "A validation loss counts as lower, for patience=, if it is lower by more than this. [default: 0; "
        "phantom: 0.1]",
        min=0,
        panel="Training",
    )
    batch_size: int | None = setting(None, "Batch size. [default: 80; phantom: 16]", min=1, panel="Training")
    lr: float | str | None = setting(
        None,
        "Peak learning rate of the head. In the unfrozen phase the earlier layers have a lower rate. find searches one "
        "before each phase, as fastai's lr_find. [default: 0.002; phantom: 0.001]",
        above=0,
        below=10,
        word=FIND,
        panel="Training",
    )
    members: int = setting(
        1,
        "Number of networks to train into one export, which gives the mean of their outputs. K networks take K times "
        "as long, to train and to use. Each leaves out another part of the patients, so every image is judged by a "
        "network that was not trained on it.",
        min=1,
        max=MAX_MEMBERS,
        metavar="K",
        panel="Training",
    )
    size: int | None = setting(
        None,
        "Side in pixels to resize images to. [default: that of an export in weights=; 224; phantom: 48]",
        min=MIN_SIZE,
        max=MAX_SIZE,
        panel="Network",
    )
    arch: str | None = setting(
        None,
        f"Backbone: {', '.join(ARCHITECTURES)}, or timm/NAME (pip install 'xray-fastai[timm]'). [default: that of an "
        "export in weights=; resnet50]",
        choices=tuple(ARCHITECTURES),
        pattern=TIMM_PATTERN,
        panel="Network",
    )
    weights: str | None = setting(
        None,
        "Weights to start from: imagenet, xrv (torchxrayvision's resnet50, trained on chest X-rays), none, an export "
        "to continue from (its classes may be others), or a file: a checkpoint or .safetensors of the backbone. "
        "[default: imagenet; phantom: none]",
        metavar="imagenet|xrv|none|EXPORT|FILE",
        printable=True,
        panel="Network",
    )
    weights_range: str | None = setting(
        None,
        "What black and white are in the input that the network of a file in weights= was trained on: two numbers, "
        "such as -1,1. A network for one channel needs them. [default: ImageNet's normalization]",
        metavar="BLACK,WHITE",
        check=check_weights_range,
        panel="Network",
    )
    recipe: str = setting(
        "default",
        "Gives contrast=, augment=, schedule= and class_weights= their values where you do not. plain has the "
        "values of the earlier work that this project follows.",
        choices=tuple(RECIPES),
        panel="Training",
    )
    contrast: str | None = setting(
        None,
        "Contrast of the images: equalize (histogram equalization, which removes differences in exposure) or none. "
        "[default: that of an export in weights=; by recipe]",
        choices=CONTRASTS,
        panel="Network",
    )
    augment: str | None = setting(
        None,
        f"How much training images are varied: {', '.join(AUGMENTATIONS)}. [default: by recipe]",
        choices=AUGMENTATIONS,
        panel="Training",
    )
    schedule: str | None = setting(
        None,
        f"Learning rate schedule: {' or '.join(SCHEDULES)}. [default: by recipe]",
        choices=SCHEDULES,
        panel="Training",
    )
    class_weights: str | None = setting(
        None,
        "Weights of the classes in the loss: balanced, none, a number for each class by name (NORMAL=3,PNEUMONIA=1) or "
        "in their order (3,1), or of two classes the other and the one to detect (3:1). [default: by recipe]",
        metavar="balanced|none|LIST",
        check=check_class_weights,
        panel="Training",
    )
    dropout: float = setting(0.5, "Dropout probability before the last layer.", min=0, below=1, panel="Network")
    valid: str = setting(
        "auto",
        "Validation images: folder (val/), a fraction of train/ such as 0.1, auto (val/ if it is large enough, "
        "else val/ and a tenth of train/), or group:NAME (of a table, the images with this text in the column group).",
        metavar="auto|folder|FRACTION|group:NAME",
        check=check_valid,
        panel="Data",
        printable=True,
    )
    positive: str | None = setting(
        None,
        "Class to detect. [default: PNEUMONIA, or of two classes the one that is not named NORMAL, No Finding, ...]",
        metavar="CLASS",
        panel="Data",
    )
    target_sensitivity: float | None = setting(
        None,
        "Put the decision threshold where new images like those of validation reach this sensitivity, with a "
        "probability of 0.95. [default: Youden's J]",
        above=0,
        max=1,
        panel="Calibration",
    )
    calibration: str = setting(
        "validation",
        "How outputs become probabilities: validation (slope and intercept fitted to the validation images), cautious "
        "(one temperature, the largest that they allow) or none.",
        choices=CALIBRATIONS,
        panel="Calibration",
    )
    patient_pattern: str | None = setting(
        None,
        "Regular expression that finds the patient in a file name. [default: PatientID in DICOM, then the names of "
        "public collections]",
        metavar="REGEX",
        check=check_patient_pattern,
        printable=True,
        panel="Data",
    )
    patients: str | None = setting(
        None,
        "List of the patients: a .csv file with the columns file and patient.",
        metavar="LIST.csv",
        printable=True,
        panel="Data",
    )
    skip_bad: bool = setting(False, "Leave out images that cannot be read, instead of stopping.", panel="Data")
    exclude: str | None = setting(
        None, "List of files to leave out, as 'data check --fix' writes it.", metavar="LIST.csv", panel="Data"
    )
    seed: int = setting(42, "Seed of all random numbers.", min=0, below=2**32, panel="Run")
    device: str = setting("auto", f"Device: {', '.join(DEVICES)}.", choices=DEVICES, panel="Machine")
    precision: str = setting("auto", f"Precision: {', '.join(PRECISIONS)}.", choices=PRECISIONS, panel="Machine")
    workers: int | None = setting(
        None,
        "Number of processes that load images where decoded ones are not cached. [default: by device and cores]",
        min=0,
        panel="Machine",
    )
    cache: bool = setting(
        True, "Keep decoded images in the user's cache folder, for later epochs and fits.", panel="Machine"
    )
    name: str | None = setting(
        None, "Name of the run. [default: date and time]", metavar="RUN", check=check_name, panel="Run"
    )
    exports: str = setting(
        "exports", "Folder to write the run's folder into.", metavar="DIR", printable=True, panel="Run"
    )
    log: str | None = setting(
        None,
        f"Record the fit in {', '.join(TOOLS)}, or several with a comma between: local files beside the exports.",
        metavar="|".join(TOOLS),
        check=check_log,
        panel="Run",
    )
    quiet: bool = setting(
        False, "Show only errors and warnings; fit.log in the run's folder has the rest.", panel="Run"
    )

    def __post_init__(self) -> None:
        if isinstance(self.time_limit, (int, float)) and not isinstance(self.time_limit, bool):
            object.__setattr__(self, "time_limit", f"{self.time_limit}")  # seconds, as Python counts time
        check_fields(self)
        if self.weights_range is not None and self.weights in (None, "none", *PUBLISHED_WEIGHTS):
            message = "is for a file in weights=; leave it out"
            raise OptionError(message, option="weights_range", value=self.weights_range)

    @property
    def tools(self) -> list[str]:
        """The tools that `log` names."""
        return [] if self.log is None else [name.strip() for name in self.log.split(",")]

    @property
    def seconds_allowed(self) -> float | None:
        """The time limit in seconds; None if there is none."""
        return None if self.time_limit is None else seconds_of(self.time_limit)

    def check_target_sensitivity(self, classes: Sequence[str]) -> None:
        """Check that a sensitivity to reach is given for two classes only.

        Raises:
            UserError: there are more classes, which have no threshold.
        """
        if self.target_sensitivity is not None and len(classes) != 2:
            raise UserError(
                f"only two classes have a threshold, of {len(classes)} the most probable is predicted; leave it out",
                option="target_sensitivity",
                value=f"{self.target_sensitivity:g}",
            )

    def class_weight_list(self, classes: Sequence[str]) -> list[float] | None:
        """Return the weights given as numbers, in the order of the classes; None if `class_weights` has no numbers.

        Raises:
            UserError: they are not one for each class.
        """
        text = self.class_weights
        if text in (None, "balanced", "none"):
            return None
        if "=" not in text:
            weights = [float(part) for part in text.split(",")]
            if len(weights) == len(classes):
                return weights
            fault = f"{len(weights)} numbers for {len(classes)} classes; give one for each, in the order"
            raise UserError(f"{fault} {', '.join(classes)}", option="class_weights", value=text)
        pairs = [part.rpartition("=") for part in text.split(",")]
        by_name = {name.strip(): float(weight) for name, _, weight in pairs}
        if len(pairs) == len(by_name) and by_name.keys() == set(classes):
            return [by_name[name] for name in classes]
        raise UserError(f"give one for each of {', '.join(classes)}", option="class_weights", value=text)

    def with_weights_of(self, classes: Sequence[str], positive: str | None) -> "FitConfig":
        """Check the weights of the classes, and return a copy in which 3:1 is a list in the order of the classes.

        Args:
            classes: the classes.
            positive: the class to detect.

        Raises:
            UserError: they are not one for each class.
        """
        config = self
        if self.class_weights is not None and ":" in self.class_weights:
            if len(classes) != 2:
                message = f"for two classes; here give one for each of {', '.join(classes)}, as NAME=1"
                raise UserError(message, option="class_weights", value=self.class_weights)
            negative_weight, positive_weight = self.class_weights.split(":")
            weights = [positive_weight if name == positive else negative_weight for name in classes]
            config = replace(self, class_weights=",".join(weights))
        config.class_weight_list(classes)
        return config

    def with_recipe(self) -> "FitConfig":
        """Return a copy with the recipe's values (`RECIPES`) where the user gave none."""
        return self.with_choices(**RECIPES[self.recipe])

    def with_choices(self, **choices: Any) -> "FitConfig":
        """Return a copy with `choices` in place of those options that are None."""
        return replace(self, **{name: value for name, value in choices.items() if getattr(self, name) is None})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as `model.json` records them."""
        return asdict(self)
