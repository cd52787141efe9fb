"""Loads whole batches from the array of decoded images that `data.pixel_cache` keeps.

A batch is one indexing of that array. Each image is opened once in a fit, when it is first needed: in threads, because
Pillow releases Python's lock. Opening reads it from the cache, whose checksum is compared, or decodes the file.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from fastai.vision.all import Datasets, TensorCategory, TensorImageBW, TfmdDL, ToTensor

from xray_fastai.data.pixel_cache import PixelCache
from xray_fastai.model.transforms import OpenXray
from xray_fastai.system.distributed import local_world_size

GPU_SHARE = 16
"""A GPU keeps the images if they need at most one part in so many of its free memory.

5,232 images of 224 px are 263 MB, so a GPU with 4.2 GB free keeps them. The rest is for the network: torch then has
94 % of what it would have without the images.
"""


def cores() -> int:
    """Return the number of cores for each of the processes that share this machine."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // local_world_size())


def fits_on(device: torch.device, size: int) -> bool:
    """Return whether a device should keep `size` bytes of images: it is a GPU with enough free memory (`GPU_SHARE`)."""
    return device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // GPU_SHARE


def batches_ahead(device: torch.device) -> int:
    """Return the number of next batches whose images are opened while the device computes.

    On a CPU it is none: there, threads that open images would take the cores from the network.
    """
    return 0 if device.type == "cpu" else 2


class DecodedImages:
    """Gives batches of decoded images on a device, and opens each image before its first use."""

    def __init__(self, cache: PixelCache, device: torch.device):
        self.cache, self.device = cache, device
        self.opener = OpenXray(cache.size, cache)
        self.ready = np.zeros(len(cache.paths), bool)  # which images were opened in this fit
        self.mapped = torch.from_numpy(cache.pixels)[:, None]  # (N, 1, S, S), the cache's file
        self.kept = None  # (N, 1, S, S), a copy on the GPU
        if fits_on(device, self.mapped.nbytes):
            self.kept = torch.empty(self.mapped.shape, dtype=self.mapped.dtype, device=device)

    def opened(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield batches when their images are ready.

        Args:
            batches: rows (B,) of the array, and classes (B,).

        Raises:
            ImageError: a file cannot be read.
        """
        ahead = batches_ahead(self.device)
        waiting: deque[tuple[tuple[torch.Tensor, ...], dict[int, Future]]] = deque()
        pool = ThreadPoolExecutor(cores(), thread_name_prefix="decode")  # starts a thread when it gets work
        try:
            for batch in batches:
                new = [row for row in batch[0].tolist() if not self.ready[row]]
                waiting.append((batch, {row: pool.submit(self.opener.cached, self.cache.paths[row]) for row in new}))
                if len(waiting) > ahead:
                    yield self._finished(*waiting.popleft())
            while waiting:
                yield self._finished(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _finished(self, batch: tuple[torch.Tensor, ...], new: dict[int, Future]) -> tuple[torch.Tensor, ...]:
        for future in new.values():
            future.result()
        if new and self.kept is not None:
            rows = torch.tensor(list(new))
            self.kept[self.moved(rows)] = self.moved(self.mapped[rows])
        self.ready[list(new)] = True
        return batch

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the images (B, 1, S, S) of rows (B,) on the device; they must be ready."""
        return self.moved(self.mapped[rows]) if self.kept is None else self.kept[self.moved(rows)]

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the device; from pinned memory, a GPU copies it while it computes."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


class DecodedLoader(TfmdDL):
    """Gives the same batches as fastai's `TfmdDL` for the same files, but gathers them from `DecodedImages`.

    A loader made from it for other data (`test_dl`, `new_empty`) is a `TfmdDL`.
    """

    def __init__(
        self,
        dataset: Datasets,  # of a table with the columns `path` and `label`
        *args,
        images: DecodedImages,
        **kwargs,  # of `TfmdDL`
    ):
        super().__init__(dataset, *args, **kwargs)
        self.images = images
        table, numbers = dataset.items, dataset.vocab.o2i
        self.rows = torch.tensor([images.cache.rows[os.path.abspath(path)] for path in table["path"]])  # (n,)
        self.classes = torch.tensor([numbers[label] for label in table["label"]])  # (n,)

    def create_batches(self, samps):
        if any(type(tfm) is not ToTensor for tfm in self.after_item.fs):  # a user added one, for single images
            return super().create_batches(samps)
        return self._gathered(samps)

    def _gathered(self, samps: Iterable[int]) -> Iterator[tuple[TensorImageBW, TensorCategory]]:
        numbers = map(torch.tensor, self.chunkify(samps))
        for rows, classes in self.images.opened((self.rows[at], self.classes[at]) for at in numbers):
            yield TensorImageBW(self.images[rows]), TensorCategory(self.images.moved(classes))

    def new(self, dataset=None, cls=None, **kwargs):
        if dataset is None:
            kwargs = {"images": self.images} | kwargs
        return super().new(dataset, cls or (type(self) if "images" in kwargs else TfmdDL), **kwargs)
