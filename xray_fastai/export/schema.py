"""Checks `model.json` before other code reads it.

After the check `evaluate`, `interpret`, `predict` and the report can rely on the types and limits of the classes below.
The memory is limited for any file: by its size, by its number of objects and lists, and by the entries of each table.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from xray_fastai.config.choices import ARCHITECTURES, CONTRASTS, MAX_MEMBERS, MAX_SIZE, MIN_SIZE, TIMM, TIMM_PATTERN
from xray_fastai.config.class_names import MAX_CLASSES, class_fault
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import fault_of, shown
from xray_fastai.system.untrusted import read_received

FORMAT = 1
"""The version of `model.json`'s layout; a newer one is refused."""

SETTINGS, WEIGHTS = "model.json", "model.safetensors"

PICKLE = "learner.pkl"
HISTORY_COLUMNS = ("phase", "epoch", "train_loss", "valid_loss", "accuracy", "roc_auc", "lr")
"""The columns of `history.csv`."""

CALIBRATION_KINDS = ("cautious", "validation", "local", "matched", "earlier", "none")
"""How temperature and intercepts were chosen: the first two by `fit --calibration` (`training.calibration`), `local` by
`recalibrate`, `earlier` by the rule of exports without the key, `none` not at all."""

LIMIT = 8_000_000
"""The largest accepted file, in bytes. A fit of 750,000 images takes as much: 8 bytes for the content of each, and 23
for the name of each validation file, a tenth of them."""
NODES = 10_000
"""The largest number of objects and lists; a hundred are usual. An empty one takes 2 bytes in the file and 64 in
memory."""
ENTRIES = 1_000
"""The largest number of entries of a table of names, and of each list but that of the validation files."""
TENSORS = 5_000
"""The largest number of a backbone's tensors; timm's largest networks have 3,000."""
QUANTILES = 101
"""How many values describe the scores of a class."""


def _text(text: str) -> str:
    if fault := fault_of(text, 4096):
        raise ValueError(fault)
    return text


def _class(name: str) -> str:
    if fault := class_fault(name):
        raise ValueError(fault)
    return name


def _architecture(name: Any) -> Any:
    if not isinstance(name, str) or (name not in ARCHITECTURES and not re.fullmatch(TIMM_PATTERN, name)):
        raise ValueError(f"{shown(name)} is none of {', '.join(ARCHITECTURES)}, timm/NAME")
    return name


def _date(text: str) -> str:
    datetime.fromisoformat(text)
    return text


def _small_table(table: Any) -> Any:
    if isinstance(table, dict) and len(table) > ENTRIES:
        raise ValueError(f"{len(table):,} entries, more than {ENTRIES:,}")
    return table


def _tensor_table(table: Any) -> Any:
    if isinstance(table, dict) and len(table) > TENSORS:
        raise ValueError(f"{len(table):,} entries, more than {TENSORS:,}")
    return table


