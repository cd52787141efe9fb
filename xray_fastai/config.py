"""The settings of a fit: every default once, every check once.

The command line takes its defaults and help texts from here, and an export holds the settings as they were used, so
that `FitConfig(**model["settings"])` repeats the fit.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from typing import get_args

from xray_fastai.system.errors import UserError
from xray_fastai.system.text import fault_of, shown


@dataclass(frozen=True)
class Architecture:
    """Describes one of torchvision's networks; `model.architectures` takes it apart by this."""

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
"""The backbones, by torchvision's names. A new one is added here alone."""
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
INFERENCE_PRECISIONS = ("auto", "fp32", "bf16")
CONTRASTS = ("equalize", "none")
AUGMENTATIONS = ("strong", "light", "none")
SCHEDULES = ("adaptive", "constant")
RECIPES: dict[str, dict[str, str]] = {
    "default": {
        "contrast": "equalize",
        "augment": "strong",
        "schedule": "adaptive",
        "class_weights": "balanced",
    },
    "plain": {"contrast": "none", "augment": "none", "schedule": "constant", "class_weights": "3,1"},
}
"""What a recipe chooses where an option is not given. `plain` is the work that this one follows: ResNet50, Adam at a
constant 2e-3, batch 80, weights 3:1 for 1341 normal and 3875 pneumonia images, frozen and then unfrozen."""
SMALLEST, LARGEST = 32, 4096
"""The side in pixels of what a network can be given."""
MOST_CLASSES = 1000


