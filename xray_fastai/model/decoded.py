"""Loads whole batches from the array of decoded images that `data.pixel_cache` keeps.

A batch is one indexing of that array. Each image is opened once in a fit, when it is first needed: in threads, because
Pillow releases Python's lock. Opening reads it from the cache, whose checksum is compared, or decodes the file.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice

import numpy as np
import torch
from fastai.vision.all import Datasets, TensorCategory, TensorImageBW, TfmdDL, ToTensor

from xray_fastai.data.pixel_cache import PixelCache
from xray_fastai.model.transforms import open_cached
from xray_fastai.system.distributed import local_world_size
from xray_fastai.system.parallel import map_in_threads

GPU_SHARE = 16
"""A GPU keeps the images if they need at most one part in so many of its free memory.

5,232 images of 224 px are 263 MB, so a GPU with 4.2 GB free keeps them. The rest is for the network: torch then has
94 % of what it would have without the images.
"""
GROUP = 64
"""Batches within which threads open the images of the next ones; at the end of a group they finish first."""


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
        self.ready = np.zeros(len(cache.paths), bool)  # which images were opened in this fit
        self.kept = None  # (N, 1, S, S), a copy on the GPU
        if fits_on(device, self.mapped.nbytes):
            self.kept = torch.empty(self.mapped.shape, dtype=self.mapped.dtype, device=device)

    @property
    def mapped(self) -> torch.Tensor:
        """The cache's file (N, 1, S, S). A tensor that stays would become a copy when a process is started with it."""
        return torch.from_numpy(self.cache.pixels)[:, None]

    def opened(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield batches when their images are ready.

        Args:
            batches: rows (B,) of the array, and classes (B,).

        Raises:
            ImageError: a file cannot be read.
        """
        batches, ahead = iter(batches), batches_ahead(self.device)
        while group := [*islice(batches, GROUP if ahead else 1)]:
            yield from self._opened(group, max(1, ahead) * len(group[0][0]))

    def _opened(
        self, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], ahead: int
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield batches when their images are ready, while threads open up to `ahead` images beyond."""
        new = [[row for row in dict.fromkeys(rows.tolist()) if not self.ready[row]] for rows, _ in batches]
        paths = (self.cache.paths[row] for row in chain(*new))
        # its threads start with the first image, so there are none where all images are ready
        with closing(map_in_threads(lambda path: open_cached(self.cache, path), paths, cores(), ahead)) as images:
            for batch, rows in zip(batches, new, strict=True):
                for _ in islice(images, len(rows)):
                    pass
                self._keep(rows)
                yield batch

    def _keep(self, rows: list[int]) -> None:
        """Note that the images of these rows were opened, and copy them to a GPU that keeps them."""
        if rows and self.kept is not None:
            at = torch.tensor(rows)
            self.kept[self.moved(at)] = self.moved(self.mapped[at])
        self.ready[rows] = True

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
        # a user added one, for single images or for the list of a batch
        if self.before_batch.fs or any(type(tfm) is not ToTensor for tfm in self.after_item.fs):
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
