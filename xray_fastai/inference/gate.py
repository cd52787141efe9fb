"""Says how unlike the training images an image is, so that its call can be withheld.

Two Mahalanobis distances are taken: one between pictures at 16 x 16 pixels, and one between the features that the
network's last layer gets (Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution Samples and
Adversarial Attacks, NeurIPS 2018). The covariance is that of a probabilistic principal component analysis (Tipping &
Bishop, Journal of the Royal Statistical Society B 61, 1999): what lies outside of the components counts, too.

`training.gate` settles the numbers. They stand in `model.json` (key `gate`) and in `model.safetensors` (tensors
`gate.*`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from xray_fastai.export.weights_file import GATE, GATE_SIDE


@dataclass(frozen=True)
class Space:
    """Measures how far vectors lie from those of the training images."""

    mean: np.ndarray  # (F,), fp32, of the training images
    directions: np.ndarray  # (k, F), fp32, principal components, each of length 1 / standard deviation along it
    centres: np.ndarray  # (classes, k), fp32, of each class, along the directions
    rest: float  # variance along each of the other F - k directions
    distances: np.ndarray  # (101,), quantiles 0, 0.01, ..., 1 of the training images' distances, each left out in turn

    def distance(self, vectors: np.ndarray) -> np.ndarray:
        """Return the distances (N,) of vectors (N, F) from the nearest class."""
        centred = vectors - self.mean
        along = centred @ self.directions.T  # (N, k)
        scales = 1 / np.linalg.norm(self.directions, axis=1)  # (k,)
        outside = np.maximum(0, np.square(centred).sum(1) - np.square(along * scales).sum(1)) / self.rest
        within = np.square(along[:, None] - self.centres).sum(2).min(1)
        return np.sqrt(within + outside)

    def percentile(self, vectors: np.ndarray) -> np.ndarray:
        """Return the percentage (N,) of training images that are nearer to the others than vectors (N, F)."""
        return np.interp(self.distance(vectors), self.distances, np.linspace(0, 100, len(self.distances)))


@dataclass(frozen=True)
class Gate:
    """Holds what an export knows of its training images."""

    limit: float  # an image whose `unlike` is higher is not called
    images: int  # training images that it was settled by
    pictures: Space
    features: Space

    def unlike(self, images: torch.Tensor, features: torch.Tensor) -> np.ndarray:
        """Return the percentage (B,) of training images that are more like the others than each image is.

        Args:
            images: (B, 1, size, size), 8-bit, on the CPU.
            features: (B, F), what the network's last layer gets (`Model.outputs_and_features`).
        """
        of_pictures = self.pictures.percentile(picture_vectors(images))
        return np.maximum(of_pictures, self.features.percentile(features.float().numpy()))

    def numbers(self) -> dict[str, Any]:
        """Return what `model.json` holds of the gate."""
        spaces = {name: getattr(self, name) for name in ("pictures", "features")}
        return {"limit": self.limit, "images": self.images} | {
            name: {"dimensions": len(space.directions), "rest": space.rest, "distances": space.distances.tolist()}
            for name, space in spaces.items()
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """Return what `model.safetensors` holds of the gate."""
        return {
            f"{GATE}{name}.{part}": getattr(getattr(self, name), part)
            for name in ("pictures", "features")
            for part in ("mean", "directions", "centres")
        }

    @classmethod
    def of(cls, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> "Gate | None":
        """Return the gate of an export; None if it has none.

        Args:
            settings: the content of `model.json`.
            tensors: those of `model.safetensors`.
        """
        numbers = settings.get("gate")
        if numbers is None:
            return None

        def space(name: str) -> Space:
            parts = {part: tensors[f"{GATE}{name}.{part}"] for part in ("mean", "directions", "centres")}
            return Space(**parts, rest=numbers[name]["rest"], distances=np.array(numbers[name]["distances"]))

        return cls(numbers["limit"], numbers["images"], space("pictures"), space("features"))


def picture_vectors(images: torch.Tensor) -> np.ndarray:
    """Return 8-bit images (B, 1, size, size) at 16 x 16 pixels (B, 256), each with mean 0 and variance 1."""
    small = adaptive_avg_pool2d(images.float(), GATE_SIDE).flatten(1)  # (B, 256)
    centred = small - small.mean(1, keepdim=True)
    return (centred / centred.std(1, keepdim=True).clamp_min(1)).numpy()
