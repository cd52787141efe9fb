"""fastai's `ClassificationInterpretation` for an export: its confusion matrix, its plots and tables, for a notebook."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.vision.all import ClassificationInterpretation, DataLoader, Learner
from sklearn.metrics import classification_report

from xray_fastai.evaluation.contact_sheet import BATCH
from xray_fastai.export.learner import load_learner
from xray_fastai.metrics.scored import losses


class XrayInterpretation(ClassificationInterpretation):
    """fastai's interpretation, with the losses and predictions that this package reports everywhere.

    fastai takes the loss of the training: weighted by class, before calibration. Sorted by this loss, the images of a
    rare class come first because they are rare. Here an image's loss is -log of its true class's calibrated
    probability. fastai also predicts the most probable class, where an export applies its threshold. Here the confusion
    matrix, and what is made from it, counts the predictions of the export.
    """

    def __init__(
        self,
        learn: Learner,
        dl: DataLoader,  # over a table with a column `label`
        losses: torch.Tensor,  # (N,)
        predicted: np.ndarray,  # (N,), index of the predicted class
        act=None,  # activation; None is the loss function's own, calibrated
    ):
        super().__init__(learn, dl, losses, act)
        self.predicted = predicted

    @classmethod
    def from_learner(cls, learn, ds_idx=1, dl=None, act=None):
        "As fastai's; it predicts the most probable class, since a learner has no threshold."
        if dl is None:
            dl = learn.dls[ds_idx].new(shuffle=False, drop_last=False)
        y_prob, y_true = (part.numpy() for part in learn.get_preds(dl=dl, act=act))
        return cls(learn, dl, torch.from_numpy(losses(y_prob, y_true)), y_prob.argmax(axis=1), act)

    def confusion_matrix(self) -> np.ndarray:
        "Counts (true class, predicted class), in the order of the vocabulary."
        matrix: np.ndarray = np.zeros((len(self.vocab), len(self.vocab)), dtype=int)
        np.add.at(matrix, (np.array(self._y_true()), self.predicted), 1)
        return matrix

    def print_classification_report(self):
        "Print scikit-learn's report on the predicted classes."
        names, labels = list(self.vocab), list(range(len(self.vocab)))
        print(classification_report(self._y_true(), self.predicted, labels=labels, target_names=names, zero_division=0))

    def _y_true(self) -> list[int]:
        return [self.vocab.o2i[label] for label in self.dl.items.label]


def interpretation_of(export: Path, images: pd.DataFrame, device: torch.device) -> XrayInterpretation:
    """Return the interpretation of an export on images that it has predicted.

    Args:
        export: its folder.
        images: path, label, loss, and `predicted`, the index of the predicted class.
        device: where fastai's methods compute, if they predict again.
    """
    learn = load_learner(export)
    learn.dls.to(device)
    learn.model.to(device)
    dl = learn.dls.test_dl(images, with_labels=True, bs=BATCH)
    return XrayInterpretation(learn, dl, torch.tensor(images.loss.to_numpy()), images.predicted.to_numpy())
