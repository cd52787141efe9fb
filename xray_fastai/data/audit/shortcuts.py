"""Test whether the form of the files alone, without their content, tells the classes apart.

If it does, a network may learn the form instead of the disease, and fail on images in which both classes have one form
(Zech et al., Variable generalization performance of a deep learning model to detect pneumonia in chest radiographs,
PLOS Medicine 2018; DeGrave et al., AI for radiographic COVID-19 detection selects shortcuts over signal, Nature Machine
Intelligence 2021).
"""

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd

from xray_fastai.metrics.intervals import Interval, interval_of
from xray_fastai.metrics.scored import Scored
from xray_fastai.system.text import format_interval

ALARM, ALARM_LOW = 0.7, 0.6
"""There is a warning if the AUC is at least `ALARM` and its 95 % interval lies above `ALARM_LOW`. The phantom, which
has no shortcut, has 0.46 by detail; 50 originals of the Kaggle collection have 0.85 by form and 1.00 by coding."""
MIN_PATIENTS = 10
"""Patients of each class that an AUC needs."""
MAX_IMAGES = 20_000
"""A larger table is sampled: more images would not improve the figure, and the forest would be slow."""
FOLDS, SEED = 5, 0

FEATURES = {
    "form": {"width": "width", "height": "height", "aspect": "aspect ratio", "mode": "channels"},
    "coding": {"format": "file type", "quality": "JPEG quality"},
    "detail": {"density": "bytes a pixel"},
}
"""The features that are tested together, with their displayed names. At one JPEG quality, the bytes a pixel measure how
much detail and noise an image has."""


@dataclass(frozen=True)
class Shortcut:
    """The AUC with which some features of the files predict the class."""

    auc: Interval  # of all features together
    single: dict[str, float]  # AUC of each feature alone, the highest first
    images: int

    @property
    def alarming(self) -> bool:
        return self.auc.value >= ALARM and self.auc.low > ALARM_LOW

    def __str__(self) -> str:
        auc = "AUC " + format_interval(*self.auc, digits=2)
        if len(self.single) < 2:
            return auc
        return f"{auc}; alone, " + ", ".join(f"{name} {value:.2f}" for name, value in self.single.items())


def find_shortcuts(table: pd.DataFrame) -> dict[str, Shortcut]:
    """Predict the class from the form of the files.

    A random forest takes several features together, and a small tree each feature alone. They are cross-validated in
    five folds that share no patient.

    Args:
        table: has one row for each image: label, patient, and the fields of `image_facts.Facts`.

    Returns:
        The shortcuts by the names of `FEATURES`, without those whose features are the same for all images. The AUC of
        more than two classes is the mean of each against the rest. The result is empty if a class has fewer than
        `MIN_PATIENTS` patients.
    """
    patients = pd.factorize(table.patient)[0]
    truth, classes = pd.factorize(table.label, sort=True)
    if len(classes) < 2 or pd.Series(patients).groupby(truth).nunique().min() < MIN_PATIENTS:
        return {}
    if len(table) > MAX_IMAGES:
        chosen = np.random.default_rng(SEED).choice(len(table), MAX_IMAGES, replace=False)
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
    shortcuts = {}
    for name, titles in FEATURES.items():
        varied = [column for column in titles if features[column].nunique() > 1]
        if varied:
            shortcuts[name] = _predict(features[varied].rename(columns=titles), truth, patients, folds)
    return shortcuts


def _predict(features: pd.DataFrame, truth: np.ndarray, patients: np.ndarray, folds: list) -> Shortcut:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    positive = 1 if truth.max() == 1 else None

    def auc(model, values: pd.DataFrame) -> Interval:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a fold may lack a class with few patients
            scores = cross_val_predict(model, values, truth, cv=folds, method="predict_proba")  # (N, classes)
        return interval_of("roc_auc", Scored(truth, scores, patients, positive))

    forest = RandomForestClassifier(50, max_depth=6, min_samples_leaf=5, class_weight="balanced", random_state=SEED)
    tree = DecisionTreeClassifier(max_depth=3, min_samples_leaf=5, class_weight="balanced", random_state=SEED)
    if len(features.columns) == 1:
        together = auc(tree, features)
        return Shortcut(together, dict.fromkeys(features, together.value), len(truth))
    single = {name: auc(tree, features[[name]]).value for name in features}
    single = dict(sorted(single.items(), key=lambda item: -item[1]))
    return Shortcut(auc(forest, features), single, len(truth))
