"""Measure the appearance of images (brightness, contrast, sharpness, shape), and test a model on the unusual ones.

Images of another hospital differ in how they were taken, even where they do not differ medically. Where these few
numbers alone separate the classes, a network may learn them instead of the disease. In the Kaggle collection sharpness
alone does, with a ROC AUC of 0.88. Random validation images share this property, so they do not reveal the problem.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from xray_fastai.data.images import open_image, size_of
from xray_fastai.metrics.influence import of_roc_auc
from xray_fastai.metrics.intervals import interval_of
from xray_fastai.metrics.scored import Scored
from xray_fastai.system.parallel import map_in_threads
from xray_fastai.system.text import format_interval

SIDE = 224
"""Side in pixels at which appearance is measured, independent of the network's input size."""
SHARE = 0.1
"""The share of each class that is in a group."""
MIN_IMAGES = 10
"""Images of each class that a group needs, and patients that each class needs, for an AUC to mean something."""
GAP = 0.02
"""A group is warned about if its expected AUC is at least this much below that of all images, and its interval is below
it."""

UNLIKE = "least typical"
NAMES = {
    "brightness": ("darkest", "brightest"),
    "contrast": ("flattest", "most contrasty"),
    "sharpness": ("blurriest", "sharpest"),
    "aspect": ("narrowest", "widest"),
}
"""By feature, the names of the groups with its lowest and its highest values."""


@dataclass(frozen=True)
class Group:
    """The unusual group of images with the lowest ROC AUC of several.

    Args:
        name: of the group.
        images: how many.
        roc_auc: the lowest, which is too low as an estimate: chance helps to be the lowest.
        low: the lower limit of its interval, of a level at which all groups' intervals hold with 95 % (Bonferroni).
        high: the upper limit.
        groups: how many there are.
        expected: the AUC to expect of new images of this group: drawn to the mean of all groups by as much as their
            AUCs differ by chance (Efron & Morris, Data analysis using Stein's estimator, JASA 1975).
    """

    name: str
    images: int
    roc_auc: float
    low: float
    high: float
    groups: int
    expected: float

    def describe(self, roc_auc: float) -> str:
        """Return what the group is, for people; a warning if it is clearly worse than all images, which have this
        AUC."""
        warning = "WARNING, clearly worse than all images: " if self.is_worse_than(roc_auc) else ""
        return (
            f"{warning}the {self.name} tenth of each class, {self.images} images: AUC "
            f"{format_interval(self.roc_auc, self.low, self.high)}; the least of {self.groups} groups, so partly by "
            f"chance: expect {self.expected:.3f}"
        )

    def is_worse_than(self, roc_auc: float) -> bool:
        """Return whether the group is clearly worse than all images, which have this AUC."""
        return self.high < roc_auc and self.expected < roc_auc - GAP


def appearance(paths: Sequence[str], aspects: Sequence[float] | None = None) -> pd.DataFrame:
    """Measure the appearance of images.

    Args:
        paths: the image files.
        aspects: width / height of each; left out where all are equal.

    Returns:
        A row for each image: `brightness` (mean), `contrast` (standard deviation) and `sharpness` (mean absolute
        Laplacian) of its grey values from 0 to 1 at 224 x 224 pixels, and `aspect`.

    Raises:
        ImageError: an image cannot be read.
    """

    def measure_image(path: str) -> tuple[float, float, float]:
        x = np.asarray(open_image(path, SIDE), dtype=np.float32) / 255  # (224, 224)
        laplacian = 4 * x[1:-1, 1:-1] - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]
        return float(x.mean()), float(x.std()), float(np.abs(laplacian).mean())

    looks = pd.DataFrame(map_in_threads(measure_image, paths), columns=["brightness", "contrast", "sharpness"])
    if aspects is not None and len(set(aspects)) > 1:
        looks["aspect"] = list(aspects)
    return looks


