"""The frozen backbone's pooled features, computed once, so that an epoch of the frozen phase trains the head alone.

A frozen backbone gives the same features for the same pixels in each epoch. So each validation image goes through it
once, and each training image once for each of a few augmented views, which the epochs take in turn: epoch e sees view
e % V. Without augmentation there is one view, and history and weights are those of a backbone that runs every epoch,
but for the rounding of batch norm that is folded into the convolutions and of batches put together otherwise.

How many views? On real images the best validation loss of a frozen phase hardly depends on it (ResNet18 at
64 px pretrained on the phantom, 40 epochs; mean and standard deviation over draws of the views):

    views                          1                2                4                8    40, a new one each epoch
    1,080 images   0.4222 +- 0.0034 0.4255 +- 0.0041 0.4245 +- 0.0014 0.4255 +- 0.0013           0.4268 +- 0.0029
      200 images   0.5221 +- 0.0024 0.5215 +- 0.0013 0.5219 +- 0.0017 0.5219 +- 0.0009           0.5217 +- 0.0003

while the time is that of as many passes. So the default is two: the augmentation is seen, at a fraction of its cost.

With `DistributedDataParallel` (more than one process) the backbone runs every epoch: each process would need the
features of all images.
"""

import math
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from fastai.vision.all import Callback, CancelFitException, DataLoader, DataLoaders, Learner, TfmdDL, set_seed
from torch import nn
from torch.fx.experimental.optimization import fuse

from xray_fastai.system.errors import UserError
from xray_fastai.system.progress import track
from xray_fastai.training.callbacks import StopOnSignal
from xray_fastai.training.checkpoint import check_space
from xray_fastai.training.plan import Plan
from xray_fastai.training.state import random_states, set_random_states

IN_MEMORY = 2**30
"""Bytes of features, of training or of validation images, from which on they go to a memory-mapped file: 2**30 are
131,000 images in four views of 2048 bfloat16 numbers."""


class HeadAlone(nn.Sequential):
    "Backbone and head under their usual names, of which the head alone runs: its input is what the backbone gave."

    def forward(self, x):
        return self[1](x)


class FeatureLoader(DataLoader):
    "Features and classes in the batches, and in the order, that a loader of images would give."

    def __init__(
        self,
        features: torch.Tensor,  # (views, images, channels)
        targets: torch.Tensor,  # (images,)
        images: TfmdDL,  # whose batches are meant
    ):
        super().__init__(range(len(targets)), bs=images.bs, shuffle=images.shuffle, drop_last=images.drop_last)
        self.features, self.targets, self.view = features, targets, 0
        self.rng = images.rng

    def do_batch(self, items: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.tensor(items, device=self.features.device)
        return self.features[self.view, at, :, None, None], self.targets[at]  # (B, channels, 1, 1), (B,)


class NextView(Callback):
    "Have each epoch train on the next of the views."

    def before_train(self):
        self.dl.view = self.epoch % len(self.dl.features)


def views(plan: Plan, epochs: int) -> int:
    """Views of a training image that are computed ahead of a frozen phase of `epochs`; 0: the backbone runs in each."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return 0
    return min(plan.config.frozen_views, 1 if plan.config.augment == "none" else epochs)


@contextmanager
def instead_of_images(
    learn: Learner, plan: Plan, count: int, folder: Path, stop: StopOnSignal
) -> Iterator[list[Callback]]:
    """Within this context, `learn` trains and validates on features; its network, seen from outside, stays the same.

    The features depend on the seed and on the images at once, not on what was drawn before, and change no random
    state: a fit that goes on from a checkpoint computes the same anew.

    Args:
        learn: frozen.
        plan: what is trained.
        count: views of each training image.
        folder: for features that are too many to be kept in memory.
        stop: asked after each batch.

    Yields:
        Callbacks that the fit needs.

    Raises:
        CancelFitException: it was stopped.
        UserError: too little space on the disk.
    """
    model, images = learn.model, learn.dls
    train, valid = images.loaders
    print(
        f"\nfeatures of {train.n:,} training images{f', {count} views each,' if count > 1 else ''} "
        f"and of {valid.n:,} validation images",
        flush=True,
    )
    start = time.perf_counter()
    random = random_states(learn)
    loaders = []
    try:
        set_seed(plan.config.seed)
        network = pooling(model.to(plan.device))
        for loader, each in ((train, count), (valid, 1)):
            learn.training = loader is train  # whose batch is halved, where memory is short
            features, targets = _compute(network, loader, each, plan, folder, stop)
            loaders.append(FeatureLoader(features, targets, loader))
        del network
    finally:
        set_random_states(learn, random)
    seconds = round(time.perf_counter() - start)
    size = sum(loader.features.nbytes for loader in loaders)
    print(f"computed in {seconds // 60}:{seconds % 60:02}, {size / 1e6:,.0f} MB; epochs now train the head on them")
    learn.dls = DataLoaders(*loaders, path=images.path, device=plan.device)
    learn.model = HeadAlone(*model)
    try:
        yield [NextView()]
    finally:
        learn.model, learn.dls = model, images
        for loader, own in zip(loaders, images.loaders, strict=True):
            own.rng = loader.rng


def pooling(model: nn.Sequential) -> nn.Module:
    """Backbone and pooling of a network, to be evaluated only, batch norm folded into the convolutions: images
    (B, 3, H, W) become features (B, channels).

    Folding made a pass of ResNet50 1.08 to 1.24 times faster in bfloat16 (128 and 224 px, one core), of ResNet18 1.2 to
    1.5 times; features in float32 then differ by 1e-6 of their norm at most.
    """
    body = fuse(model[0].eval()).to(memory_format=torch.channels_last)  # a copy
    return nn.Sequential(body, model[1][0], nn.Flatten())


def _compute(
    network: nn.Module, images: TfmdDL, count: int, plan: Plan, folder: Path, stop: StopOnSignal
) -> tuple[torch.Tensor, torch.Tensor]:
    """The features (count, images, channels), as the head gets them, and classes (images,) of a loader's images."""
    images.before_iter()  # tells the augmentation whether it is for training
    files = images.new(shuffle=False, drop_last=False, after_batch=[])  # read once for all views
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    autocast = torch.autocast(plan.device.type, types[plan.precision], enabled=plan.precision != "fp32")
    features, targets, at = None, [], 0
    for batch in track(files, "features", len(files)):
        targets.append(batch[1].as_subclass(torch.Tensor))
        for view in range(count):
            x = images.after_batch(batch)[0].as_subclass(torch.Tensor)  # (B, 3, S, S)
            with torch.inference_mode(), autocast:
                found = network(x.contiguous(memory_format=torch.channels_last))  # (B, channels)
            if features is None:
                features = _room((count, images.n, found.shape[1]), found.dtype, plan.device, folder, network)
            features[view, at : at + len(found)] = found
            if stop.received is not None:
                raise CancelFitException
        at += len(found)
    return features, torch.cat(targets)


def _room(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path, model: nn.Module
) -> torch.Tensor:
    """An empty tensor: on the device, or of a file that has no name, so that nothing is left of it after a crash."""
    size = math.prod(shape) * dtype.itemsize
    if size <= IN_MEMORY:
        return torch.empty(shape, dtype=dtype, device=device)
    check_space(folder, model, size)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(shape)
    except OSError as error:
        raise UserError(
            f"{folder}: the features of the images could not be kept there ({error.strerror}); "
            "free space, or give another folder by --exports"
        ) from None
