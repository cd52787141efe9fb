"""Holds the settings of `fit` and of `predict`: each option once, with its default, limits and help text.

A field's metadata (`Setting`) says which values the field may have. `__post_init__` checks them, the command line makes
its options of the same fields, and an export records them: `FitConfig(**model["settings"])` repeats the fit. A new
option needs one new field.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from numbers import Real
from typing import Any, get_args

from xray_fastai.system.errors import UserError
from xray_fastai.system.text import fault_of, shown


@dataclass(frozen=True)
class Architecture:
    """Describes how `model.architectures` divides one of torchvision's networks."""

    features: int  # channels of the last convolutional block
    classifier: str  # prefix of the classifier's tensors
    early_layers: int  # layers of the backbone that form the first parameter group


ARCHITECTURES: dict[str, Architecture] = {
    # stem, layer1, layer2 | layer3, layer4: fastai's own split of a resnet
    "resnet18": Architecture(512, "fc", early_layers=6),
    "resnet34": Architecture(512, "fc", early_layers=6),
    "resnet50": Architecture(2048, "fc", early_layers=6),
    "resnet101": Architecture(2048, "fc", early_layers=6),
    "densenet121": Architecture(1024, "classifier", early_layers=7),
    "convnext_tiny": Architecture(768, "classifier", early_layers=4),
    "efficientnet_b0": Architecture(1280, "classifier", early_layers=5),
}
"""The backbones, by torchvision's names. To add one, add it to this table."""
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
INFERENCE_PRECISIONS = ("auto", "fp32", "bf16")
CONTRASTS = ("equalize", "none")
AUGMENTATIONS = ("strong", "light", "none")
SCHEDULES = ("adaptive", "constant")
CALIBRATIONS = ("cautious", "validation", "none")
RECIPES: dict[str, dict[str, str]] = {
    "default": {
        "contrast": "equalize",
        "augment": "strong",
        "schedule": "adaptive",
        "class_weights": "balanced",
    },
    "plain": {"contrast": "none", "augment": "none", "schedule": "constant", "class_weights": "3:1"},
}
"""The values that a recipe gives to options that the user left out. `plain` is the earlier work that this project
follows: ResNet50, Adam at a constant 2e-3, batch size 80, class weights 3:1 for 1341 normal and 3875 pneumonia images
(the class to detect has 1), frozen and then unfrozen."""
MIN_SIZE, MAX_SIZE = 32, 4096
"""Limits of the side, in pixels, of a network's input."""
MAX_CLASSES = 1000
MAX_TEXT = 4096
"""Characters of an option's text."""


