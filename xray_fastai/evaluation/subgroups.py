"""How images were taken, seen by brightness, contrast, sharpness and shape, and how a model does on the unusual ones.

Images of another hospital differ in how they were taken before they differ in anything medical. Where these few numbers
alone tell the classes apart (sharpness does in the collection that this program was made on, with a ROC AUC of 0.88),
a network learns them, and random validation images, which share them, don't show it.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd

from xray_fastai.data.images import open_image
from xray_fastai.metrics import Scored, measure

SIDE = 224
"""Side in pixels at which images are looked at, whatever size the network takes."""
SHARE = 0.1
"""Of each class, the images that make a group."""
LEAST = 10
"""Images of each class below which a group tells nothing."""
GAP = 0.02
"""A group's AUC this far below that of all images, and its interval below too, is worth a warning; a choice."""

UNLIKE = "least typical"
NAMES = {
    "brightness": ("darkest", "brightest"),
    "contrast": ("flattest", "most contrasty"),
    "sharpness": ("blurriest", "sharpest"),
    "aspect": ("narrowest", "widest"),
}
"""By what is measured, the groups at its lower and its upper end."""


@dataclass(frozen=True)
class Group:
    """A part of the validation images, and the ROC AUC of the positive class on it with its 95 % interval."""

    name: str
    images: int
    roc_auc: float
    low: float
    high: float

    def parts_from(self, roc_auc: float) -> bool:
        """Whether it does clearly worse than all images, whose AUC is given."""
        return self.high < roc_auc and self.roc_auc < roc_auc - GAP


def appearance(paths: Sequence[str], aspects: Sequence[float] | None = None) -> pd.DataFrame:
    """A row an image: `brightness` (mean), `contrast` (standard deviation) and `sharpness` (mean absolute Laplacian) of
    grey values from 0 to 1, at 224 x 224 px; and `aspect`.

    Args:
        paths: of the images.
        aspects: width / height of each; where all are alike, they are left out.

    Raises:
        ImageError: one can't be read.
    """

    def measure(path: str) -> tuple[float, float, float]:
        x = np.asarray(open_image(path, SIDE), dtype=np.float32) / 255  # (224, 224)
        laplacian = 4 * x[1:-1, 1:-1] - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]
        return float(x.mean()), float(x.std()), float(np.abs(laplacian).mean())

    with ThreadPoolExecutor() as pool:
        looks = pd.DataFrame(pool.map(measure, paths), columns=["brightness", "contrast", "sharpness"])
    if aspects is not None and len(set(aspects)) > 1:
        looks["aspect"] = list(aspects)
    return looks


def expected_by_appearance(looks: pd.DataFrame, positives: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """How probable the positive class is by appearance alone (N,): a logistic regression, cross-validated by patient.

    Args:
        looks: from `appearance`.
        positives: (N,), true where the image is of that class.
        patients: (N,), equal for images of one patient.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    return cross_val_predict(model, looks, positives, groups=patients, cv=folds, method="predict_proba")[:, 1]


def unusual(looks: pd.DataFrame, positives: np.ndarray, patients: np.ndarray, share: float = SHARE) -> dict:
    """Groups by name, each a boolean (N,): the `share` of each class that is darkest, sharpest, and so on, and the one
    whose appearance speaks most for the other class ("least typical")."""
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


def worst_group(looks: pd.DataFrame, positives: np.ndarray, patients: np.ndarray, scores: np.ndarray) -> Group | None:
    """The unusual group with the lowest ROC AUC; None where there are too few images for any.

    Args:
        looks: from `appearance`.
        positives: (N,), true where the image is of that class.
        patients: (N,), equal for images of one patient.
        scores: (N,), the probability of the positive class.
    """

    for members in (positives, ~positives):
        if members.sum() * SHARE < LEAST or len(set(patients[members])) < LEAST:
            return None
    found = []
    for name, chosen in unusual(looks, positives, patients).items():
        p = scores[chosen]
        scored = Scored(positives[chosen].astype(int), np.stack([1 - p, p], 1), pd.factorize(patients[chosen])[0], 1)
        found.append(Group(name, int(chosen.sum()), *measure(scored, {}).free["roc_auc"]))
    return min((group for group in found if np.isfinite(group.low)), key=lambda group: group.roc_auc, default=None)
