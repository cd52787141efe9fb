"""Says how unlike the training images an image is, so that its call can be withheld.

An image is compared in four ways, and the one that finds it least like the training images counts:

    statistics   contrast, black and white, and edges at three scales
    pictures     the image at 16 x 16 pixels
    upright      the same, along the one direction that tells X-rays from X-rays that are upside down (Fisher's linear
                 discriminant)
    features     what the network's last layer gets

All but `upright` are distances from the nearest class (Mahalanobis; Lee et al., A Simple Unified Framework for
Detecting Out-of-Distribution Samples and Adversarial Attacks, NeurIPS 2018). The covariance is that of a probabilistic
principal component analysis (Tipping & Bishop, Journal of the Royal Statistical Society B 61, 1999), so that what lies
outside of the components counts, too. On real X-rays and pictures of other things this was better than the nearest
training images in the features (Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors, ICML 2022):
`tests.benchmarks.gate`.

`training.gate` settles the numbers. They stand in `model.json` (key `gate`) and in `model.safetensors` (tensors
`gate.*`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from xray_fastai.export.weights_file import GATE, GATE_SIDE, GATE_SPACES

WITHIN = np.arange(100)
"""The percentages whose quantiles a gate holds; its last number is for 100."""


@dataclass(frozen=True)
class Space:
    """Measures how far vectors lie from those of the training images."""

    mean: np.ndarray  # (F,), fp32, of the training images
    directions: np.ndarray  # (k, F), fp32, principal components, each of length 1 / standard deviation along it
    centres: np.ndarray  # (classes, k), fp32, of each class, along the directions
    rest: float  # variance along each of the other F - k directions

    def distances(self, vectors: np.ndarray) -> np.ndarray:
        """Return the logarithms (N,) of the distances of vectors (N, F) from the nearest class."""
        centred = vectors - self.mean
        along = centred @ self.directions.T  # (N, k)
        scales = 1 / np.linalg.norm(self.directions, axis=1)  # (k,)
        outside = np.maximum(0, np.square(centred).sum(1) - np.square(along * scales).sum(1)) / self.rest
        within = np.square(along[:, None] - self.centres).sum(2).min(1)
        return np.log(np.sqrt(within + outside) + 1e-6)


@dataclass(frozen=True)
class Measures:
    """Compares images with the training images in the four ways."""

    spaces: dict[str, Space]  # by the names of `GATE_SPACES`
    upright: np.ndarray  # (256,), fp32, the direction; higher is upside down

    def __call__(self, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return four numbers of each image (N, 4), higher for images that are less like the training images.

        Args:
            vectors: of the images (N, F), by the names of `GATE_SPACES`.
        """
        columns = [space.distances(vectors[name]) for name, space in self.spaces.items()]
        return np.stack([*columns, vectors["pictures"] @ self.upright], axis=1)


@dataclass(frozen=True)
class Gate:
    """Holds what an export knows of its training images."""

    measures: Measures
    medians: np.ndarray  # (4,), of the measures of X-rays
    spreads: np.ndarray  # (4,), from the median to the quantile of 0.99
    quantiles: np.ndarray  # (101,), of the greatest of the scaled measures of the training images; see `WITHIN`
    limit: float  # an image whose `unlike` is higher is not called
    images: int  # training images that it was settled by

    def unlike(self, images: torch.Tensor, features: torch.Tensor) -> np.ndarray:
        """Return the percentage (B,) of training images that are more like the others than each image is.

        Between 99 and 100 it goes on to rise beyond the least typical training image, which is near 99.5.

        Args:
            images: (B, 1, size, size), 8-bit, on the CPU.
            features: (B, F), what the network's last layer gets (`Model.logits_and_features`); of those of an ensemble
                its first member's, which stand first.
        """
        own = features[:, : len(self.measures.spaces["features"].mean)]
        return self.percentages(self.measures(vectors_of(images, own)))

    def percentages(self, measures: np.ndarray) -> np.ndarray:
        """Turn measures (N, 4) into percentages (N,)."""
        scores = ((measures - self.medians) / self.spreads).max(axis=1)
        return np.interp(scores, self.quantiles, [*WITHIN, 100])

    def numbers(self) -> dict[str, Any]:
        """Return what `model.json` holds of the gate."""
        return {
            "limit": self.limit,
            "images": self.images,
            "medians": self.medians.tolist(),
            "spreads": self.spreads.tolist(),
            "quantiles": self.quantiles.tolist(),
            "dimensions": {name: len(space.directions) for name, space in self.measures.spaces.items()},
            "rest": {name: float(space.rest) for name, space in self.measures.spaces.items()},
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """Return what `model.safetensors` holds of the gate."""
        parts = {
            f"{GATE}{name}.{part}": getattr(space, part)
            for name, space in self.measures.spaces.items()
            for part in ("mean", "directions", "centres")
        }
        return {name: np.ascontiguousarray(part, np.float32) for name, part in parts.items()} | {
            f"{GATE}upright": self.measures.upright.astype(np.float32)
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
        spaces = {
            name: Space(
                *(tensors[f"{GATE}{name}.{part}"] for part in ("mean", "directions", "centres")), numbers["rest"][name]
            )
            for name in GATE_SPACES
        }
        medians, spreads, quantiles = (np.array(numbers[name]) for name in ("medians", "spreads", "quantiles"))
        measures = Measures(spaces, tensors[f"{GATE}upright"])
        return cls(measures, medians, spreads, quantiles, numbers["limit"], numbers["images"])


def vectors_of(images: torch.Tensor, features: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the vectors of images (B, F) by the names of `GATE_SPACES`.

    Args:
        images: (B, 1, size, size), 8-bit, on the CPU.
        features: (B, F), fp32, on the CPU.
    """
    values = images.float()
    return {
        "statistics": statistics_of(values).numpy(),
        "pictures": pictures_of(values).numpy(),
        "features": features.numpy(),
    }


def statistics_of(images: torch.Tensor) -> torch.Tensor:
    """Return the statistics (B, 14) of images (B, 1, size, size) with values of 0 to 255.

    They are the contrast, the shares of black and of white, the brightness, and of the differences of neighbours, down
    and across, at the full size, a half and a quarter of it: their mean, and for the first two how uneven they are.
    """
    deviation, mean = torch.std_mean(images, dim=(1, 2, 3))
    deviation = deviation.clamp_min(1)
    dark, bright = ((part).float().mean((1, 2, 3)) for part in (images < 8, images > 247))
    columns = [deviation.log(), dark, bright, mean / deviation]
    for scale in (1, 2, 4):
        scaled = images if scale == 1 else avg_pool2d(images, scale)
        for axis in (2, 3):
            steps = scaled.diff(dim=axis).flatten(1)
            size = steps.abs().mean(1)
            columns.append((size / deviation).clamp_min(1e-3).log())
            if scale < 4:
                uneven = torch.linalg.vector_norm(steps, dim=1) / steps.shape[1] ** 0.5 / size.clamp_min(1e-3)
                columns.append(uneven.clamp(1e-2, 1e2).log())
    return torch.stack(columns, dim=1)


def pictures_of(images: torch.Tensor) -> torch.Tensor:
    """Return images (B, 1, size, size) at 16 x 16 pixels (B, 256), each with mean 0 and variance 1."""
    deviation, mean = torch.std_mean(small := adaptive_avg_pool2d(images, GATE_SIDE).flatten(1), dim=1, keepdim=True)
    return (small - mean) / deviation.clamp_min(1)
