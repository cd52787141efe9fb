"""Chooses how outputs become probabilities, and the decision threshold, on the validation split at the end of a fit.

Neither is ever chosen on the data that a model is evaluated on. `METHODS` says what the choices are; the README of this
folder holds what was measured about them (`tests/benchmarks/calibration.py`).
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax

from xray_fastai.inference.scaling import Scaling
from xray_fastai.training.threshold import CONFIDENCE, by_sensitivity, by_youden, standard_error

MIN_IMAGES = 50
"""With fewer validation images, or fewer than `MIN_OF_A_CLASS` of one class, nothing is chosen."""
MIN_OF_A_CLASS = 10
MAX_TEMPERATURE = 20.0
"""The smallest temperature is 1 / `MAX_TEMPERATURE`."""
SPREAD = 1.0
"""Standard deviation that the logarithm of the slope, and each intercept, have before the images are seen: the penalty
of `fit_slope_and_intercepts`."""


@dataclass(frozen=True)
class Validated:
    """Holds a network's outputs on the validation images, and what its loss was weighted for."""

    logits: np.ndarray  # (N, classes)
    targets: np.ndarray  # (N,), indices of classes
    patients: np.ndarray  # (N,), equal for images of one patient
    weights: np.ndarray  # (classes,), of the loss
    trained: np.ndarray  # (classes,), numbers of training images
    kind: str = "validation"  # what the images are called

    @property
    def counts(self) -> np.ndarray:
        """The number of validation images of each class (classes,)."""
        return np.bincount(self.targets, minlength=self.logits.shape[1])