def expected_by_appearance(looks: pd.DataFrame, positives: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Predict the probability of the positive class (N,) from appearance alone.

    The model is a logistic regression, cross-validated by patient.

    Args:
        looks: from `appearance`.
        positives: (N,), true where the image is of that class.
        patients: (N,), equal for images of one patient.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    return cross_val_predict(model, looks, positives, groups=patients, cv=folds, method="predict_proba")[:, 1]


def unusual(looks: pd.DataFrame, positives: np.ndarray, patients: np.ndarray, share: float = SHARE) -> dict:
    """Return groups by name, each a boolean array (N,).

    A group holds the `share` of each class that is darkest, sharpest, and so on. The group "least typical" holds the
    images that look most like the other class.
    """
    sides = {UNLIKE: np.where(positives, 1, -1) * expected_by_appearance(looks, positives, patients)}
    for name, values in looks.items():
        low, high = NAMES[name]
        sides |= {low: values.to_numpy(), high: -values.to_numpy()}
    groups = {}
    for name, value in sides.items():
        chosen = np.zeros(len(looks), bool)
        for members in (np.flatnonzero(positives), np.flatnonzero(~positives)):
            chosen[members[np.argsort(value[members], kind="stable")[: round(share * len(members))]]] = True
        groups[name] = chosen
    return groups


def has_groups(positives: np.ndarray, patients: np.ndarray) -> bool:
    """Return whether there are enough images, and patients, of both classes for groups whose AUC means something.

    Args:
        positives: (N,), true where the image is of the positive class.
        patients: (N,), equal for images of one patient.
    """
    return all(
        members.sum() * SHARE >= MIN_IMAGES and len(set(patients[members])) >= MIN_IMAGES
        for members in (positives, ~positives)
    )


def worst_group_of(paths: Sequence[str], scored: Scored) -> Group | None:
    """Read images, and return their unusual group with the lowest ROC AUC; None where there are too few, or more than
    two classes.

    Args:
        paths: of the N images.
        scored: the images.

    Raises:
        ImageError: an image cannot be read.
    """
    positives = scored.y_true == scored.positive
    if scored.positive is None or not has_groups(positives, scored.patients):
        return None
    aspects = [width / height for width, height in map_in_threads(size_of, paths)]
    return worst_group(appearance(paths, aspects), positives, scored.patients, scored.y_prob[:, scored.positive])


def worst_group(looks: pd.DataFrame, positives: np.ndarray, patients: np.ndarray, scores: np.ndarray) -> Group | None:
    """Return the unusual group with the lowest ROC AUC; None where there are too few images.

    Args:
        looks: from `appearance`.
        positives: (N,), true where the image is of that class.
        patients: (N,), equal for images of one patient.
        scores: (N,), the probability of the positive class.
    """
    if not has_groups(positives, patients):
        return None
    found = {}
    groups = unusual(looks, positives, patients)
    for name, chosen in groups.items():
        y_prob = np.stack([1 - scores[chosen], scores[chosen]], axis=1)
        scored = Scored(positives[chosen].astype(int), y_prob, pd.factorize(patients[chosen])[0], positive=1)
        interval = interval_of("roc_auc", scored, 1 - 0.05 / len(groups))
        if np.isfinite(interval.low):
            variance = np.square(np.bincount(scored.patients, of_roc_auc(scored, 1))).sum()
            found[name] = int(chosen.sum()), interval, variance
    if not found:
        return None
    worst = min(found, key=lambda name: found[name][1].value)
    images, interval, variance = found[worst]
    values = np.array([of_group.value for _, of_group, _ in found.values()])
    between = (
        max(0.0, values.var(ddof=1) - np.mean([of_group for *_, of_group in found.values()])) if len(found) > 1 else 0.0
    )
    kept = between / (between + variance) if between + variance > 0 else 1.0
    expected = values.mean() + kept * (interval.value - values.mean())
    return Group(worst, images, *interval, len(groups), float(expected))
