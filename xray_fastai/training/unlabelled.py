"""Adapts a model to images of another place that have no labels: `recalibrate --unlabelled`.

Batch norm gets statistics of the local images (`model.batch_norm`). Or, with `--match-scores`, the intercept moves, so
that the share called positive fits validation's (`metrics.alignment`). What was measured stands in the README of this
folder (`tests.benchmarks.unlabelled`).
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import logit
from sklearn.metrics import roc_auc_score

from xray_fastai.config.choices import network_of
from xray_fastai.data import labelled
from xray_fastai.data.folders import find_images
from xray_fastai.data.patients import check_listed, numbered, patient_rule, patients_in
from xray_fastai.export.layout import QUANTILES
from xray_fastai.inference.model import Model
from xray_fastai.inference.scaling import prior_of
from xray_fastai.inference.stream import decode_batches, predict_all
from xray_fastai.metrics.alignment import Alignment, Reference, align, log_odds, quantiles
from xray_fastai.model.batch_norm import adapting, layers_of
from xray_fastai.system.errors import ImageError, UserError
from xray_fastai.system.progress import track
from xray_fastai.system.text import count_of

SHARE = 0.1
"""The share of local statistics in those of batch norm. Larger ones helped where images were degraded, but cost AUC and
calibration where they only differed, the more the rarer one class was (`tests.benchmarks.unlabelled`)."""
FEWEST_TO_ADAPT = 16
FEWEST_TO_MATCH = 100
BATCH = 64


@dataclass(frozen=True)
class Unlabelled:
    """Lists local images without labels."""

    paths: list[str]
    patients: np.ndarray  # (N,), equal for images of one patient

    @property
    def patient_count(self) -> int:
        return len(np.unique(self.patients))


@dataclass(frozen=True)
class Request:
    """Says which images have no labels, and what is done with them."""

    folder: str | Path
    match_scores: bool = False
    prevalence: float | None = None  # the share of positive images, which `match_scores` needs
    patients: str | None = None  # a list of patients (`patients.patient_rule`)


@dataclass(frozen=True)
class Adapted:
    """Holds a model after its adaptation, and what was done."""

    model: Model  # its settings have no `scores` any more: those are of the network before
    images: int
    lines: list[str]  # for people


def without_labels(model: Model, request: Request) -> Adapted:
    """Adapt a model to local images without labels: its batch norm, or, to match scores, its intercept alone.

    Both together were measured, and were worse than the intercept alone.

    Raises:
        UserError: see `find_unlabelled`, `adapt`, `reference_of` and `match`.
    """
    settings, reference = model.settings, None
    if request.match_scores:
        reference = reference_of(model)
        if request.prevalence is None:
            raise UserError(
                "the scores cannot tell the share of positive images; state it by prevalence=, which was "
                f"{reference.prevalence:.2f} on validation",
                option="match_scores",
            )
    images = find_unlabelled(request, settings["settings"]["patient_pattern"])
    number = count_of(len(images.paths), "image")
    lines = [f"{request.folder}: {number} without labels, of {count_of(images.patient_count, 'patient')}"]
    adapted, notes = model, [settings["calibration"]]
    if reference is None:
        adapted = adapt(model, images)
        notes.append(f"batch norm adapted to {number} without labels")
        lines.append(f"batch norm: {SHARE:.0%} of its statistics are now of these images")
        if settings.get("gate") is not None:  # its distances are of the features before
            settings = settings | {"gate": None}
            lines.append("gate: left out, as the training images, which it compares with, are not here: all are called")
    else:
        found = match(model, images, reference, request.prevalence)
        lines += found.describe(model.positive)
        notes.append(f"intercept moved to fit validation's share of {model.positive} on {number} without labels")
        prior = prior_of(settings)
        settings = settings | {
            "intercepts": found.intercepts,
            "prior": None if prior is None else prior.tolist(),  # an intercept that was moved says nothing of it
            "calibration_kind": "matched",
        }
    changed = replace(adapted, settings=settings | {"calibration": "; ".join(notes), "scores": None, "called": None})
    return Adapted(changed, len(images.paths), [*lines, *_effect(model, changed)])


def _effect(before: Model, after: Model) -> list[str]:
    """Return what the adaptation does to the images that the export was validated on, for people."""
    try:
        table = labelled.labelled_images(before.settings, labelled.Request(None, "valid")).table
    except UserError:
        why = "no image is new to all networks of an ensemble"
        if not labelled.has_folds(before.settings):
            why = "validation's images are not here"
        return [f"{why}: what it does to images like those of the training is not known"]
    models = {"before": before, "after": after}
    return [f"validation's images {when}: {_measured(model, table)}" for when, model in models.items()]


def _measured(model: Model, table: pd.DataFrame) -> str:
    """Return figures of a model on labelled images: the AUC of two classes, and how many of each class it finds."""
    probabilities = model.probabilities(predict_all(model, list(table.path)))
    called = np.array(model.classes)[model.decide(probabilities)]
    found = [f"{name} {(called == name)[table.label == name].mean():.3f}" for name in sorted(table.label.unique())]
    auc = ""
    if len(model.classes) == 2 and len(found) == 2:
        scores = probabilities[:, model.classes.index(model.positive)]
        auc = f"AUC {roc_auc_score(table.label == model.positive, scores):.3f}, "
    return f"{auc}recall of {', of '.join(found)}"


def find_unlabelled(request: Request, pattern: str | None) -> Unlabelled:
    """List the images in a folder, at any depth; names of folders in it are not read as labels.

    Args:
        request: which images. To match scores needs more of them.
        pattern: finds the patient in a file name (`patients.PatientRule`).

    Raises:
        UserError: there is no such folder, there are too few images, or the list of patients names none of them.
    """
    folder = Path(request.folder).expanduser()
    if not folder.is_dir():
        raise UserError("no such folder; give a folder of images", option="unlabelled", value=folder)
    files = find_images(folder)
    fewest = FEWEST_TO_MATCH if request.match_scores else FEWEST_TO_ADAPT
    if len(files) < fewest:
        purpose = "match_scores=True" if request.match_scores else "batch norm"
        message = f"{count_of(len(files), 'image')}; {purpose} needs {fewest} or more"
        raise UserError(message, option="unlabelled", value=folder)
    table = pd.DataFrame({"path": [str(folder / file) for file in files], "file": files, "split": "", "label": ""})
    table = numbered(table.assign(patient=patients_in(table, patient_rule(pattern, request.patients))))
    check_listed(table, request.patients)
    return Unlabelled(list(table.path), table.patient.to_numpy())


def adapt(model: Model, images: Unlabelled, share: float = SHARE) -> Model:
    """Return a copy of a model whose batch norm is adapted to images.

    Raises:
        UserError: the network has no batch norm, or an image cannot be read.
    """
    if not layers_of(model.network):
        raise UserError(
            f"{network_of(model.settings)} has no batch norm that images without labels could adapt; give "
            "match_scores=True, or labelled images by data=",
            option="unlabelled",
        )
    adapted = replace(model, network=copy.deepcopy(model.network))
    with adapting(adapted.network, share):
        for batch in decode_batches(track(images.paths, "adapting", len(images.paths)), model.size, BATCH):
            for _, image in batch:
                if isinstance(image, ImageError):
                    raise image
            adapted.logits(torch.from_numpy(np.stack([image for _, image in batch]))[:, None])  # (B, 1, size, size)
    return adapted


@dataclass(frozen=True)
class Match:
    """Holds how the operating point was moved, and what speaks against it."""

    alignment: Alignment
    prevalence: float  # the share of positive images that it is for
    called: float  # the share of the images called positive, now
    called_before: float
    intercepts: list[float]  # of the classes: the threshold on probabilities stays

    def describe(self, positive: str) -> list[str]:
        """Return lines for people; one that begins with WARNING says that the supposition looks broken.

        Args:
            positive: the class to detect.
        """
        moved = f"{self.called:.1%} called {positive} ({self.called_before:.1%} before), for a share of "
        lines = [moved + f"{self.prevalence:.3g}", SHIFTS[self.alignment.kind].format(self.alignment)]
        return lines + WARNINGS.get(self.alignment.kind, [])


SHIFTS = {
    "none": "the scores are distributed as validation's at this share (p {0.unmoved:.2g}): nothing was moved",
    "prevalence": "the scores are validation's at a share of {0.prevalence:.2f} (p {0.mixed:.2g}), without any move",
    "images": "no share explains the scores (p {0.mixed:.2g}), so the images are taken otherwise; moved, they fit "
    "(p {0.moved:.2g})",
    "unknown": "no share explains the scores (p {0.mixed:.2g}), and no move (p {0.moved:.2g})",
}
"""What the scores tell, by `Alignment.kind`."""
WARNINGS = {
    "prevalence": ["WARNING: if that is the share, the move is wrong: check the share, or label some images"],
    "unknown": ["WARNING: the classes overlap otherwise than on validation: the share fits, sensitivity may not"],
}


def reference_of(model: Model) -> Reference:
    """Return how the scores of a model were distributed on its validation images.

    An export of an earlier version does not hold that; then its validation images are predicted.

    Raises:
        UserError: it has more than two classes, or was recalibrated, or is an earlier one whose validation images are
            not here.
    """
    settings, positive, data = model.settings, model.positive, model.settings["data"]
    part = "train" if labelled.has_folds(settings) else "valid"  # of which scores are known
    counts = data[part]
    if len(model.classes) != 2 or len(counts) != 2 or model.threshold in (None, 0, 1):
        message = "needs two classes, validated on both, and a threshold between 0 and 1; leave it out"
        raise UserError(message, option="match_scores")
    if settings.get("recalibrated") is not None:
        raise UserError(f"{model.path} was recalibrated before; give the export that it comes from", option="model")
    (negative,) = set(model.classes) - {positive}
    known = settings.get("scores")
    if known is None:
        try:
            table = labelled.labelled_images(settings, labelled.Request(None, "valid")).table
        except UserError:
            raise UserError(
                f"{model.path} is of an earlier version and holds no validation scores, and its validation images are "
                "not here; fit again, or give labelled images by data=",
                option="match_scores",
            ) from None
        odds = log_odds(predict_all(model, list(table.path)), model.classes.index(positive))
        known = {name: quantiles(odds[(table.label == name).to_numpy()], QUANTILES) for name in model.classes}
    share, patients = counts[positive] / sum(counts.values()), data["patients"][part]
    return Reference(np.array(known[negative]), np.array(known[positive]), share, patients)


def match(model: Model, images: Unlabelled, reference: Reference, prevalence: float) -> Match:
    """Move the intercept so that the share of images called positive fits validation's.

    Args:
        model: an export.
        images: local ones.
        reference: of the export (`reference_of`).
        prevalence: the share of positive images.

    Raises:
        UserError: an image cannot be read.
    """
    positive, scaling = model.classes.index(model.positive), model.scaling
    scores = log_odds(predict_all(model, images.paths), positive)
    threshold = (logit(model.threshold) - scaling.intercept_of(positive)) * scaling.temperature
    alignment = align(scores, images.patient_count, reference, threshold, prevalence)
    intercepts = list(scaling.intercepts or [0.0] * len(model.classes))
    intercepts[positive] -= (alignment.threshold - threshold) / scaling.temperature
    called, before = (float((scores >= t).mean()) for t in (alignment.threshold, threshold))
    return Match(alignment, prevalence, called, before, intercepts)
