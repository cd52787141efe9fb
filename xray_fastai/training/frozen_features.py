"""Computes the pooled features of the frozen backbone once, so that the frozen phase trains only the head on them.

A frozen backbone gives the same features for the same pixels in each epoch. So each image goes through it once, as it
is. History and weights are the same as with a backbone that runs in every epoch, except for rounding: batch norm is
folded into the convolutions, and batches are composed differently. With `frozen_views` V above 1, each training image
goes through it once for each of V augmented views. The epochs take them in turn: epoch e trains on view e % V.

On random images of the same collection the best validation loss of a frozen phase hardly depends on the number of
views, all augmented (ResNet18 at 64 px pretrained on the drawn X-rays, 40 epochs; mean and standard deviation over
draws of the views):

    views                          1                2                4                8    40, a new one each epoch
    1,080 images   0.4222 +- 0.0034 0.4255 +- 0.0041 0.4245 +- 0.0014 0.4255 +- 0.0013           0.4268 +- 0.0029
      200 images   0.5221 +- 0.0024 0.5215 +- 0.0013 0.5219 +- 0.0017 0.5219 +- 0.0009           0.5217 +- 0.0003

while the time grows with their number. On images unlike the training images, and with ImageNet's weights, views by the
augmentation `strong` were worse than the images as they are (`tests/benchmarks/README.md`, Transfer). So these are the
default.

With several processes the backbone runs in every epoch: each process would need the features of all images.
"""

import math
import mmap
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from fastai.vision.all import Callback, CancelFitException, DataLoader, DataLoaders, Learner, TfmdDL, set_seed
from torch import nn

from xray_fastai.model.folding import fold_batch_norm
from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError
from xray_fastai.system.progress import track
from xray_fastai.training.disk_space import check_space
from xray_fastai.training.plan import Plan
from xray_fastai.training.state import random_states, set_random_states
from xray_fastai.training.stopping import StopOnSignal

IN_MEMORY = 2**30
"""Above this number of bytes, features are kept in a memory-mapped file; 2**30 bytes hold four views of 65,000 images
with 2,048 bfloat16 numbers each."""


class HeadAlone(nn.Sequential):
    "Holds backbone and head under their usual names, and runs only the head; its input is the backbone's output."

    def forward(self, x):
        return self[1](x)


class HeadLearner(Learner):
    """Calls at each event only the callbacks that define it, in fastai's order.

    fastai asks every callback at every event, and each looks for the event in the learner and its network. A step of a
    head (ResNet18's, 16 images, 15 callbacks) took 6.9 ms that way and 4.5 ms this way, on one core.
    """

    asked: tuple[Callback, ...] = ()  # the callbacks that `listeners` was made from
    listeners: dict[str, list[Callback]]  # by event

    def __call__(self, event_name: str | Sequence[str]):
        if not isinstance(event_name, str):  # `validate` and `get_preds` call two events at once
            for name in event_name:
                self(name)
            return
        if self.asked != (callbacks := tuple(self.cbs)):
            self.asked, self.listeners = callbacks, {}
        if event_name not in self.listeners:
            self.listeners[event_name] = [
                callback
                for callback in self.cbs.sorted("order")
                if defines(callback, event_name) or event_name == "after_fit"  # after which fastai runs all again
            ]
        for callback in self.listeners[event_name]:
            callback(event_name)


def defines(callback: Callback, name: str) -> bool:
    """Return whether a callback's class, or the callback itself, has a method for an event."""
    return hasattr(type(callback), name) or name in vars(callback)


