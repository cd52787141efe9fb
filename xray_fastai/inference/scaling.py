"""Holds what turns a network's outputs into the probabilities of an export, and the words that say how it was chosen.

Probabilities are softmax(outputs / temperature + intercepts). For two classes that is a slope, 1 / temperature, and an
intercept on the log odds (Platt scaling).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities (N, classes). It is `scipy.special.softmax` to the last digit, without the import; torch's
    differs in the last digit."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


FITTED = ("validation", "local")
"""The kinds with slope and intercepts fitted to images: of the validation split, or of the place of use."""
PARTS = ("train", "valid")
"""The images that `model.json` counts by class."""


@dataclass(frozen=True)
class Scaling:
    """Scales outputs (N, classes) to the logits of the probabilities; by default it changes nothing."""

    kind: str = "none"  # how it was chosen: one of `export.schema.CALIBRATION_KINDS`
    temperature: float = 1.0
    intercepts: Sequence[float] | None = None  # (classes,); None is 0 for each

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Scaling":
        """Return the scaling of an export; `settings` is the content of its `model.json`."""
        return cls(settings["calibration_kind"], settings["temperature"], settings.get("intercepts"))

    def __call__(self, outputs: np.ndarray) -> np.ndarray:
        """Return outputs / temperature + intercepts (N, classes), in float64."""
        scaled = np.asarray(outputs, dtype=np.float64) / self.temperature
        return scaled if self.intercepts is None else scaled + np.asarray(self.intercepts)

    def prior(self, weights: np.ndarray, trained: np.ndarray, validated: np.ndarray) -> np.ndarray:
        """Return the probabilities (classes,) of an image that says nothing about its class.

        A loss with weights w trains a network for the prior w * n / sum(w * n), with n training images of a class;
        balanced weights make it equal for all classes. Slope and intercepts of `validation` make it the share of each
        class in the images that they were fitted to.

        Args:
            weights: (classes,), of the loss.
            trained: (classes,), numbers of training images.
            validated: (classes,), numbers of validation images.
        """
        if self.kind in FITTED:
            return validated / validated.sum()
        return softmax(self(np.log(weights * trained)))

    def moved(self, ratios: np.ndarray) -> "Scaling":
        """Return the scaling that multiplies the probability of each class by its ratio (classes,), before they are
        divided by their sum."""
        own = np.zeros(len(ratios)) if self.intercepts is None else np.asarray(self.intercepts)
        return replace(self, intercepts=(own + np.log(ratios)).tolist())

    def intercept_of(self, positive: int) -> float:
        """Return the intercept on the log odds of one of two classes."""
        return 0.0 if self.intercepts is None else self.intercepts[positive] - self.intercepts[1 - positive]

    def describe(self, positive: int | None = None, judged: str = "validation") -> str:
        """Return what the probabilities are, for people.

        Args:
            positive: the index of the class to detect among two; None for more classes.
            judged: the images that a fit calibrates on; those of an ensemble with folds are out-of-fold images.

        >>> Scaling("validation", 0.5, (-0.1, 0.1)).describe(1)
        'slope 2 and intercept 0.2 fitted to validation images'
        >>> Scaling("cautious", 1.25).describe()
        'cautious temperature 1.25 from validation images'
        >>> Scaling("matched", 0.5, (-0.1, 0.1)).describe(1)
        'slope 2 of the fit, intercept 0.2 by images without labels'
        """
        if self.kind == "none":
            return "not calibrated"
        images = f"{judged if self.kind == 'validation' else self.kind} images"
        if self.kind in FITTED and positive is not None:
            values = f"slope {1 / self.temperature:.3g} and intercept {self.intercept_of(positive):.3g}"
            return f"{values} fitted to {images}"
        if self.kind in FITTED:
            return f"temperature {self.temperature:.3g} and an intercept of each class fitted to {images}"
        if self.kind == "matched":  # of two classes
            intercept = 0.0 if positive is None else self.intercept_of(positive)
            return f"slope {1 / self.temperature:.3g} of the fit, intercept {intercept:.3g} by images without labels"
        name = "cautious temperature" if self.kind == "cautious" else "temperature"
        return f"{name} {self.temperature:.3g} from {judged} images"


def prior_of(settings: dict[str, Any]) -> np.ndarray | None:
    """Return the probabilities (classes,) of an image that says nothing, which an export's probabilities are set for.

    Args:
        settings: the content of its `model.json`. Without the key `prior`, which earlier versions did not write, it
            follows from the class weights and the numbers of images.

    Returns:
        None where a class has no image, so that nothing follows.
    """
    if settings.get("prior") is not None:
        return np.array(settings["prior"])
    classes = settings["classes"]
    weights = np.array(settings["class_weights"] or [1.0] * len(classes))
    trained, validated = (np.array([settings["data"][part].get(name, 0) for name in classes]) for part in PARTS)
    scaling = Scaling.of(settings)
    if not (validated if scaling.kind in FITTED else trained).all():
        return None
    return scaling.prior(weights, trained, validated)
