"""Turns a stream of files into a stream of logits, and lists the images of folders."""

import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from xray_fastai.data.images import (
    EXTENSIONS,
    check_not_blank,
    contrast_of,
    is_hidden,
    is_image_file,
    open_image,
    walk,
)
from xray_fastai.inference.model import NO_NUMBER, Model
from xray_fastai.inference.tta import mean_over_views
from xray_fastai.system.errors import ImageError, UserError
from xray_fastai.system.memory import out_of_memory_means
from xray_fastai.system.parallel import map_in_threads
from xray_fastai.system.progress import track

Source: TypeAlias = str | Path | bytes | Image.Image | np.ndarray
"""What `images.open_image` reads."""
FEW = 8
"""Fewer files than this are predicted by the network as it is. To fold and fuse it takes 1.5 s (ResNet50, 224 px, one
AVX2 core), as long as ten images."""


@dataclass(frozen=True)
class Batch:
    """Holds sources that went through the network together, and their logits."""

    sources: list[Source]
    errors: list[ImageError | None]  # for each source: why it cannot be read, or None
    images: torch.Tensor  # (readable, 1, size, size), 8-bit
    logits: np.ndarray  # (readable, classes), fp32
    unlike: np.ndarray | None = None  # (readable,), see `Gate.unlike`; None where the export has no gate

    def outputs(self) -> Iterator[tuple[Source, np.ndarray | None, ImageError | None]]:
        """Yield each source with its logits (classes,) or None, and its error or None."""
        logits = iter(self.logits)
        for source, error in zip(self.sources, self.errors, strict=True):
            yield source, next(logits) if error is None else None, error


def decode_batches(
    sources: Iterable[Source], size: int, batch_size: int = 32
) -> Generator[list[tuple[Source, np.ndarray | ImageError]], None, None]:
    """Yield sources in their order, each with its image (size, size), 8-bit, or why it cannot be read.

    Threads decode the next images while the caller works. Memory does not grow with the number of sources.

    Args:
        sources: see `predict_batches`.
        size: of the images, in pixels.
        batch_size: how many are yielded at once.
    """

    def decode(source: Source) -> tuple[Source, np.ndarray | ImageError]:
        try:
            image = open_image(source, size)
            try:
                check_not_blank(contrast_of(image))
            except ImageError as error:
                named = str(source) if isinstance(source, (str, os.PathLike)) else "image"
                raise ImageError(error.message, value=named) from None
            return source, np.array(image)
        except ImageError as error:
            error.__context__ = error.__cause__ = None  # its traceback, as the error's own, keeps the image in memory
            return source, error.with_traceback(None)

    threads = min(16, os.cpu_count() or 1)
    with closing(map_in_threads(decode, sources, threads, ahead=max(2 * batch_size, 2 * threads))) as decoded:
        while batch := list(islice(decoded, batch_size)):
            yield batch


def predict_batches(
    model: Model, sources: Iterable[Source], batch_size: int = 32, tta: bool = False
) -> Generator[Batch, None, None]:
    """Predict sources in their order; threads decode the next ones meanwhile (`decode_batches`).

    Args:
        model: from `open_model`.
        sources: files, bytes, PIL images or arrays; a folder is a source that cannot be read (`image_sources`).
        batch_size: changes the speed only.
        tta: average over several views of each image (`inference.tta`).

    Raises:
        UserError: a batch does not fit into the device's memory.
    """
    with closing(decode_batches(sources, model.size, batch_size)) as decoded:
        for number, batch in enumerate(decoded):
            only_few = number == 0 and len(batch) < min(FEW, batch_size) and model.precision == "fp32"
            readable = [image for _, image in batch if isinstance(image, np.ndarray)]
            images = torch.empty(0, 1, model.size, model.size, dtype=torch.uint8)
            logits = np.empty((0, len(model.classes)), np.float32)
            unlike = None if model.gate is None else np.empty(0)
            if readable:
                images = torch.from_numpy(np.stack(readable))[:, None]  # (readable, 1, size, size)
                explain = f'not enough memory on {model.device} for a batch size of {batch_size}; try device="cpu"'
                with out_of_memory_means(explain):
                    outputs, features = model.logits_and_features(images, exact=only_few)
                    if tta:
                        compute = model.logits if only_few else model.outputs
                        outputs = mean_over_views(compute, images, outputs)
                logits = outputs.numpy()
                if model.gate is not None:
                    unlike = model.gate.unlike(images, features)
            errors = [image if isinstance(image, ImageError) else None for _, image in batch]
            yield Batch([source for source, _ in batch], errors, images, logits, unlike)


