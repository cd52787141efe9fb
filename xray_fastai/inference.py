"""A stream of files becomes a stream of predictions."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.vision.all import Learner, TensorImageBW
from scipy.special import softmax

from xray_fastai import bundle
from xray_fastai.device import choose_device
from xray_fastai.errors import ImageError, UserError
from xray_fastai.images import open_image


@dataclass(frozen=True)
class Model:
    """An export, ready to predict."""

    path: Path
    settings: dict[str, Any]  # model.json
    learn: Learner

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
    def threshold(self) -> float | None:
        """The probability of `positive` from which an image is called that; None where there is no such class."""
        return self.settings["threshold"]

    @property
    def temperature(self) -> float:
        return self.settings["temperature"]

    def probabilities(self, logits: np.ndarray, calibrated: bool = True) -> np.ndarray:
        """Softmax of logits (N, classes), divided by the export's temperature where `calibrated`."""
        return softmax(np.asarray(logits, dtype=np.float64) / (self.temperature if calibrated else 1.0), axis=-1)

    def decide(self, probabilities: np.ndarray, threshold: float | None = None) -> np.ndarray:
        """The class called for each row (N, classes), as an index (N,).

        Two classes are decided at `threshold` (None: the export's own); of more the most probable is called.
        """
        threshold = self.threshold if threshold is None else threshold
        if len(self.classes) != 2 or self.positive is None or threshold is None:
            return probabilities.argmax(axis=-1)
        positive = self.classes.index(self.positive)
        return np.where(probabilities[:, positive] >= threshold, positive, 1 - positive)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Outputs (B, classes) of eight-bit images (B, 1, size, size), on the CPU, in fp32."""
        batch = TensorImageBW(images.to(self.learn.dls.device))
        (batch,) = self.learn.dls.valid.after_batch((batch,))
        with torch.inference_mode():
            return self.learn.model(batch).as_subclass(torch.Tensor).float().cpu()


def newest_export(exports: str | Path = "exports") -> Path:
    """The export that was made last.

    Raises:
        UserError: there is none.
    """
    found = [path.parent for path in Path(exports).glob(f"*/{bundle.SETTINGS}") if not path.parent.name.startswith(".")]
    if not found:
        raise UserError(f"{exports}: no export in it; make one by 'xray-fastai fit', or name one by --model")
    return max(found, key=lambda path: (path / bundle.SETTINGS).stat().st_mtime)


def open_model(path: str | Path | None = None, device: str = "auto") -> Model:
    """An export from its safe files, on a device.

    Args:
        path: its folder; None takes the newest in ./exports.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: no export, a damaged one, or no such device.
    """
    path = newest_export() if path is None else Path(path)
    settings, learn = bundle.load(path)
    place = choose_device(device)
    learn.dls.to(place)
    learn.model.to(place).eval()
    return Model(path, settings, learn)


def predict_stream(
    model: Model, sources: Iterable[str | Path], batch_size: int = 32
) -> Iterator[tuple[str | Path, np.ndarray | None, str | None]]:
    """Predict files in their order, decoding ahead of the network; memory doesn't grow with their number.

    Yields:
        The source; its logits (classes,), or None; what is wrong with the file, or None.
    """

    def decode(source: str | Path) -> torch.Tensor | ImageError:
        try:
            return torch.from_numpy(np.array(open_image(source, model.size)))[None]  # (1, size, size)
        except ImageError as error:
            return error

    sources = iter(sources)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        waiting: deque[tuple[str | Path, Future]] = deque()

        def fill() -> None:
            for source in islice(sources, 2 * batch_size - len(waiting)):
                waiting.append((source, pool.submit(decode, source)))

        fill()
        while waiting:
            batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
            fill()
            images = [(source, future.result()) for source, future in batch]
            good = [image for _, image in images if isinstance(image, torch.Tensor)]
            outputs = iter(model.logits(torch.stack(good)).numpy() if good else ())
            for source, image in images:
                if isinstance(image, ImageError):
                    yield source, None, str(image)
                else:
                    yield source, next(outputs), None