class FeatureLoader(DataLoader):
    "Gives features and classes in the batches and the order of a loader of images."

    def __init__(
        self,
        features: torch.Tensor,  # (views, images, channels)
        targets: torch.Tensor,  # (images,)
        images: TfmdDL,  # the loader to imitate
    ):
        super().__init__(range(len(targets)), bs=images.bs, shuffle=images.shuffle, drop_last=images.drop_last)
        self.features, self.targets, self.view = features, targets, 0
        self.rng = images.rng

    def create_batches(self, samps: Iterator[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.tensor(list(samps), device=self.features.device)  # sent to a GPU once an epoch
        for at in order.split(self.bs)[: len(self)]:
            yield self.features[self.view, at, :, None, None], self.targets[at]  # (B, channels, 1, 1), (B,)


class NextView(Callback):
    "Selects the next view for each epoch."

    def before_train(self):
        self.dl.view = self.epoch % len(self.dl.features)


def views(plan: Plan, epochs: int) -> int:
    """Return the number of views to compute before a frozen phase of `epochs`; 0 runs the backbone in every epoch."""
    if distributed.world_size() > 1:
        return 0
    return min(plan.config.frozen_views, 1 if plan.config.augment == "none" else epochs)


@contextmanager
def instead_of_images(
    learn: Learner, plan: Plan, count: int, folder: Path, stop: StopOnSignal
) -> Iterator[list[Callback]]:
    """Let `learn` train and validate on features inside this context; the parameters of its network stay the same.

    The features depend only on the images, the seed and the batch size, and computing them changes no random state. So
    a resumed fit computes the same features again.

    Args:
        learn: frozen.
        plan: the fit.
        count: views of each training image.
        folder: for features that are too large for memory.
        stop: checked after each batch.

    Yields:
        The callbacks to train with.

    Raises:
        CancelFitException: a signal stopped the fit.
        UserError: there is too little space on the disk.
    """
    model, images, plain = learn.model, learn.dls, type(learn)
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
            learn.training = loader is train  # decides which batch is halved if memory runs out
            features, targets = _compute(network, loader, each, plan, folder, stop)
            loaders.append(FeatureLoader(features, targets, loader))
        del network
    finally:
        set_random_states(learn, random)
    seconds = round(time.perf_counter() - start)
    size = sum(loader.features.nbytes for loader in loaders)
    print(f"computed in {seconds // 60}:{seconds % 60:02}, {size / 1e6:,.0f} MB; epochs now train the head on them")
    learn.dls = DataLoaders(*loaders, path=images.path, device=plan.device)
    learn.model, learn.__class__ = HeadAlone(*model), HeadLearner
    try:
        yield [NextView()]
    finally:
        learn.model, learn.dls, learn.__class__ = model, images, plain
        for name in ("asked", "listeners"):
            vars(learn).pop(name, None)
        for loader, own in zip(loaders, images.loaders, strict=True):
            own.rng = loader.rng


def pooling(model: nn.Sequential) -> nn.Module:
    """Return a copy of backbone and pooling for evaluation, with batch norm folded into the convolutions.

    It turns images (B, 3, H, W) into features (B, channels). Folding made ResNet50 1.08 to 1.24 times and ResNet18 1.2
    to 1.5 times faster in bfloat16 (128 and 224 px, one core). In float32 it changes features by at most 1e-6 of their
    norm.
    """
    body = fold_batch_norm(model[0].eval()).to(memory_format=torch.channels_last)  # a copy
    return nn.Sequential(body, model[1][0], nn.Flatten())


def _compute(
    network: nn.Module, images: TfmdDL, count: int, plan: Plan, folder: Path, stop: StopOnSignal
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features (count, images, channels) that the head gets, and the classes (images,)."""
    images.before_iter()  # sets the augmentation to training or validation
    files = images.new(shuffle=False, drop_last=False, after_batch=[])  # read once for all views
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    autocast = torch.autocast(plan.device.type, types[plan.precision], enabled=plan.precision != "fp32")
    features, targets, at = None, [], 0
    for batch in track(files, "features", len(files)):
        targets.append(batch[1].as_subclass(torch.Tensor))
        for view in range(count):
            x = images.after_batch(batch)[0].as_subclass(torch.Tensor)  # (B, 3, S, S)
            with torch.inference_mode(), autocast:
                pooled = network(x.contiguous(memory_format=torch.channels_last))  # (B, channels)
            if features is None:
                features = _allocate((count, images.n, pooled.shape[1]), pooled.dtype, plan.device, folder, network)
            features[view, at : at + len(pooled)] = pooled
            if stop.received is not None:
                raise CancelFitException
        at += len(batch[1])
    return features, torch.cat(targets)


def _allocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path, model: nn.Module
) -> torch.Tensor:
    """Return an empty tensor on the device; a large one in a file without a name, of which a crash leaves nothing."""
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
            f"{folder}: the features of the images could not be written there ({error.strerror}); "
            "free space, or give another folder by exports="
        ) from None