def predict_stream(
    model: Model, sources: Iterable[Source], batch_size: int = 32, tta: bool = False
) -> Iterator[tuple[Source, np.ndarray | None, ImageError | None]]:
    """Predict as `predict_batches` does, and yield one source at a time.

    Yields:
        The source; its logits (classes,), or None; why it cannot be read, or None.
    """
    with closing(predict_batches(model, sources, batch_size, tta)) as batches:
        for batch in batches:
            yield from batch.outputs()


def predict_all(model: Model, paths: Sequence[str], tta: bool = False) -> np.ndarray:
    """Return the logits (N, classes) of files, with a progress bar on a terminal.

    Raises:
        UserError: a file cannot be read; the message names the first one, and says how many there are.
    """
    return predict_and_compare(model, paths, tta)[0]


def predict_and_compare(model: Model, paths: Sequence[str], tta: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the logits (N, classes) of files, and how unlike the training images they are (N,); None without a gate.

    Raises:
        UserError: as `predict_all`.
    """
    logits, errors, unlike = [], [], []

    def outputs() -> Iterator[tuple[Source, np.ndarray | None, ImageError | None]]:
        with closing(predict_batches(model, paths, tta=tta)) as batches:
            for batch in batches:
                unlike.append(batch.unlike)
                yield from batch.outputs()

    for _, output, error in track(outputs(), "predicting", len(paths)):
        logits.append(output)
        if error:
            errors.append(str(error))
        elif not np.isfinite(output).all():
            raise UserError(f"{model.path}: {NO_NUMBER}")
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}; repair or remove it: results on a part of the split would mislead")
    return np.stack(logits), None if model.gate is None else np.concatenate(unlike)


def image_sources(
    paths: Iterable[Source], recursive: bool = False, passed_over: Counter[str] | None = None
) -> Iterator[Source]:
    """Replace each folder by its images in the order of their names; other sources stay as they are.

    With `recursive` the images of the subfolders follow. A folder without images is yielded itself, and becomes a file
    that cannot be read. Only one folder's names are held in memory. `passed_over` counts, by folder, the files that are
    no images by their names.
    """
    passed_over = Counter() if passed_over is None else passed_over
    for path in paths:
        if isinstance(path, (str, os.PathLike)):
            path = os.fspath(path)
            images = _images_in(path, recursive, passed_over) if os.path.isdir(path) else iter(())
            yield next(images, path)
            yield from images
        else:
            yield path


def check_folders(paths: Iterable[Source], recursive: bool = False, or_empty: bool = False) -> None:
    """Check that each folder among `paths` holds an image, or with `or_empty` only that it can be read.

    Raises:
        UserError: a folder has no image, or cannot be read.
    """
    for path in paths:
        if not isinstance(path, (str, os.PathLike)) or not os.path.isdir(path):
            continue
        try:
            os.scandir(path).close()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if not or_empty and next(_images_in(os.fspath(path), recursive, Counter()), None) is None:
            advice = "" if recursive else "; to search its subfolders, too, give recursive=True"
            raise UserError(f"{path}: no image in this folder (looked for {' '.join(EXTENSIONS)}){advice}")


def _images_in(folder: str, recursive: bool, passed_over: Counter[str]) -> Iterator[str]:
    unread: list[str] = []
    for parent, files in walk(folder, lambda error: unread.append(error.filename)):
        yield from unread  # becomes a row: a file that cannot be read
        unread.clear()
        names = [name for name in files if not is_hidden(name)]
        images = [name for name in names if is_image_file(os.path.join(parent, name))]
        passed_over[parent] = len(names) - len(images)
        for name in images:
            yield os.path.join(parent, name)
        if not recursive:
            return
    yield from unread