@dataclass(frozen=True)
class Setting:
    """Describes one option: its help text, and which values it may have. None leaves a limit out."""

    help: str
    metavar: str | None = None  # stands for the value in the help text: DIR
    choices: tuple[str, ...] = ()
    min: float | None = None  # the smallest value
    max: float | None = None  # the largest value
    above: float | None = None  # all values are larger
    below: float | None = None  # all values are smaller
    check: Callable[[str], str | None] | None = None  # returns what the user has to do, or None for a right value
    printable: bool = False  # whether unprintable characters are refused, because an export or a message holds the text

    @property
    def is_path(self) -> bool:
        """Whether the value may name a file or a folder."""
        return self.metavar is not None and re.search("DIR|FILE|LIST.csv", self.metavar) is not None

    @property
    def is_closed(self) -> bool:
        """Whether `min` and `max` alone limit the values."""
        return self.above is None and self.below is None

    def advice(self, value: Any) -> str | None:
        """Return what the user has to do about a wrong value; None for a right one."""
        if self.choices and value not in self.choices:
            return f"choose one of {', '.join(self.choices)}"
        if not self._is_within(value):
            return f"give {self._limits()}"
        if self.printable and (fault := fault_of(value, MAX_TEXT)):
            return f"{fault}; give another text"
        return None if self.check is None else self.check(value)

    def _is_within(self, value: Any) -> bool:
        # in this direction each comparison is False for NaN
        return (
            (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _limits(self) -> str:
        if self.is_closed:
            return f"{self.min} or more" if self.max is None else f"a number from {self.min} to {self.max}"
        low = f"at least {self.min}" if self.above is None else f"above {self.above}"
        high = f"at most {self.max}" if self.below is None else f"below {self.below}"
        return f"a number that is {low} and {high}"


def setting_of(option: Field[Any]) -> Setting:
    """Return the description of a field of `FitConfig` or `PredictConfig`."""
    setting: Setting = option.metadata["setting"]
    return setting


def _setting(default: Any, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(help, **limits)})


def _check_fields(config: Any) -> None:
    """Convert and check each field of a settings object.

    Raises:
        UserError: a value has the wrong type, or is not allowed; the error names its option.
    """
    for option in fields(config):
        value = _converted(option, getattr(config, option.name))
        object.__setattr__(config, option.name, value)
        if value is not None and (advice := setting_of(option).advice(value)):
            text = f"{value:g}" if isinstance(value, float) else shown(value)
            raise UserError(advice, option=option.name, value=text)


def _converted(option: Field[Any], value: Any) -> Any:
    """Convert a value from Python to what JSON holds: a path to text, a NumPy number to Python's.

    In a path, ~ is the user's home folder, as a shell has it.
    """
    kind, *others = get_args(option.type) or (option.type,)
    if value is None and type(None) in others:
        return None
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if setting_of(option).is_path and isinstance(value, str):
        value = os.path.expanduser(value)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if kind in (int, float) and is_number and math.isfinite(value) and kind(value) == value:
        return kind(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        advice = "give text" if kind is str else f"give a value of type {kind.__name__}"
        raise UserError(advice, option=option.name, value=shown(value))
    return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_valid(text: str) -> str | None:
    fraction = _number(text)
    if text in ("auto", "folder") or (fraction is not None and 0.02 <= fraction <= 0.5):
        return None
    return "give auto, folder, or a fraction from 0.02 to 0.5"


def _check_class_weights(text: str) -> str | None:
    if text in ("balanced", "none"):
        return None
    parts = text.split(":" if ":" in text else ",")
    named = all("=" in part for part in parts)
    weights = [_number(part.rpartition("=")[2] if named else part) for part in parts]
    if all(w is not None and 0 < w < math.inf for w in weights) and (len(parts) == 2 or ":" not in text):
        return None
    return "give balanced, none, or numbers above 0 such as NORMAL=3,PNEUMONIA=1"


def _check_patient_pattern(text: str) -> str | None:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return f"not a regular expression: {error}"
    return None


WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names of devices, with any extension, that no file or folder can have on Windows."""


def _check_name(text: str) -> str | None:
    if WINDOWS_DEVICE.fullmatch(text) or text.endswith("."):
        return "no folder can have this name on Windows; give another"
    if re.fullmatch(r"[^\W_][\w.-]*", text):
        return None
    return "use letters, digits, '.', '_' and '-'; begin with a letter or a digit"


@dataclass(frozen=True)
class FitConfig:
    """Holds the settings of `fit`.

    `fit` chooses a value for an option that is None: by `recipe`, by the data or by the machine. It prints its choice
    and writes it into the export.

    Raises:
        UserError: a value is not allowed; the error names its option.
    """

    data: str | None = _setting(
        None,
        "Folder with train/CLASS/* and val/CLASS/*. [default: ./chest_xray, else phantom]",
        metavar="DIR",
        printable=True,
    )
    epochs: int = _setting(100, "Maximum number of epochs in each phase.", min=1)
    freeze_epochs: int | None = _setting(
        None, "Maximum number of epochs with the backbone frozen. [default: as epochs=]", min=0
    )
    frozen_views: int = _setting(
        2,
        "Number of augmented views of each image that the frozen phase trains on in turn. 0 draws a new view in each "
        "epoch, which is much slower.",
        min=0,
    )
    patience: int | None = _setting(
        None,
        "Stop a phase after this many epochs without a lower validation loss. [default: 20; phantom: 4]",
        min=1,
    )
    min_delta: float | None = _setting(
        None,
        "A validation loss counts as lower, for patience=, if it is lower by more than this. [default: 0; "
        "phantom: 0.1]",
        min=0,
    )
    batch_size: int | None = _setting(None, "Batch size. [default: 80; phantom: 16]", min=1)
    lr: float | None = _setting(
        None,
        "Peak learning rate of the head. In the unfrozen phase the earlier layers have a lower rate. [default: 0.002; "
        "phantom: 0.001]",
        above=0,
        below=10,
    )
    size: int | None = _setting(
        None,
        "Side in pixels to resize images to. [default: that of an export in weights=; 224; phantom: 48]",
        min=MIN_SIZE,
        max=MAX_SIZE,
    )
    arch: str | None = _setting(
        None,
        f"Backbone: {', '.join(ARCHITECTURES)}. [default: that of an export in weights=; resnet50]",
        choices=tuple(ARCHITECTURES),
    )
    weights: str | None = _setting(
        None,
        "Weights to start from: imagenet, none, an export to continue from (its classes may be others), or a .pth or "
        ".safetensors file. [default: imagenet; phantom: none]",
        metavar="imagenet|none|EXPORT|FILE",
        printable=True,
    )
    recipe: str = _setting(
        "default",
        "Gives contrast=, augment=, schedule= and class_weights= their values where you do not. plain has the "
        "values of the earlier work that this project follows.",
        choices=tuple(RECIPES),
    )
    contrast: str | None = _setting(
        None,
        "Contrast of the images: equalize (histogram equalization, which removes differences in exposure) or none. "
        "[default: that of an export in weights=; by recipe]",
        choices=CONTRASTS,
    )
    augment: str | None = _setting(
        None,
        f"How much training images are varied: {', '.join(AUGMENTATIONS)}. [default: by recipe]",
        choices=AUGMENTATIONS,
    )
    schedule: str | None = _setting(
        None, f"Learning rate schedule: {' or '.join(SCHEDULES)}. [default: by recipe]", choices=SCHEDULES
    )
    class_weights: str | None = _setting(
        None,
        "Weights of the classes in the loss: balanced, none, a number for each class by name (NORMAL=3,PNEUMONIA=1) or "
        "in their order (3,1), or of two classes the other and the one to detect (3:1). [default: by recipe]",
        metavar="balanced|none|LIST",
        check=_check_class_weights,
    )
    dropout: float = _setting(0.5, "Dropout probability before the last layer.", min=0, below=1)
    valid: str = _setting(
        "auto",
        "Validation images: folder (val/), a fraction of train/ such as 0.1, or auto (val/ if it is large enough, "
        "else val/ and a tenth of train/).",
        metavar="auto|folder|FRACTION",
        check=_check_valid,
    )
    positive: str | None = _setting(
        None,
        "Class to detect. [default: PNEUMONIA, or of two classes the one that is not named NORMAL, No Finding, ...]",
        metavar="CLASS",
    )
    target_sensitivity: float | None = _setting(
        None,
        "Put the decision threshold where new images like those of validation reach this sensitivity, with a "
        "probability of 0.95. [default: Youden's J]",
        above=0,
        max=1,
    )
    calibration: str = _setting(
        "validation",
        "How outputs become probabilities: validation (slope and intercept fitted to the validation images), cautious "
        "(one temperature, the largest that they allow) or none.",
        choices=CALIBRATIONS,
    )
    patient_pattern: str | None = _setting(
        None,
        "Regular expression that finds the patient in a file name. [default: PatientID in DICOM, then the names of "
        "public collections]",
        metavar="REGEX",
        check=_check_patient_pattern,
        printable=True,
    )
    patients: str | None = _setting(
        None, "List of the patients: a .csv file with the columns file and patient.", metavar="LIST.csv", printable=True
    )
    skip_bad: bool = _setting(False, "Leave out images that cannot be read, instead of stopping.")
    exclude: str | None = _setting(
        None, "List of files to leave out, as 'data check --fix' writes it.", metavar="LIST.csv"
    )
    seed: int = _setting(42, "Seed of all random numbers.", min=0, below=2**32)
    device: str = _setting("auto", f"Device: {', '.join(DEVICES)}.", choices=DEVICES)
    precision: str = _setting("auto", f"Precision: {', '.join(PRECISIONS)}.", choices=PRECISIONS)
    workers: int | None = _setting(
        None,
        "Number of processes that load images where decoded ones are not cached. [default: by device and cores]",
        min=0,
    )
    cache: bool = _setting(True, "Keep decoded images in the user's cache folder, for later epochs and fits.")
    name: str | None = _setting(None, "Name of the run. [default: date and time]", metavar="RUN", check=_check_name)
    exports: str = _setting("exports", "Folder to write the run's folder into.", metavar="DIR", printable=True)

    def __post_init__(self) -> None:
        _check_fields(self)

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


@dataclass(frozen=True)
class PredictConfig:
    """Holds the options of `predict`, in Python and on the command line.

    Raises:
        UserError: a value is not allowed, or `resume` lacks `output`; the error names its option.
    """

    output: str | None = _setting(None, "Write the rows to this new .csv or .jsonl file.", metavar="FILE")
    resume: bool = _setting(False, "Continue an interrupted output=.")
    heatmaps: str | None = _setting(None, "Write a Grad-CAM overlay of each image into this folder.", metavar="DIR")
    recursive: bool = _setting(False, "Search the subfolders, too.")
    threshold: float | None = _setting(
        None, "Decision threshold, a probability. [default: the one that fit chose]", min=0, max=1
    )
    gate: bool = _setting(True, "Predict uncertain for an image that is unlike the training images.")
    abstain: float = _setting(
        0.0,
        "Predict uncertain within this distance of the threshold; for two classes.",
        metavar="WIDTH",
        min=0,
        below=0.5,
    )
    uncalibrated: bool = _setting(False, "Give the softmax of the network's outputs, without fit's calibration=.")
    prevalence: float | None = _setting(
        None,
        "Share of the class to detect where the images come from, such as 0.03: the probabilities are moved to it. "
        "[default: the one that the export's are set for]",
        metavar="P",
        above=0,
        below=1,
    )
    tta: bool = _setting(False, "Test-time augmentation: the mean over five views of an image.")
    batch_size: int = _setting(32, "Batch size.", min=1)
    device: str = _setting("auto", f"Device: {', '.join(DEVICES)}.", choices=DEVICES)
    precision: str = _setting(
        "auto",
        f"Precision: {', '.join(INFERENCE_PRECISIONS)}. auto is bf16 if the model was trained in it.",
        choices=INFERENCE_PRECISIONS,
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.resume and self.output is None:
            raise UserError("give the file to continue by output=", option="resume")
        if self.prevalence is not None and self.uncalibrated:
            raise UserError(
                "moves the export's probabilities, which uncalibrated= leaves out; leave out one of them",
                option="prevalence",
                value=f"{self.prevalence:g}",
            )


UNCERTAIN = "uncertain"
"""The prediction of an image whose call is withheld."""
INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b\u200e\u200f\u2060-\u2064\ufeff]|^[\u200c\u200d]|[\u200c\u200d]$")
"""Characters that make two names of one look. Persian and Indian scripts need U+200C and U+200D between letters."""


def class_fault(name: str) -> str | None:
    """Return why a folder's name cannot be a class, which tables and exports print; None if it can."""
    if not name or "/" in name:
        return "is empty, or holds a slash"
    if match := INVISIBLE.search(name):
        return f"holds the invisible character {match.group()!a}"
    return fault_of(name, 255)


def check_classes(classes: Sequence[str]) -> None:
    """Check the classes of a data set.

    Raises:
        UserError: there are too many classes, an export cannot hold the name of one, or one is named `uncertain`.
    """
    if len(classes) > MAX_CLASSES:
        raise UserError(f"{len(classes):,} classes; the maximum is {MAX_CLASSES:,}", option="data")
    for name in classes:
        if fault := class_fault(name):
            raise UserError(f"the class folder {shown(name)} {fault}; rename it", option="data")
        if name == UNCERTAIN:
            raise UserError(
                f"the class folder {name} has the word for an image that is not called; rename it", option="data"
            )
