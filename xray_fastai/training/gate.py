"""Settles the gate of an export (`inference.gate`) when a training has ended, from its training images."""

import math

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import GroupKFold
from torch import nn

from xray_fastai.data.images import open_image
from xray_fastai.export.weights_file import GATE_SIDE
from xray_fastai.inference.gate import WITHIN, Gate, Measures, Space, vectors_of
from xray_fastai.model.architectures import backbones_of
from xray_fastai.model.preprocessing import Preprocessing
from xray_fastai.model.transforms import open_cached
from xray_fastai.training.frozen_features import pooling
from xray_fastai.training.plan import Plan

MOST = 2000
"""Images that are compared; of more, a random sample. Of ResNet50 at 224 px each takes 0.23 s of a busy AVX2 core, so
2,000 take 8 minutes; what follows, 2 s."""
LEAST = 100
"""With fewer training images there is no gate."""
FEW = 50
"""Fewer validation images than this say nothing of where the limit should be."""
FOLDS = 5
DIMENSIONS = {"statistics": 13, "pictures": 32, "features": 32}
"""Principal components of each space, at most a tenth of the images. In the features 8 see less, 128 no more."""
SHRINKAGE = 0.05
"""Of the covariance of the discriminant (256 dimensions)."""
ABOVE = 0.007
"""Share of the training images that may lie above the limit: 0 to 1 % of X-rays of new patients then do
(`tests/benchmarks/README.md`)."""
WITHHELD = 0.01
"""Share of the validation images that may lie above it, plus one standard error."""
LEAST_SPREAD = 1e-3
"""Of a measure, for networks that give all images the same features."""
FEATURES = 2
"""The column of the features in the measures."""


def settle_gate(model: nn.Sequential, plan: Plan) -> Gate | None:
    """Compare training images with each other; None if there are fewer than `LEAST`, or the features are not finite.

    Images of a patient are compared with those of others: the images are split five times, by patient. Features of
    training images lie closer together than those of new ones, so median and spread of the features' distances are
    those of the validation images, of which some `WITHHELD` may lie above the limit.

    Args:
        model: backbone and head, in any mode, on any device.
        plan: of the training; its seed draws the images.

    Raises:
        ImageError: an image cannot be read.
    """
    train, valid = (_some(table, plan.config.seed) for table in (plan.data.train, plan.data.valid))
    if len(train) < LEAST or train.patient.nunique() < FOLDS:
        return None
    vectors = _vectors(model, plan, list(train.path))
    if not np.isfinite(vectors["features"]).all():
        return None
    targets = pd.Categorical(train.label, plan.data.classes).codes.astype(int)
    classes = len(plan.data.classes)
    own = np.empty((len(train), 4))  # measures of each image by the others
    for fitted, left_out in GroupKFold(FOLDS).split(train.path, groups=train.patient):
        measures = _fit({name: part[fitted] for name, part in vectors.items()}, targets[fitted], classes)
        own[left_out] = measures({name: part[left_out] for name, part in vectors.items()})
    measures = _fit(vectors, targets, classes)
    new = measures(_vectors(model, plan, list(valid.path))) if len(valid) >= FEW else None
    return gate_of(measures, own, new)


def gate_of(measures: Measures, own: np.ndarray, new: np.ndarray | None) -> Gate:
    """Choose the scales and the limit of a gate.

    Args:
        measures: settled on all training images.
        own: (N, 4), the measures of each training image, settled without its patient.
        new: (M, 4), the measures of the validation images; None where they are few.
    """
    medians = np.median(own, axis=0)
    spreads = np.maximum(np.quantile(own, 0.99, axis=0) - medians, LEAST_SPREAD)
    scores, seen = ((own - medians) / spreads).max(axis=1), None
    if new is not None:
        before, after = (np.quantile(part[:, FEATURES], [0.5, 0.9]) for part in (own, new))
        medians[FEATURES] = after[0]
        spreads[FEATURES] *= max(np.ptp(after), LEAST_SPREAD) / max(np.ptp(before), LEAST_SPREAD)
        seen = ((new - medians) / spreads).max(axis=1)
    within = np.quantile(scores, WITHIN / 100)
    limit = float(np.quantile(scores, 1 - ABOVE))
    if seen is not None:
        above = math.floor(len(seen) * WITHHELD + math.sqrt(len(seen) * WITHHELD))
        limit = max(limit, float(np.sort(seen)[-1 - above]))
    end = within[-1] + 2 * max(limit - within[-1], scores.max() - within[-1], LEAST_SPREAD)
    quantiles = np.append(within, end)
    return Gate(measures, medians, spreads, quantiles, float(np.interp(limit, quantiles, [*WITHIN, 100])), len(own))


def _some(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    return table.sample(min(MOST, len(table)), random_state=seed)


def _vectors(model: nn.Sequential, plan: Plan, paths: list[str]) -> dict[str, np.ndarray]:
    """Return the vectors (N, F) of images, which are not varied, by space."""
    size, cache = plan.config.size, plan.cache
    training = model.training
    first = nn.Sequential(backbones_of(model.to(plan.device))[0], model[1])  # member of an ensemble
    network, preprocessing = pooling(first), Preprocessing(plan.config.contrast).to(plan.device)
    model.train(training)
    found = []
    for start in range(0, len(paths), 32):
        part = paths[start : start + 32]
        pixels = [np.array(open_image(path, size)) if cache is None else open_cached(cache, path) for path in part]
        images = torch.from_numpy(np.stack(pixels))[:, None]  # (B, 1, S, S)
        with torch.inference_mode():
            batch = preprocessing(images.to(plan.device)).contiguous(memory_format=torch.channels_last)
            found.append(vectors_of(images, network(batch).float().cpu()))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _fit(vectors: dict[str, np.ndarray], targets: np.ndarray, classes: int) -> Measures:
    """Settle the measures on vectors (N, F) of images and their classes (N,)."""
    spaces = {name: _space(part, targets, classes, DIMENSIONS[name]) for name, part in vectors.items()}
    return Measures(spaces, _upright(vectors["pictures"]))


def _space(vectors: np.ndarray, targets: np.ndarray, classes: int, dimensions: int) -> Space:
    count, length = vectors.shape
    k = min(dimensions, count // 10, length - 1)
    pca = PCA(k, random_state=0).fit(vectors)
    along = pca.transform(vectors)  # (N, k)
    # a class without images has its centre at that of all
    centres = np.stack([along[targets == c].mean(0) if (targets == c).any() else np.zeros(k) for c in range(classes)])
    deviations = (along - centres[targets]).std(axis=0)
    deviations = np.maximum(deviations, max(1e-3 * deviations.max(), 1e-6))
    rest = (vectors.var(axis=0).sum() - along.var(axis=0).sum()) / (length - k)
    return Space(
        mean=pca.mean_.astype(np.float32),
        directions=(pca.components_ / deviations[:, None]).astype(np.float32),
        centres=(centres / deviations).astype(np.float32),
        rest=float(max(rest, 1e-6 * np.square(deviations).max())),
    )


def _upright(pictures: np.ndarray) -> np.ndarray:
    """Return the direction (256,) that tells pictures (N, 256) from the same turned by 180 degrees, and flipped."""
    squares = pictures.reshape(-1, GATE_SIDE, GATE_SIDE)
    turned = np.concatenate([squares[:, ::-1, ::-1], squares[:, ::-1]]).reshape(-1, GATE_SIDE**2)
    discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE)
    discriminant.fit(np.concatenate([pictures, turned]), np.repeat([0, 1, 1], len(pictures)))
    return discriminant.coef_[0].astype(np.float32)
