"""Describes `model.json` as a whole, and checks what its fields say together.

After the check `evaluate`, `interpret`, `predict` and the report can rely on the types and limits of the classes here,
in `export.parts` and in `export.value_types`.
"""

from dataclasses import fields
from typing import Annotated, Literal, get_type_hints

from pydantic import Field, create_model, model_validator

from xray_fastai.config.choices import MAX_MEMBERS, TIMM
from xray_fastai.config.class_names import MAX_CLASSES
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.export.layout import FORMAT
from xray_fastai.export.parts import (
    Ancestor,
    Backbone,
    Data,
    Ensemble,
    Epoch,
    Gate,
    Preprocessing,
    Recalibrated,
    Training,
    Weights,
    WorstGroup,
)
from xray_fastai.export.value_types import ENTRIES, Architecture, Class, Counts, Date, Part, Quantiles, Text, at_most
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import fault_of, shown

CALIBRATION_KINDS = ("cautious", "validation", "local", "matched", "earlier", "none")
"""How temperature and intercepts were chosen: the first two by `fit --calibration` (`training.calibration`), `local` by
`recalibrate`, `earlier` by the rule of exports without the key, `none` not at all."""


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
    architecture: Architecture
    # networks that are joined to one (`model.ensemble`); one alone, and earlier exports, have no such key
    members: Annotated[int, Field(ge=1, le=MAX_MEMBERS)] | None = None
    backbone: Backbone | None = None  # of timm's networks, of one member; the others' are in `backbones.json`
    classes: Annotated[list[Class], Field(min_length=2, max_length=MAX_CLASSES, fail_fast=True)]
    positive: str | None
    dropout: Annotated[float, Field(ge=0, lt=1)]
    class_weights: Annotated[list[Annotated[float, Field(gt=0)]], Field(max_length=MAX_CLASSES, fail_fast=True)] | None
    preprocessing: Preprocessing
    # what training images were varied by (`model.augmentation.AUGMENT`); 0.1.0 wrote no such key
    augmentation: Annotated[dict[Text, float], at_most(ENTRIES)] | None = None
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)]
    # `scaling.Scaling`; earlier exports have none
    intercepts: Annotated[list[Annotated[float, Field(ge=-1e3, le=1e3)]], Field(max_length=MAX_CLASSES)] | None = None
    # by class, what an image that says nothing gets (`scaling.prior_of`); earlier exports have no such key
    prior: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(max_length=MAX_CLASSES)] | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None
    calibration: Text  # how temperature, intercepts and threshold were chosen
    calibrated: bool | None = None  # by validation images; 0.1.0 wrote no such key: `model_json.parse`
    calibration_kind: Literal[CALIBRATION_KINDS] | None = None  # earlier exports have no such key: `model_json.parse`
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
    versions: Annotated[dict[Text, Text], at_most(ENTRIES)]
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