@dataclass(frozen=True)
class Calibration:
    """Turns a network's outputs into probabilities and a decision.

    Probabilities are softmax(`scaling`(outputs)). An image is predicted positive if its probability is at least
    `threshold`, which is None where there is no positive class to decide on.
    """

    scaling: Scaling = field(default_factory=Scaling)
    threshold: float | None = 0.5
    note: str = "not calibrated"  # how they were chosen, for people

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return the probabilities (N, classes) of outputs (N, classes)."""
        return softmax(self.scaling(logits), axis=1)


def calibrate(
    images: Validated, method: str, positive: int | None, target_sensitivity: float | None = None
) -> Calibration:
    """Choose the scaling, and the threshold on the probabilities that it gives.

    Args:
        images: the validation split.
        method: one of `config.CALIBRATIONS`.
        positive: the index of the class to detect, or None.
        target_sensitivity: see `threshold.by_sensitivity`; None uses Youden's J.
    """
    number, fewest = len(images.targets), images.counts.min()
    if number < MIN_IMAGES or fewest < MIN_OF_A_CLASS:
        note = f"not calibrated: {number} {images.kind} images, {fewest} of the rarest class, are too few"
        if target_sensitivity is not None:
            note += f", also for a sensitivity of {target_sensitivity:g}"
        return Calibration(Scaling(), None if positive is None else 0.5, note)
    scaling, note = METHODS[method](images)
    temperature = scaling.temperature
    if not 1.05 / MAX_TEMPERATURE < temperature < MAX_TEMPERATURE / 1.05:
        note += "; the temperature is at its limit, so the probabilities are unreliable: train longer"
    if positive is None:
        return Calibration(scaling, None, note)
    scores = softmax(scaling(images.logits), axis=1)[:, positive]
    truth = images.targets == positive
    if target_sensitivity is None:
        threshold = by_youden(scores, truth, images.patients, float(prior_of(images, scaling)[positive]))
        return Calibration(scaling, threshold, f"{note}; threshold by Youden's J")
    threshold, probability = by_sensitivity(scores, truth, images.patients, target_sensitivity)
    note += f"; threshold by sensitivity {target_sensitivity:g}, on images like these "
    if probability >= CONFIDENCE:
        note += f"reached with a probability of at least {CONFIDENCE:g}"
    else:
        note += f"reached with a probability of {probability:.2f} only: {truth.sum()} positive images show no more"
    return Calibration(scaling, threshold, note)


def prior_of(images: Validated, scaling: Scaling) -> np.ndarray:
    """Return the probabilities (classes,) of an image that says nothing about its class (`Scaling.prior`)."""
    return scaling.prior(images.weights, images.trained, images.counts)


def _none(images: Validated) -> tuple[Scaling, str]:
    return Scaling(), f"not calibrated, as --calibration none says; {len(images.targets)} {images.kind} images"


def _cautious(images: Validated) -> tuple[Scaling, str]:
    """With no validation errors the temperature cannot be estimated: the likelihood grows as it falls to zero."""
    number = f"{len(images.targets)} {images.kind} images"
    if not (images.logits.argmax(axis=1) != images.targets).any():
        return Scaling(), f"not calibrated: without errors on {number} the temperature cannot be estimated"
    return Scaling("cautious", choose_temperature(images)), f"cautious temperature from {number}"


def _validation(images: Validated) -> tuple[Scaling, str]:
    temperature, intercepts = fit_slope_and_intercepts(images)
    scaling = Scaling("validation", temperature, tuple(intercepts.tolist()))
    return scaling, f"slope and intercept fitted to {len(images.targets)} {images.kind} images"


METHODS = {"cautious": _cautious, "validation": _validation, "none": _none}
"""By the name of `fit --calibration`, a function that returns the scaling and how it was chosen."""


def losses(logits: np.ndarray, targets: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the negative log-likelihood of each image (N,)."""
    return -log_softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)[np.arange(len(targets)), targets]


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the temperature with the lowest negative log-likelihood, from 1 / `MAX_TEMPERATURE` to `MAX_TEMPERATURE`
    (Guo et al., On Calibration of Modern Neural Networks, ICML 2017)."""
    bound = np.log(MAX_TEMPERATURE)

    def loss(log_temperature: float) -> float:
        return losses(logits, targets, np.exp(log_temperature)).mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6}).x))


def choose_temperature(images: Validated) -> float:
    """Return the largest temperature whose negative log-likelihood is within one standard error of the lowest.

    The standard error is that of the mean difference of the losses on the same images, by patient. The temperature is
    at most twice that of the lowest. Validation images are like the training images, new images often are not; on
    these, the best temperature of the validation images is overconfident.
    """
    best = fit_temperature(images.logits, images.targets)
    lowest = losses(images.logits, images.targets, best)

    def is_within(temperature: float) -> bool:
        more = losses(images.logits, images.targets, temperature) - lowest
        return bool(more.mean() <= standard_error(more, images.patients))

    warmer = np.geomspace(best, min(2 * best, MAX_TEMPERATURE), 1001)  # in steps of 0.07 %
    return float(max([best, *filter(is_within, warmer)]))


def fit_slope_and_intercepts(
    images: Validated, spread: float = SPREAD, with_slope: bool = True
) -> tuple[float, np.ndarray]:
    """Fit one slope and an intercept of each class to the validation images, by penalised maximum likelihood.

    A loss with weights w makes a network's posterior proportional to w p(class | image), which no slope undoes; so
    log(w) is subtracted first. Then softmax(slope * outputs + intercepts) is fitted: Platt scaling for two classes,
    bias-corrected temperature scaling for more (Alexandari et al., Maximum likelihood with bias-corrected calibration
    is hard-to-beat at label shift adaptation, ICML 2020). log(slope) and intercepts have a normal prior of mean 0: the
    fewer the images, and the fewer errors they have, the less is changed.

    Args:
        images: the validation split.
        spread: standard deviation of the prior.
        with_slope: False keeps the slope at 1.

    Returns:
        The temperature, 1 / slope, and the intercepts (classes,), log(w) included.
    """
    offset = np.log(images.weights)
    z = np.asarray(images.logits, dtype=np.float64) - offset  # (N, classes)
    truth = np.arange(z.shape[1]) == images.targets[:, None]

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        slope = np.exp(values[0])
        log_p = log_softmax(slope * z + values[1:], axis=1)
        residuals = np.exp(log_p) - truth  # (N, classes), the gradient of the scaled outputs
        gradient = np.array([slope * (residuals * z).sum(), *residuals.sum(axis=0)])
        return (values**2).sum() / (2 * spread**2) - log_p[truth].sum(), gradient + values / spread**2

    bound = np.log(MAX_TEMPERATURE) if with_slope else 0.0
    bounds = [(-bound, bound), *[(None, None)] * z.shape[1]]
    log_slope, *intercepts = minimize(loss, np.zeros(1 + z.shape[1]), jac=True, method="L-BFGS-B", bounds=bounds).x
    slope = np.exp(log_slope)
    return float(1 / slope), np.array(intercepts) - slope * offset
