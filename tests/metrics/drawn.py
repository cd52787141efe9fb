"""Drawn predictions for the tests of the metrics."""

import numpy as np

from xray_fastai.metrics.scored import Scored


def draw(classes: int, images: int = 60, patients: int = 40, seed: int = 0) -> Scored:
    """Draw images of several patients, predicted better than chance, some with equal probabilities."""
    rng = np.random.default_rng(seed)
    y_true = rng.integers(classes, size=images)
    y_prob = rng.dirichlet(np.ones(classes), images) + np.eye(classes)[y_true] * 0.4
    y_prob = np.round(y_prob / y_prob.sum(axis=1, keepdims=True), 1).clip(0.05, 0.9)
    y_prob[:, -1] = 1 - y_prob[:, :-1].sum(axis=1)
    patients = np.unique(rng.integers(patients, size=images), return_inverse=True)[1]
    return Scored(y_true, y_prob, patients, 1 if classes == 2 else None)