def _setting(default, help: str, **limits):
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class FitConfig:
    """What `fit` does.

    What may be None, `fit` chooses (by `recipe`, the data or the machine); it says what it chose, and writes that into
    the export.

    Raises:
        UserError: a value that no fit can have, named by its option.
    """

    data: str | None = _setting(
        None, "Folder with train/CLASS/* and val/CLASS/*. [default: ./chest_xray, else phantom]"
    )
    epochs: int = _setting(100, "Epochs at most, in each phase.")
    freeze_epochs: int | None = _setting(None, "Epochs at most with the backbone frozen. [default: as --epochs]")
    frozen_views: int = _setting(
        2, "Augmented views of an image that the frozen phase takes in turn; 0: a new one each epoch, which takes long."
    )
    patience: int = _setting(20, "Stop a phase after this many epochs without a better validation loss.")
    batch_size: int = _setting(80, "Images a step.")
    lr: float = _setting(2e-3, "Peak learning rate of the head; earlier layers get less when unfrozen.")
    size: int | None = _setting(None, "Side in pixels that images are resized to. [default: 224; phantom: 64]")
    arch: str = _setting("resnet50", f"Backbone: {', '.join(ARCHITECTURES)}.")
    weights: str | None = _setting(
        None, "imagenet, none, or a .pth or .safetensors file. [default: imagenet; phantom: none]"
    )
    recipe: str = _setting("default", "default, or plain: the settings of the work that this one follows.")
    contrast: str | None = _setting(
        None, "equalize (histogram, so exposure no longer shows) or none. [default: by recipe]"
    )
    augment: str | None = _setting(None, f"{', '.join(AUGMENTATIONS)}: how training images vary. [default: by recipe]")
    schedule: str | None = _setting(None, f"Of the learning rate: {' or '.join(SCHEDULES)}. [default: by recipe]")
    class_weights: str | None = _setting(
        None, "balanced, none, or one number a class, such as 3,1. [default: by recipe]"
    )
    dropout: float = _setting(0.5, "Dropout before the last layer.")
    valid: str = _setting(
        "auto", "folder (val/), a fraction of train/ such as 0.1, or auto: val/ if large enough, else also a tenth."
    )
    positive: str | None = _setting(None, "The class to detect. [default: PNEUMONIA, where there is one]")
    target_sensitivity: float | None = _setting(
        None, "Put the decision threshold where validation reaches this sensitivity. [default: Youden's J]"
    )
    patient_pattern: str | None = _setting(
        None,
        "Regular expression that finds the patient in a file name. [default: PatientID in DICOM, the Kaggle names]",
    )
    skip_bad: bool = _setting(False, "Go on without images that can't be read.")
    exclude: str | None = _setting(None, "A list of files to leave out, as data check --fix writes it.")
    seed: int = _setting(42, "Seed of everything random.")
    device: str = _setting("auto", f"{', '.join(DEVICES)}.")
    precision: str = _setting("auto", f"{', '.join(PRECISIONS)}.")
    workers: int | None = _setting(None, "Processes that load images. [default: by device and cores]")
    cache: bool = _setting(True, "Keep decoded images in the user's cache folder, for later epochs and fits.")
    name: str | None = _setting(None, "Name of the run. [default: date and time]")
    exports: str = _setting("exports", "Folder that the run's folder is written into.")

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, _as_declared(f.name, f.type, getattr(self, f.name)))
        for option, least in [("epochs", 1), ("patience", 1), ("batch_size", 1), ("size", SMALLEST)]:
            value = getattr(self, option)
            if value is not None and value < least:
                raise _refused(option, value, f"give {least} or more")
        if self.size is not None and self.size > LARGEST:
            raise _refused("size", self.size, f"give {LARGEST} or less")
        for option in ("freeze_epochs", "frozen_views", "workers"):
            value = getattr(self, option)
            if value is not None and value < 0:
                raise _refused(option, value, "give 0 or more")
        for option, choices in [
            ("arch", tuple(ARCHITECTURES)),
            ("device", DEVICES),
            ("precision", PRECISIONS),
            ("recipe", tuple(RECIPES)),
            ("contrast", (None, *CONTRASTS)),
            ("augment", (None, *AUGMENTATIONS)),
            ("schedule", (None, *SCHEDULES)),
        ]:
            if getattr(self, option) not in choices:
                choices = [choice for choice in choices if choice is not None]
                raise _refused(option, getattr(self, option), f"choose one of {', '.join(choices)}")
        if not 0 < self.lr < 10:
            raise _refused("lr", self.lr, "give a learning rate above 0, such as 2e-3")
        if not 0 <= self.dropout < 1:
            raise _refused("dropout", self.dropout, "give a probability from 0 to below 1")
        if self.target_sensitivity is not None and not 0 < self.target_sensitivity <= 1:
            raise _refused("target_sensitivity", self.target_sensitivity, "give a share above 0, such as 0.95")
        if not 0 <= self.seed < 2**32:
            raise _refused("seed", self.seed, "give a whole number from 0 to 4294967295")
        if self.valid not in ("auto", "folder"):
            fraction = _number(self.valid)
            if fraction is None or not 0.02 <= fraction <= 0.5:
                raise _refused("valid", self.valid, "give auto, folder, or a fraction from 0.02 to 0.5")
        if self.class_weights not in (None, "balanced", "none"):
            weights = [_number(part) for part in self.class_weights.split(",")]
            if any(w is None or not 0 < w < float("inf") for w in weights):
                raise _refused(
                    "class_weights", self.class_weights, "give balanced, none, or numbers above 0 such as 3,1"
                )
        if self.patient_pattern is not None:
            try:
                re.compile(self.patient_pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise _refused("patient_pattern", self.patient_pattern, f"not a regular expression: {error}") from None
        for option in ("data", "weights", "exports", "patient_pattern"):
            value = getattr(self, option)
            if value is not None and (fault := fault_of(str(value), 4096)):
                raise _refused(option, shown(value), f"{fault}; give one without")
        if self.name is not None and not re.fullmatch(r"[^\W_][\w.-]*", self.name):
            raise _refused("name", self.name, "use letters, digits, '.', '_' and '-', a letter or digit first")

    @property
    def valid_fraction(self) -> float | None:
        """The share of train/ to hold out, where the option is a number."""
        return None if self.valid in ("auto", "folder") else float(self.valid)

    def class_weight_list(self) -> list[float] | None:
        """The weights given by number, in the order of the classes; None for `balanced` and `none`."""
        return None if self.class_weights in ("balanced", "none") else [float(w) for w in self.class_weights.split(",")]

    def check_class_weights(self, classes: Sequence[str]) -> None:
        """Raises:
        UserError: weights were given by number, and not one for each class.
        """
        given = self.class_weight_list()
        if given is not None and len(given) != len(classes):
            raise UserError(
                f"{len(given)} numbers for {len(classes)} classes; give one each, in the order {', '.join(classes)}",
                option="class_weights",
                value=self.class_weights,
            )

    def with_recipe(self) -> "FitConfig":
        """A copy in which what `RECIPES` choose is filled in."""
        return self.with_choices(**RECIPES[self.recipe])

    def with_choices(self, **choices) -> "FitConfig":
        """A copy in which what was left to `fit` (None) is filled in."""
        return replace(self, **{name: value for name, value in choices.items() if getattr(self, name) is None})

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class PredictConfig:
    """The options of `predict`, in Python and on the command line.

    Limits stand in the metadata of a field: `min` and `max` of a number, the `choices` of a name. `metavar` is how the
    command line names a value.

    Raises:
        UserError: a value is outside its limits, or `resume` lacks `output`.
    """

    output: str | None = _setting(None, "Write the rows to this new .csv or .jsonl file.", metavar="FILE")
    resume: bool = _setting(False, "Continue an interrupted --output.")
    heatmaps: str | None = _setting(None, "Write a Grad-CAM overlay of each image into this folder.", metavar="DIR")
    recursive: bool = _setting(False, "Search the subfolders, too.")
    threshold: float | None = _setting(
        None, "Decision threshold, a probability. [default: the one that fit chose]", min=0, max=1
    )
    uncalibrated: bool = _setting(False, "Give the probabilities without temperature scaling.")
    tta: bool = _setting(False, "Test-time augmentation: the mean over five views of an image.")
    batch_size: int = _setting(32, "Batch size.", min=1)
    device: str = _setting("auto", f"{', '.join(DEVICES)}.", choices=DEVICES)
    precision: str = _setting("auto", "auto: bf16 where the model was trained in it.", choices=INFERENCE_PRECISIONS)

    def __post_init__(self):
        for f in fields(self):
            value = _as_declared(f.name, f.type, getattr(self, f.name))
            object.__setattr__(self, f.name, value)
            low, high, choices = (f.metadata.get(limit) for limit in ("min", "max", "choices"))
            if value is None:
                continue
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                limits = f"{low:g} or more" if high is None else f"a number from {low:g} to {high:g}"
                raise _refused(f.name, f"{value:g}", f"give {limits}")
            if choices is not None and value not in choices:
                raise _refused(f.name, value, f"choose one of {', '.join(choices)}")
        if self.resume and self.output is None:
            raise UserError("give the file to continue by --output", option="resume")


def class_fault(name: str) -> str | None:
    """What keeps a folder's name from being a class: it is printed in tables, and written into exports."""
    return "is empty, or holds a slash" if not name or "/" in name else fault_of(name, 255)


def check_classes(classes: Sequence[str]) -> None:
    """Raises:
    UserError: there are too many classes, or one has a name that no export can hold.
    """
    if len(classes) > MOST_CLASSES:
        raise UserError(f"{len(classes):,} classes; {MOST_CLASSES:,} are the most", option="data")
    for name in classes:
        if fault := class_fault(name):
            raise UserError(f"the class folder {shown(name)} {fault}; rename it", option="data")


HELP: dict[str, str] = {f.name: f.metadata["help"] for f in fields(FitConfig)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _as_declared(name: str, kind: type, value):
    """A value from Python as JSON will have it: paths as text, NumPy's numbers as Python's."""
    kind, *others = get_args(kind) or (kind,)
    if value is None and type(None) in others:
        return None
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    number = isinstance(value, Real) and not isinstance(value, bool)
    if kind in (int, float) and number and math.isfinite(value) and kind(value) == value:
        return kind(value)
    if not isinstance(value, kind):
        raise _refused(name, value, f"give {'text' if kind is str else f'one of type {kind.__name__}'}")
    return value


def _refused(name: str, value, advice: str) -> UserError:
    return UserError(advice, option=name, value=value)