Text = Annotated[str, AfterValidator(_text)]
Class = Annotated[str, AfterValidator(_class)]
Date = Annotated[str, Field(max_length=40), AfterValidator(_date)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Counts = Annotated[dict[Class, Count], BeforeValidator(_small_table)]
Quantiles = Annotated[list[float], Field(min_length=QUANTILES, max_length=QUANTILES, fail_fast=True)]
Packed = Annotated[str, Field(pattern="^([0-9A-Za-z+/]{8})*$")]
"""Keys of 6 bytes each, in base64."""
Positive = Annotated[float, Field(gt=0)]
Dimensions = Annotated[int, Field(ge=1, le=256)]
FileKey = Annotated[str, Field(pattern="^[0-9a-f]{12}$")]


class Part(BaseModel):
    """Describes an object of `model.json`: exact types and finite numbers. Unknown keys are kept for a warning."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def unknown(self, where: str = "") -> Iterator[str]:
        """Yield the paths of the keys that this version does not know."""
        yield from (f"{where}{key}" for key in self.model_extra or {})
        for name in type(self).model_fields:
            value = getattr(self, name)
            for i, part in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(part, Part):
                    yield from part.unknown(f"{where}{name}[{i}]." if isinstance(value, list) else f"{where}{name}.")


class Backbone(Part):
    features: Annotated[int, Field(ge=1, le=100_000)]
    # the shapes of its tensors
    tensors: Annotated[
        dict[Text, Annotated[list[Annotated[int, Field(ge=1, le=10**7)]], Field(max_length=8, fail_fast=True)]],
        BeforeValidator(_tensor_table),
    ]


class Preprocessing(Part):
    size: Annotated[int, Field(ge=MIN_SIZE, le=MAX_SIZE)]
    channels: Literal["grey"]
    resize: Literal["whole image, bilinear"]
    contrast: Literal[CONTRASTS] = "none"  # earlier exports have no such key
    scale: Literal["imagenet"]


class Patients(Part):
    train: Count
    valid: Count
    images_without: Count | None = None  # images that each count as a patient; earlier exports have no such key
    known_by: Annotated[dict[Text, Count], Field(max_length=ENTRIES)] | None = None  # images by what named them


class Contents(Part):
    salt: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    train: Packed
    valid: Packed


class Data(Part):
    name: Text
    rehearsal: bool
    train: Counts
    valid: Counts
    patients: Patients
    notes: Annotated[list[Text], Field(max_length=ENTRIES, fail_fast=True)]
    valid_files: Annotated[list[FileKey], Field(fail_fast=True)]
    contents: Contents | None = None  # of the images (`data.labelled`); earlier exports have no such key


class Parameters(Part):
    total: Count
    frozen_phase: Count


class Phase(Part):
    name: Text
    epochs: Count
    best_epoch: Count | None
    end: Text
    lr: Positive | None = None  # the peak rate of the head, where it was searched (`fit --lr find`)


class Epoch(Part):
    phase: Text
    epoch: Count
    train_loss: float
    valid_loss: float
    accuracy: float
    roc_auc: float
    lr: float


Estimate = Annotated[list[float | None], Field(min_length=3, max_length=3)]
"""A value and its interval."""


class Member(Part):
    member: Annotated[int, Field(ge=1, le=MAX_MEMBERS)]
    seed: Count
    train: Count  # images
    valid: Count
    seconds: Annotated[float, Field(ge=0, le=1e10)]
    phases: Annotated[list[Phase], Field(max_length=ENTRIES, fail_fast=True)]
    best: Epoch
    roc_auc: Estimate  # on the images that it validated on
    balanced_accuracy: Estimate


class Training(Part):
    device: Text
    precision: Text
    weights: Text
    parameters: Parameters
    seconds: Annotated[float, Field(ge=0, le=1e10)]
    phases: Annotated[list[Phase], Field(max_length=ENTRIES, fail_fast=True)]
    members: Annotated[list[Member], Field(max_length=MAX_MEMBERS, fail_fast=True)] | None = None  # of an ensemble


class Ensemble(Part):
    outputs: Literal["out of fold", "validation"]  # of the network that left an image out; or the mean of all
    planned: Annotated[int, Field(ge=2, le=MAX_MEMBERS)]  # an interrupted fit has trained fewer
    images: Count
    patients: Count
    metrics: Annotated[dict[Text, Estimate], BeforeValidator(_small_table)]
    weakest: Text | None  # which network is worse than another by more than chance


class WorstGroup(Part):
    name: Text
    images: Count
    roc_auc: float
    low: float
    high: float
    groups: Count | None = None
    expected: float | None = None


class Weights(Part):
    file: Literal["model.safetensors"]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    tensors: Count


class GateDimensions(Part):
    statistics: Dimensions
    pictures: Dimensions
    features: Dimensions


class GateRest(Part):
    statistics: Positive
    pictures: Positive
    features: Positive


class Gate(Part):
    limit: Annotated[float, Field(ge=0, le=100)]
    images: Count
    medians: Annotated[list[float], Field(min_length=4, max_length=4, fail_fast=True)]
    spreads: Annotated[list[Positive], Field(min_length=4, max_length=4, fail_fast=True)]
    quantiles: Annotated[list[float], Field(min_length=101, max_length=101, fail_fast=True)]
    dimensions: GateDimensions
    rest: GateRest


class Ancestor(Part):
    name: Text  # the export's folder
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of its weights
    created: Date


class Compared(Part):
    before: Estimate
    after: Estimate
    difference: Estimate  # paired


class Recalibrated(Part):
    created: Date
    method: Text
    images: Count  # with a label
    patients: Count
    counts: Counts  # of the images, by class
    unlabelled: Count  # images
    metrics: dict[Text, Compared]


class _Settings(Part):
    @model_validator(mode="after")
    def _as_a_fit(self) -> "_Settings":
        given = {name: getattr(self, name) for name in self.model_fields_set if name in type(self).model_fields}
        for name, value in given.items():
            if isinstance(value, str) and (fault := fault_of(value, 4096)):
                raise ValueError(f"{name}: {fault}")
        # not compiled in this process: compiling a hostile regular expression may never end
        given.pop("patient_pattern")
        try:
            FitConfig(**given)
        except UserError as error:
            raise ValueError(str(error)) from None
        return self


_types = get_type_hints(FitConfig)
Settings = create_model(  # an export of an earlier version lacks some; the two that are read later are required
    "Settings",
    __base__=_Settings,
    **{f.name: (_types[f.name], ... if f.name in ("data", "patient_pattern") else None) for f in fields(FitConfig)},
)


class Export(Part):
    """Describes `model.json`."""

    format: Annotated[int, Field(ge=1, le=FORMAT)]
    created: Date
    status: Literal["complete", "interrupted", "diverged"]
    disclaimer: Text
    architecture: Annotated[str, BeforeValidator(_architecture)]
    # networks that are joined to one (`model.ensemble`); one alone, and earlier exports, have no such key
    members: Annotated[int, Field(ge=1, le=MAX_MEMBERS)] | None = None
    backbone: Backbone | None = None  # of timm's networks, of one member; the others' are in `backbones.json`
    classes: Annotated[list[Class], Field(min_length=2, max_length=MAX_CLASSES, fail_fast=True)]
    positive: str | None
    dropout: Annotated[float, Field(ge=0, lt=1)]
    class_weights: Annotated[list[Annotated[float, Field(gt=0)]], Field(max_length=MAX_CLASSES, fail_fast=True)] | None
    preprocessing: Preprocessing
    # what training images were varied by (`model.augmentation.AUGMENT`); 0.1.0 wrote no such key
    augmentation: Annotated[dict[Text, float], BeforeValidator(_small_table)] | None = None
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)]
    # `scaling.Scaling`; earlier exports have none
    intercepts: Annotated[list[Annotated[float, Field(ge=-1e3, le=1e3)]], Field(max_length=MAX_CLASSES)] | None = None
    # by class, what an image that says nothing gets (`scaling.prior_of`); earlier exports have no such key
    prior: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(max_length=MAX_CLASSES)] | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None
    calibration: Text  # how temperature, intercepts and threshold were chosen
    calibrated: bool | None = None  # by validation images; 0.1.0 wrote no such key: `_completed`
    calibration_kind: Literal[CALIBRATION_KINDS] | None = None  # earlier exports have no such key: `_completed`
    data: Data
    settings: Settings
    training: Training
    best: Epoch | None  # null, too, of an ensemble, whose networks have one each
    ensemble: Ensemble | None = None  # of several networks, what their outputs show
    worst_group: WorstGroup | None = None
    # the exports that training continued from, the nearest first; earlier exports have no such key
    lineage: Annotated[list[Ancestor], Field(max_length=ENTRIES, fail_fast=True)] | None = None
    recalibrated: Recalibrated | None = None  # by `recalibrate`; earlier exports have no such key
    # trained by fastai's methods on a learner, and written by `save_export`: `settings` does not repeat it
    by_hand: bool | None = None  # earlier exports have no such key
    # `inference.gate`, with tensors `gate.*` among the weights; earlier exports have no such key
    gate: Gate | None = None
    called: Counts | None = None  # validation images by the class predicted; earlier exports have no such key
    # by class, quantiles 0, 0.01, ... 1 of the log odds of `positive` by the network's outputs on the validation images
    scores: dict[Class, Quantiles] | None = None  # of two classes; earlier exports have no such key
    versions: Annotated[dict[Text, Text], BeforeValidator(_small_table)]
    weights: Weights

    @model_validator(mode="after")
    def _agrees(self) -> "Export":
        if (self.backbone is None) == self.architecture.startswith(TIMM):
            raise ValueError(f"backbone: missing, or not for {shown(self.architecture)}, whose tensors are known")
        known, two = set(self.classes), len(self.classes) == 2
        if len(known) < len(self.classes):
            raise ValueError("classes: one of them appears twice")
        if self.positive is not None and self.positive not in known:
            raise ValueError(f"positive: {shown(self.positive)} is none of the classes")
        if two and (self.positive is None or self.threshold is None):
            raise ValueError("positive and threshold: two classes need the class to detect and its threshold")
        if not two and self.threshold is not None:
            raise ValueError("threshold: more than two classes have none, the most probable is predicted")
        if self.class_weights is not None and len(self.class_weights) != len(self.classes):
            raise ValueError(f"class_weights: {len(self.class_weights)} for {len(self.classes)} classes")
        if self.intercepts is not None and len(self.intercepts) != len(self.classes):
            raise ValueError(f"intercepts: {len(self.intercepts)} for {len(self.classes)} classes")
        if self.gate is not None and self.gate.quantiles != sorted(self.gate.quantiles):
            raise ValueError("gate.quantiles: they fall")
        if self.prior is not None and (len(self.prior) != len(self.classes) or abs(sum(self.prior) - 1) > 1e-6):
            raise ValueError(f"prior: not the probabilities of {len(self.classes)} classes, whose sum is 1")
        if self.scores is not None and (self.scores.keys() != known or not two):
            raise ValueError("scores: not of two classes, the classes of the model")
        for name, values in (self.scores or {}).items():
            if values != sorted(values):
                raise ValueError(f"scores.{shown(name)}: quantiles that fall")
        for split in ("train", "valid"):
            if not getattr(self.data, split).keys() <= known:
                raise ValueError(f"data.{split}: counts a class that is none of the classes")
        settings, preprocessing = self.settings, self.preprocessing
        stated_twice = {
            "settings.arch": (settings.arch, self.architecture),
            "settings.size": (settings.size, preprocessing.size),
            "settings.contrast": (settings.contrast, preprocessing.contrast),
            "settings.dropout": (settings.dropout, self.dropout),
        }
        for name, (setting, fact) in stated_twice.items():
            if setting not in (None, fact):  # earlier exports lack some of the settings
                raise ValueError(f"{name}: {shown(setting)} contradicts {shown(fact)}, which the weights are for")
        if self.settings.data is None and not self.data.rehearsal:
            raise ValueError("settings.data: null, which is for a rehearsal only")
        return self


def read_settings(folder: Path) -> dict[str, Any]:
    """Read and check the `model.json` of a folder.

    Raises:
        UserError: the file is missing, unreadable, damaged, or written by a newer version; on one line, with the JSON
            path.
    """
    return parse(read_received(folder, SETTINGS, LIMIT), folder / SETTINGS)[0]


def parse(content: bytes, file: Path) -> tuple[dict[str, Any], list[str]]:
    """Check the bytes of a `model.json`.

    Args:
        content: at most `LIMIT` bytes.
        file: its name for errors.

    Returns:
        The settings as they stand in the file, and the paths of the keys that this version does not know. Missing
        `calibrated` and `calibration_kind` are filled in.

    Raises:
        UserError: as `read_settings`.
    """
    nodes = content.count(b"{") + content.count(b"[")
    if nodes > NODES:
        raise _damaged(file, f"{nodes:,} objects and lists, more than {NODES:,}")
    try:
        text = content.decode("utf-8")
        model = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_number, parse_int=_integer)
    except RecursionError:
        raise _damaged(file, "nested too deeply") from None
    except ValueError as error:
        raise _damaged(file, shown(error, 120)) from None
    version = model.get("format") if isinstance(model, dict) else None
    if type(version) is int and version > FORMAT:
        raise UserError(f"{file}: written by a newer version (format {shown(version)}); update xray-fastai")
    try:
        export = Export.model_validate(model)
    except ValidationError as error:
        raise _damaged(file, _first(error)) from None
    return _completed(model), list(export.unknown())


def _completed(model: dict[str, Any]) -> dict[str, Any]:
    """Add `calibrated` and `calibration_kind` to earlier settings: in 0.1.0 the first words of the note say it."""
    if model.get("calibrated") is None:
        model["calibrated"] = not model["calibration"].startswith("not calibrated")
    if model.get("calibration_kind") is None:
        model["calibration_kind"] = "earlier" if model["calibrated"] else "none"
    return model


def warn(file: Path, unknown: list[str]) -> None:
    """Print a warning on standard error that a newer version may have written the file."""
    if unknown:
        names = ", ".join(shown(name) for name in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        print(
            f"Warning: {file}: {names} unknown to this version and ignored; did a newer xray-fastai write it?",
            file=sys.stderr,
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(duplicate)} appears twice")
    return table


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _integer(text: str) -> int:
    if len(text) > 20:  # more than 64 bits; a float can take up to 309 digits
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _damaged(file: Path, fault: str) -> UserError:
    return UserError(f"{file}: damaged: {fault}; get the export again")


_KINDS = {"model_type": "should be an object", "dict_type": "should be an object", "list_type": "should be a list"}


def _first(error: ValidationError) -> str:
    """Return the first fault as `path: what is wrong (it is VALUE)`."""
    fault = error.errors(include_url=False)[0]
    steps = (f"[{step}]" if isinstance(step, int) else f".{shown(step, 40)}" for step in fault["loc"])
    where = "".join(steps).removeprefix(".")
    text = _KINDS.get(fault["type"]) or re.sub(r"^Value error, ", "", fault["msg"]).removesuffix(".")
    if fault["type"] != "value_error":
        text = text[0].lower() + text[1:]
    simple = fault["type"] != "missing" and not isinstance(fault["input"], (dict, list))
    value = f" (it is {shown(repr(fault['input']), 40)})" if simple else ""
    return shown(f"{where}: {text}{value}" if where else f"{text}{value}", 240)
