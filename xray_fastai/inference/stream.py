"""A stream of files becomes a stream of predictions."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from xray_fastai.data.images import EXTENSIONS, is_hidden, is_image_file, may_be_image, open_image
from xray_fastai.inference.model import NO_NUMBER, Model
from xray_fastai.inference.tta import Views
from xray_fastai.system.errors import ImageError, UserError
from xray_fastai.system.progress import track

Source = str | Path | bytes | Image.Image | np.ndarray
"""What `images.open_image` takes."""


@dataclass(frozen=True)
class Batch:
    """Sources that went through the network together."""

    sources: list[Source]
    errors: list[str | None]  # of each source: what is wrong with it
    images: torch.Tensor  # (readable, 1, size, size), eight-bit
    logits: np.ndarray  # (readable, classes), fp32

    def outputs(self) -> Iterator[tuple[Source, np.ndarray | None, str | None]]:
        """Each source with its logits (classes,) or None, and its error or None."""
        logits = iter(self.logits)
        for source, error in zip(self.sources, self.errors, strict=True):
            yield source, next(logits) if error is None else None, error


def predict_batches(
    model: Model, sources: Iterable[Source], batch_size: int = 32, views: Views | None = None
) -> Iterator[Batch]:
    """Predict sources in their order, decoding ahead of the network; memory doesn't grow with their number.

    With `views`, by test-time augmentation.

    Raises:
        UserError: a batch does not fit into the device's memory.
    """

    def decode(source: Source) -> torch.Tensor | str:
        try:
            return torch.from_numpy(np.array(open_image(source, model.size)))[None]  # (1, size, size)
        except ImageError as error:
            return str(error)

    sources = iter(sources)
    threads = min(16, os.cpu_count() or 1)
    ahead = max(2 * batch_size, 2 * threads)
    waiting: deque[tuple[Source, Future]] = deque()
    pool = ThreadPoolExecutor(threads)

    def fill() -> None:
        for source in islice(sources, ahead - len(waiting)):
            waiting.append((source, pool.submit(decode, source)))

    try:
        fill()
        while waiting:
            taken = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
            fill()
            decoded = [future.result() for _, future in taken]
            good = [image for image in decoded if not isinstance(image, str)]
            images = torch.stack(good) if good else torch.empty(0, 1, model.size, model.size, dtype=torch.uint8)
            logits = np.empty((0, len(model.classes)), np.float32)
            if good:
                logits = (views.mean(model.outputs, images) if views else model.outputs(images)).numpy()
            errors = [image if isinstance(image, str) else None for image in decoded]
            yield Batch([source for source, _ in taken], errors, images, logits)
    except torch.OutOfMemoryError:
        raise UserError(
            f"batch size {batch_size}: more than {model.learn.dls.device} has memory for; try --device cpu"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def predict_stream(
    model: Model, sources: Iterable[Source], batch_size: int = 32, views: Views | None = None
) -> Iterator[tuple[Source, np.ndarray | None, str | None]]:
    """As `predict_batches`, a source at a time.

    Yields:
        The source; its logits (classes,), or None; what is wrong with the file, or None.
    """
    with closing(predict_batches(model, sources, batch_size, views)) as batches:
        for batch in batches:
            yield from batch.outputs()


def predict_all(model: Model, paths: Sequence[str], views: Views | None = None) -> np.ndarray:
    """Logits (N, classes) of files all of which are wanted, with a progress bar on a terminal.

    Raises:
        UserError: one can't be read; the first by name, and how many there are.
    """
    logits, errors = [], []
    for _, output, error in track(predict_stream(model, paths, views=views), "predicting", len(paths)):
        logits.append(output)
        if error:
            errors.append(error)
        elif not np.isfinite(output).all():
            raise UserError(f"{model.path}: {NO_NUMBER}")
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}; mend or remove it: results on a part of the split would mislead")
    return np.stack(logits)


def image_sources(paths: Iterable[Source], recursive: bool = False) -> Iterator[Source]:
    """Folders become their images, by name, then, where `recursive`, those of the folders below; the rest stays.

    A folder without images comes as itself, to be told of as a file that can't be read. Memory: one folder's names.
    """
    for path in paths:
        if isinstance(path, (str, os.PathLike)):
            path = os.fspath(path)
            inside = _images_in(path, recursive) if os.path.isdir(path) else iter(())
            yield next(inside, path)
            yield from inside
        else:
            yield path


def check_folder(folder: str | Path, recursive: bool = False) -> None:
    """See that there is something to predict.

    Raises:
        UserError: the folder has no image in it, or can't be read.
    """
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({error.strerror})") from None
    if next(_images_in(os.fspath(folder), recursive), None) is None:
        deeper = "" if recursive else "; --recursive looks into the folders below it"
        raise UserError(f"{folder}: no image in it (looked for {' '.join(EXTENSIONS)}){deeper}")


def _images_in(folder: str, recursive: bool, above: frozenset[str] = frozenset()) -> Iterator[str]:
    images, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name) or not (recursive or may_be_image(entry.name)):
                    continue
                if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                    folders.append(entry.name)
                elif is_image_file(entry.path):
                    images.append(entry.name)
    except OSError:
        yield folder  # told of as a file that can't be read
        return
    for name in sorted(images):
        yield os.path.join(folder, name)
    above |= {os.path.realpath(folder)}
    for name in sorted(folders) if recursive else ():
        below = os.path.join(folder, name)
        if os.path.realpath(below) not in above:  # a link to a folder above never ends
            yield from _images_in(below, recursive, above)
