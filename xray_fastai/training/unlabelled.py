"""Adapts a model to images of another place that have no labels: `recalibrate --unlabelled`.

Batch norm gets statistics of the local images (`model.batch_norm`). With `--match-scores` the intercept is moved, too,
so that the share called positive fits validation's (`metrics.alignment`). The README of this folder holds what was
measured (`tests/benchmarks/elsewhere.py`).
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import logit
from sklearn.metrics import recall_score, roc_auc_score

from xray_fastai.data.dataset import find_images
from xray_fastai.data.labelled import Request, labelled_images
from xray_fastai.data.patients import PatientRule, numbered, patients_in
from xray_fastai.inference.model import Model
from xray_fastai.inference.stream import predict_all, predict_batches
from xray_fastai.metrics.alignment import Alignment, Reference, align, log_odds, quantiles
from xray_fastai.model.batch_norm import adapting, layers_of
from xray_fastai.system.errors import UserError
from xray_fastai.system.progress import track
from xray_fastai.system.text import count_of

STRENGTH = 16
"""Images that the trained statistics of batch norm count as."""
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


def find_unlabelled(folder: str | Path, rule: PatientRule, match: bool) -> Unlabelled:
    """List the images in a folder, at any depth.

    Args:
        folder: names of folders in it are not read as labels.
        rule: how their patients are found.
        match: whether scores are to be matched, which needs more images.

    Raises:
        UserError: there is no such folder, or there are too few images.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError("no such folder; give a folder of images", option="unlabelled", value=folder)
    files = find_images(folder)
    fewest, purpose = (FEWEST_TO_MATCH, "match_scores=True") if match else (FEWEST_TO_ADAPT, "batch norm")
    if len(files) < fewest:
        message = f"{count_of(len(files), 'image')}; {purpose} needs {fewest} or more"
        raise UserError(message, option="unlabelled", value=folder)
    table = pd.DataFrame({"path": [str(folder / file) for file in files], "file": files, "split": "", "label": ""})
    table = numbered(table.assign(patient=patients_in(table, rule)))
    return Unlabelled(list(table.path), table.patient.to_numpy())


def adapt(model: Model, images: Unlabelled, strength: float = STRENGTH) -> Model:
    """Return a copy of a model whose batch norm is adapted to images.

    Raises:
        UserError: the network has no batch norm, or an image cannot be read.
    """
    if not layers_of(model.network):
        raise UserError(
            f"{model.settings['architecture']} has no batch norm that images without labels could adapt; give "
            "match_scores=True or data=",
            option="unlabelled",
        )
    adapted = replace(model, network=copy.deepcopy(model.network))
    with adapting(adapted.network, strength):
        batches = predict_batches(model, track(images.paths, "adapting", len(images.paths)), BATCH)
        for batch in batches:
            for error in filter(None, batch.errors):
                raise error
            adapted.logits(batch.images)
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
        UserError: it has more than two classes, or was matched before, or is an earlier one whose validation images are
            not here.
    """
    settings, positive = model.settings, model.positive
    if len(model.classes) != 2 or positive is None or model.threshold in (None, 0, 1):
        raise UserError("needs two classes, and a threshold between 0 and 1", option="match_scores")
    (negative,) = set(model.classes) - {positive}
    known = settings.get("scores")
    if known is None:
        try:
            table = labelled_images(settings, Request(None, "valid")).table
        except UserError:
            raise UserError(
                f"{model.path} holds no validation scores (it is of an earlier version, or was recalibrated), and its "
                "validation images are not here; give an export of fit, or labelled images by data=",
                option="match_scores",
            ) from None
        odds = log_odds(predict_all(model, list(table.path)), model.classes.index(positive))
        known = {name: quantiles(odds[(table.label == name).to_numpy()], 101) for name in model.classes}
    counts, patients = settings["data"]["valid"], settings["data"]["patients"]["valid"]
    share = counts[positive] / sum(counts.values())
    return Reference(np.array(known[negative]), np.array(known[positive]), share, patients)


def match(model: Model, images: Unlabelled, reference: Reference, prevalence: float) -> Match:
    """Move the intercept so that the share of images called positive fits validation's.

    Args:
        model: an export, its batch norm adapted or not.
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


def effect_on_validation(before: Model, after: Model) -> dict[str, dict[str, float]] | None:
    """Measure two models on the images that the export was validated on; None where they are not here."""
    try:
        table = labelled_images(before.settings, Request(None, "valid")).table
    except UserError:
        return None
    truth = (table.label == before.positive).to_numpy()
    return {name: _measured(model, list(table.path), truth) for name, model in (("before", before), ("after", after))}


def _measured(model: Model, paths: list[str], truth: np.ndarray) -> dict[str, float]:
    """Return figures of two classes, at the model's threshold."""
    probabilities, positive = model.probabilities(predict_all(model, paths)), model.classes.index(model.positive)
    called = model.decide(probabilities) == positive
    return {
        "roc_auc": float(roc_auc_score(truth, probabilities[:, positive])),
        "sensitivity": float(recall_score(truth, called)),
        "specificity": float(recall_score(~truth, ~called)),
    }
