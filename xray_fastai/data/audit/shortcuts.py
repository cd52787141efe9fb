"""Does the form of the files alone, without a look at what they show, tell the classes apart?

Where it does, a network may learn the form in place of the disease, and fail where both classes are made alike
(Zech et al., Variable generalization performance of a deep learning model to detect pneumonia in chest radiographs,
PLOS Medicine 2018; DeGrave et al., AI for radiographic COVID-19 detection selects shortcuts over signal, Nature Machine
Intelligence 2021).
"""

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd

from xray_fastai.metrics.intervals import Interval, measure
from xray_fastai.metrics.scored import Scored
from xray_fastai.system.text import format_interval

ALARM, ALARM_LOW = 0.7, 0.6
"""An AUC is worth a warning from the first on, if its 95 % interval lies above the second. The phantom, which has no
shortcut, has 0.46 by detail; 50 originals of the Kaggle collection have 0.85 by form, and 1.00 by coding."""
ENOUGH = 10
"""Patients of each class from which an AUC is taken."""
MOST = 20_000
"""Images that are looked at: more would make the figure no better, and the forest slow."""
FOLDS, RESAMPLES, SEED = 5, 500, 0

FEATURES = {
    "form": {"width": "width", "height": "height", "aspect": "aspect ratio", "mode": "channels"},
    "coding": {"format": "file type", "quality": "JPEG quality"},
    "detail": {"density": "bytes a pixel"},
}
"""What is looked at together, with the names that people know it by. Bytes a pixel tell, at one JPEG quality, how much
detail and noise a picture has."""


@dataclass(frozen=True)
class Shortcut:
    """How well some features of the files predict the class."""

    auc: Interval  # of all features together
    single: dict[str, float]  # AUC of each by itself, the highest first
    images: int

    @property
    def alarming(self) -> bool:
        return self.auc.value >= ALARM and self.auc.low > ALARM_LOW

    def __str__(self) -> str:
        auc = "AUC " + format_interval(*self.auc, digits=2)
        if len(self.single) < 2:
            return auc
        return f"{auc}; by itself, " + ", ".join(f"{name} {value:.2f}" for name, value in self.single.items())


def find_shortcuts(table: pd.DataFrame) -> dict[str, Shortcut]:
    """Predict the class from the form of the files.

    A random forest for several features together and a small tree for each alone, cross-validated in five folds that
    share no patient; the interval is a bootstrap over patients.

    Args:
        table: an image a row: label, patient, and what `facts.Facts` has.

    Returns:
        By the names of `FEATURES`, the AUC (of more than two classes the mean of each against the rest), where the
        features are not the same for all images; nothing where a class has less than `ENOUGH` patients.
    """
    patients = pd.factorize(table.patient)[0]
    truth, classes = pd.factorize(table.label, sort=True)
    if len(classes) < 2 or pd.Series(patients).groupby(truth).nunique().min() < ENOUGH:
        return {}
    if len(table) > MOST:
        chosen = np.random.default_rng(SEED).choice(len(table), MOST, replace=False)
        return find_shortcuts(table.iloc[np.sort(chosen)])
    features = pd.DataFrame(
        {
            "width": table.width,
            "height": table.height,
            "aspect": table.width / table.height,
            "mode": pd.factorize(table["mode"], sort=True)[0],
            "format": pd.factorize(table.format, sort=True)[0],
            "quality": table.quality.fillna(-1),
            "density": table.bytes / (table.width * table.height),
        }
    )
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=SEED)
    folds = list(splitter.split(features, truth, patients))
    found = {}
    for name, of in FEATURES.items():
        varied = [column for column in of if features[column].nunique() > 1]
        if varied:
            found[name] = _predict(features[varied].rename(columns=of), truth, patients, folds)
    return found


def _predict(features: pd.DataFrame, truth: np.ndarray, patients: np.ndarray, folds: list) -> Shortcut:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    positive = 1 if truth.max() == 1 else None

    def auc(model, values: pd.DataFrame, resamples: int) -> Interval:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a fold may lack a class of few patients
            scores = cross_val_predict(model, values, truth, cv=folds, method="predict_proba")  # (N, classes)
        return measure(Scored(truth, scores, patients, positive), {}, resamples).free["roc_auc"]

    forest = RandomForestClassifier(50, max_depth=6, min_samples_leaf=5, class_weight="balanced", random_state=SEED)
    tree = DecisionTreeClassifier(max_depth=3, min_samples_leaf=5, class_weight="balanced", random_state=SEED)
    if len(features.columns) == 1:
        together = auc(tree, features, RESAMPLES)
        return Shortcut(together, dict.fromkeys(features, together.value), len(truth))
    single = {name: auc(tree, features[[name]], 2).value for name in features}
    single = dict(sorted(single.items(), key=lambda item: -item[1]))
    return Shortcut(auc(forest, features, RESAMPLES), single, len(truth))
