"""Describes the objects in `model.json`, each by itself; `export.schema` puts them together."""

from typing import Annotated, Literal

from pydantic import Field

from xray_fastai.config.choices import CONTRASTS, MAX_MEMBERS, MAX_SIZE, MIN_SIZE
from xray_fastai.export.value_types import (
    ENTRIES,
    TENSORS,
    Count,
    Counts,
    Date,
    Dimensions,
    FileKey,
    Packed,
    Part,
    Positive,
    Text,
    at_most,
)


class Backbone(Part):
    features: Annotated[int, Field(ge=1, le=100_000)]
    # the shapes of its tensors
    tensors: Annotated[
        dict[Text, Annotated[list[Annotated[int, Field(ge=1, le=10**7)]], Field(max_length=8, fail_fast=True)]],
        at_most(TENSORS),
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
    contents: Contents | None = None  # of the images (`data.image_keys`); earlier exports have no such key


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
    metrics: Annotated[dict[Text, Estimate], at_most(ENTRIES)]
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
