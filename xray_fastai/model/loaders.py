"""Builds a fastai `DataBlock` and `DataLoaders` from the table of a collection."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
    ColSplitter,
    DataBlock,
    DataLoaders,
    IntToFloatTensor,
    Normalize,
    TfmdDL,
    TransformBlock,
)
from PIL import Image

from xray_fastai.data.pixel_cache import PixelCache
from xray_fastai.model.augmentation import build_augmentation
from xray_fastai.model.decoded import DecodedImages, DecodedLoader, cores
from xray_fastai.model.preprocessing import MEAN, STD
from xray_fastai.model.transforms import Equalize, OpenXray
from xray_fastai.system.errors import UserError

NO_IMAGES = "an export holds no images; make loaders by learn.dls = xray_fastai.dataloaders(folder, learn)"


class EmptyLoader(TfmdDL):
    """Has the transforms of a loader and no images, as in an export.

    A loader made from it for images (`test_dl`) is a `TfmdDL`.
    """

    def one_batch(self):
        "Raise an error that says how to get images; fastai says that there are no batches."
        raise UserError(NO_IMAGES)

    def new(self, dataset=None, cls=None, **kwargs):
        return super().new(dataset, cls or (type(self) if dataset is None else TfmdDL), **kwargs)


class XrayDataLoaders(DataLoaders):
    "fastai's `DataLoaders`, with labels by folder in `test_dl`, and what a plan knows of the images."

    plan: Any = None  # `training.plan.Plan`, which made the loaders; None where they hold no images

    @property
    def class_weights(self) -> list[float] | None:
        "The weights of the classes in the loss, in the order of `vocab`; None weighs all classes equally."
        return None if self.plan is None else self.plan.class_weights

    def new_empty(self) -> "XrayDataLoaders":
        loaders = [loader.new(loader.dataset.new_empty(), cls=EmptyLoader) for loader in self.loaders]
        return type(self)(*loaders, path=self.path, device=self.device)

    def test_dl(self, test_items, rm_type_tfms=None, with_labels=False, **kwargs):
        """Make a loader of test items with the transforms of validation.

        Args:
            test_items: files, images or arrays; or a data frame with `path`, and with `label` if `with_labels`.
            rm_type_tfms: as in fastai.
            with_labels: load the classes, too; that of a file is the name of its folder.
            **kwargs: of `TfmdDL`, such as `bs`.

        Raises:
            UserError: the folder of a file is none of the classes.
        """
        if with_labels and not isinstance(test_items, pd.DataFrame):
            test_items = labelled_by_folder(test_items, self.vocab)
        return super().test_dl(test_items, rm_type_tfms, with_labels, **kwargs)


def labelled_by_folder(files: Iterable[str | Path], classes: Sequence[str]) -> pd.DataFrame:
    """Return a table with the path and the label of files, each of which is in a folder named as its class.

    Raises:
        UserError: a file is in another folder.
    """
    table = pd.DataFrame({"path": list(map(os.fspath, files))})
    table["label"] = [Path(path).absolute().parent.name for path in table.path]
    for path in table.path[~table.label.isin(list(classes))]:
        known = ", ".join(classes)
        raise UserError(f"its folder is none of the classes {known}; give a data frame with path and label", value=path)
    return table


def xray_block(
    classes: Sequence[str],
    size: int,
    *,
    augment: str = "none",
    contrast: str = "none",
    cache: PixelCache | None = None,
) -> DataBlock:
    """Build the `DataBlock` of a table with columns `path`, `label` and `is_valid`.

    Batches are (B, 1, size, size) until the normalisation by ImageNet's three means makes them (B, 3, size, size).

    Args:
        classes: all classes, in the order of the network's outputs.
        size: side in pixels.
        augment: how training images are varied: none, or a name in `augmentation.AUGMENT`.
        contrast: equalize or none.
        cache: holds decoded images.
    """
    batch_transforms = build_augmentation(augment)
    if contrast == "equalize":
        batch_transforms = [Equalize(), *batch_transforms]
    return DataBlock(
        blocks=(
            TransformBlock(type_tfms=OpenXray(size, cache), batch_tfms=IntToFloatTensor()),
            CategoryBlock(vocab=list(classes), sort=False),
        ),
        get_x=ColReader("path"),
        get_y=ColReader("label"),
        splitter=ColSplitter(),
        batch_tfms=[*batch_transforms, Normalize.from_stats(MEAN, STD, cuda=False)],
        dl_type=None if cache is None else DecodedLoader,
    )


def make_loaders(
    table: pd.DataFrame,
    classes: Sequence[str],
    size: int,
    batch_size: int,
    device: torch.device,
    workers: int,
    valid_batch_size: int | None = None,
    *,
    augment: str = "none",
    contrast: str = "none",
    cache: PixelCache | None = None,
) -> XrayDataLoaders:
    """Build the training loader (shuffled, augmented) and the validation loader of a table as `xray_block` takes it.

    With a cache, batches are gathered from its array of decoded images. Without one, `workers` processes decode them.
    """
    loading = {"num_workers": workers}
    if cache is not None:
        loading = {"num_workers": 0, "images": DecodedImages(cache, device)}
    dls = xray_block(classes, size, augment=augment, contrast=contrast, cache=cache).dataloaders(
        table, bs=batch_size, val_bs=valid_batch_size or batch_size, device=device, path=Path("."), **loading
    )
    return XrayDataLoaders(*dls.loaders, path=dls.path, device=device)


def empty_loaders(classes: Sequence[str], size: int, contrast: str = "none") -> XrayDataLoaders:
    """Build loaders without items, on the CPU: what a learner needs to predict."""
    blank = Image.new("L", (size, size))
    table = pd.DataFrame({"path": [blank, blank], "label": [classes[0]] * 2, "is_valid": [False, True]})
    return make_loaders(table, classes, size, 1, torch.device("cpu"), 0, contrast=contrast).new_empty()


def default_workers(device: torch.device) -> int:
    """Return the default number of loading processes, which decode images where they are not cached.

    A GPU waits for images unless several processes load them. On a CPU, training uses all cores: on 2 cores (ResNet50,
    64 px, bf16) an epoch of 408 training and 102 validation images took 4.4 s without loading processes and 5.5 s with
    two.
    """
    if device.type == "cpu":
        return 0
    return min(16, cores())
