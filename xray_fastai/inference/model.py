"""Opens an export as a model: logits, probabilities and decisions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from xray_fastai.config.choices import INFERENCE_PRECISIONS
from xray_fastai.export.network import load_export
from xray_fastai.export.reader import find_export, path_of
from xray_fastai.inference.cpu_fusion import fused_for_cpu
from xray_fastai.inference.gate import Gate
from xray_fastai.inference.scaling import Scaling, prior_of, softmax
from xray_fastai.model.folding import fold_batch_norm, with_features
from xray_fastai.model.preprocessing import Preprocessing, equalize
from xray_fastai.system.device import choose_device, choose_precision
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import percent

if TYPE_CHECKING:
    from fastai.learner import Learner

_precision_lock = RLock()
NO_NUMBER = "the network's output is not a number, so its weights cannot be used; give another export"


@dataclass(frozen=True)
class Model:
    """Holds an export that is ready to predict."""

    path: Path
    settings: dict[str, Any]  # model.json
    network: nn.Sequential  # backbone and head, in evaluation mode: (B, 3, size, size) -> (B, classes)
    precision: str = "fp32"  # of `outputs`: fp32 or bf16
    gate: Gate | None = None  # None in exports without one
    prevalence: float | None = None  # that the probabilities were moved to (`at_prevalence`)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def classes(self) -> list[str]:
        return self.settings["classes"]

    @property
    def positive(self) -> str | None:
        return self.settings["positive"]

    @property
    def size(self) -> int:
        return self.settings["preprocessing"]["size"]

    @property
    def contrast(self) -> str:
        """The contrast of the network's input: equalize, or none."""
        return self.settings["preprocessing"].get("contrast", "none")

    @property
    def threshold(self) -> float | None:
        """The probability of `positive` from which it is predicted; None for more than two classes."""
        own = self.settings["threshold"]
        return own if self.prevalence is None else float(self.moved(own))

    @property
    def scaling(self) -> Scaling:
        """What turns logits into the export's probabilities, or into those for `prevalence`."""
        own = Scaling.of(self.settings)
        return own if self.prevalence is None else own.moved(self._ratios)

    @property
    def own_prevalence(self) -> float | None:
        """The share of `positive` that the export's own probabilities are set for; None where it tells none."""
        prior = prior_of(self.settings)
        return None if prior is None or self.positive is None else float(prior[self.classes.index(self.positive)])

    def at_prevalence(self, prevalence: float | None) -> "Model":
        """Return the same model with probabilities for another share of the class to detect; None changes nothing.

        The odds of this share replace those that the export's probabilities are set for (Saerens, Latinne &
        Decaestecker, Adjusting the outputs of a classifier to new a priori probabilities: a simple procedure, Neural
        Computation 2002). It holds where the images of a class are like those of the fit. The threshold moves, too, so
        the decisions stay.

        Raises:
            UserError: there are more than two classes, the share is not between 0 and 1, or the export has no image of
                a class.
        """
        if prevalence is None:
            return self
        wrong = None
        if len(self.classes) != 2:
            wrong = f"a model of {len(self.classes)} classes has no class to detect; leave it out"
        elif not 0 < prevalence < 1:
            wrong = "give a number that is above 0 and below 1"
        elif self.own_prevalence is None:
            wrong = f"{self.path} does not say which share its probabilities are set for; leave it out"
        if wrong is not None:
            raise UserError(wrong, option="prevalence", value=f"{prevalence:g}")
        return replace(self, prevalence=prevalence)

    @cached_property
    def _ratios(self) -> np.ndarray:
        """By class (classes,), the share at `prevalence` for one that the export's probabilities are set for."""
        of_positive = np.array([c == self.positive for c in self.classes])
        return np.where(of_positive, self.prevalence, 1 - self.prevalence) / prior_of(self.settings)

    def moved(self, probability: float, back: bool = False) -> float:
        """Return a probability of `positive`, which the export gives, as it is at `prevalence`; `back`: the reverse."""
        if self.prevalence is None:
            return probability
        positive = self.classes.index(self.positive)
        ratios = 1 / self._ratios if back else self._ratios
        ours, other = probability * ratios[positive], (1 - probability) * ratios[1 - positive]
        return ours / (ours + other)

    def describe_probabilities(self, calibrated: bool = True, tta: bool = False) -> str:
        """Return how the probabilities were calibrated, for people."""
        own = Scaling.of(self.settings)
        two = len(self.classes) == 2 and self.positive is not None
        if own.kind == "none" or not calibrated:
            text = "not calibrated" if own.kind == "none" else "not calibrated, by --uncalibrated"
        else:
            folds = (self.settings.get("ensemble") or {}).get("outputs") == "out of fold"
            judged = "out-of-fold" if folds else "validation"
            text = own.describe(self.classes.index(self.positive) if two else None, judged)
            text += ", for single views and not for the mean of views" if tta else ""
        if self.prevalence is None or not calibrated:
            return text
        return f"for a prevalence of {percent(self.prevalence)}, moved from {percent(self.own_prevalence)}; {text}"

    def threshold_of(self, calibrated: bool = True) -> float | None:
        """Return the threshold on the export's probabilities, or the one on raw ones with the same decisions.

        None means that the most probable class is predicted.
        """
        if len(self.classes) != 2 or self.positive is None or self.threshold is None or calibrated:
            return self.threshold if len(self.classes) == 2 else None
        from scipy.special import expit, logit  # takes 0.4 s, and only `uncalibrated` needs it

        intercept = self.scaling.intercept_of(self.classes.index(self.positive))
        return float(expit(self.scaling.temperature * (logit(self.threshold) - intercept)))

    def probabilities(self, logits: np.ndarray, calibrated: bool = True) -> np.ndarray:
        """Return the softmax of logits (N, classes), scaled as the export says (`scaling`) if `calibrated`."""
        return softmax((self.scaling if calibrated else Scaling())(logits))

    def decide(self, probabilities: np.ndarray, threshold: float | None = None) -> np.ndarray:
        """Return the predicted class of each row (N, classes) as an index (N,).

        Two classes are decided at `threshold` (None: the export's own); of more classes the most probable is predicted.
        """
        threshold = self.threshold if threshold is None else threshold
        if len(self.classes) != 2 or self.positive is None or threshold is None:
            return probabilities.argmax(axis=-1)
        positive = self.classes.index(self.positive)
        return np.where(probabilities[:, positive] >= threshold, positive, 1 - positive)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the logits (B, classes) of 8-bit images (B, 1, size, size) in fp32; they come back on the CPU."""
        return self.logits_and_features(images, exact=True)[0]

    def outputs(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the logits in the model's `precision`, faster than `logits`.

        In fp32 the two agree to some 1e-6 of the largest logit.
        """
        return self.logits_and_features(images)[0]

    def logits_and_features(self, images: torch.Tensor, exact: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the logits (B, classes), and the pooled features (B, F) that the last layer makes them of.

        Args:
            images: (B, 1, size, size), 8-bit.
            exact: compute as `logits` does; else as `outputs`.

        Returns:
            Both in fp32, on the CPU.
        """
        if exact or (self.precision == "fp32" and not self._on_cpu):
            backbone, head = self.network
            with torch.inference_mode(), full_precision():
                features = head[:-1](backbone(self._prepared(images)))
                logits = head[-1](features)
        else:
            with torch.inference_mode():
                batch = self._prepared(images).to(self._kind, memory_format=torch.channels_last)
                logits, features = self._folded(batch)
        return logits.float().cpu(), features.float().cpu()

    def seen(self, images: torch.Tensor) -> torch.Tensor:
        """Return 8-bit images (B, 1, size, size) with the contrast that the network gets, before normalization."""
        return equalize(images) if self.contrast == "equalize" else images

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        """Turn 8-bit images (B, 1, size, size) into the network's input (B, 3, size, size), on its device."""
        return self._preprocessing(images.to(self.device))

    @cached_property
    def _preprocessing(self) -> Preprocessing:
        return Preprocessing(self.contrast).to(self.device)

    @property
    def _on_cpu(self) -> bool:
        return self.device.type == "cpu" and torch.backends.mkldnn.is_available()

    @property
    def _kind(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @cached_property
    def _folded(self) -> torch.nn.Module:
        """A copy of the network in its precision, with batch norm folded into the convolutions before it.

        It gives logits and features (`folding.with_features`).

        Raises:
            UserError: an output is not a number, which oneDNN's ReLU would turn into zero.
        """
        ramp = torch.arange(self.size**2).remainder(256).to(torch.uint8).view(1, 1, self.size, self.size)
        images = torch.cat([ramp, ramp.mT])
        logits = self.logits(images)
        if not logits.isfinite().all():
            raise UserError(f"{self.path}: {NO_NUMBER}")
        if self._on_cpu:
            return fused_for_cpu(self.network, self._kind, self._prepared(images), logits)
        return with_features(fold_batch_norm(self.network)).to(self._kind, memory_format=torch.channels_last)


def open_model(
    source: "str | Path | Model | Learner | None" = None, device: str = "auto", precision: str = "auto"
) -> Model:
    """Open an export from its safe files, on a device.

    Args:
        source: its folder; a learner that `load_learner` opened, whose export is opened again; or an open model, which
            is returned as it is. None takes the default (`export.reader.find_export`).
        device: auto, cpu, cuda or mps.
        precision: fp32, bf16, or auto: bf16 if the model was trained in it and the device computes in it.

    Raises:
        UserError: there is no export or a damaged one, the learner was trained further, or the device or the precision
            is not available.
    """
    if isinstance(source, Model):
        return source
    if precision not in INFERENCE_PRECISIONS:
        raise UserError(f"choose one of {', '.join(INFERENCE_PRECISIONS)}", option="precision", value=precision)
    path = find_export(None if source is None else path_of(source))
    settings, network, tensors = load_export(path)
    if hasattr(source, "dls"):
        _check_unchanged(source.model, network, path)
    chosen = choose_device(device)
    network.to(chosen, memory_format=torch.channels_last)  # 1.4 times as fast in fp32 on a CPU
    if precision == "auto":
        trained_in_bf16 = settings["training"]["precision"] == "bf16"
        precision = "bf16" if trained_in_bf16 and choose_precision("auto", chosen) == "bf16" else "fp32"
    return Model(path, settings, network, choose_precision(precision, chosen), Gate.of(settings, tensors))


def _check_unchanged(model: nn.Module, network: nn.Module, path: Path) -> None:
    """Check that a learner still has the weights of its export: threshold and calibration were chosen for these.

    Raises:
        UserError: it has others.
    """
    state, expected = model.state_dict(), network.state_dict()
    if state.keys() != expected.keys() or any(not torch.equal(state[k].cpu().to(t), t) for k, t in expected.items()):
        raise UserError(
            f"the learner was trained after it was opened from {path}, whose threshold and calibration are of the "
            "weights before; save it as an export, and give that",
            option="model",
        )


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute convolutions in fp32; on CUDA the default is TF32, with 10 bits of mantissa instead of 23.

    torch has one setting for all threads, so one thread at a time is inside this context.
    """
    convolution = torch.backends.cudnn.conv
    with _precision_lock:
        before, convolution.fp32_precision = convolution.fp32_precision, "ieee"
        try:
            yield
        finally:
            convolution.fp32_precision = before
