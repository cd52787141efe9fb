"""Chooses what a fit needs before it trains: device, precision, pretrained weights, class weights, phases."""

from dataclasses import dataclass

import torch
from fastai.vision.all import Learner, ProgressCallback, set_seed

from xray_fastai.config import FitConfig
from xray_fastai.data.dataset import Collection
from xray_fastai.data.pixel_cache import PixelCache
from xray_fastai.model.learner import build_learner, class_weight_values, settle_batch_norm
from xray_fastai.model.loaders import default_workers, make_loaders
from xray_fastai.model.pretrained import pretrained_state
from xray_fastai.system import distributed
from xray_fastai.system.device import choose_device, choose_precision, describe
from xray_fastai.system.files import CACHE_ADVICE
from xray_fastai.system.parallel import check_main_guard


@dataclass(frozen=True)
class Origin:
    """Says where the weights came from that training starts with."""

    name: str  # for people
    pretrained: bool  # False: random weights, trained from scratch


@dataclass(frozen=True)
class Plan:
    """Holds what does not change during a fit."""

    config: FitConfig  # with every choice made
    data: Collection
    device: torch.device
    device_name: str
    precision: str
    origin: Origin
    pretrained: tuple[dict, str] | None  # tensors and their name; None also where a checkpoint has the weights
    class_weights: list[float] | None
    phases: list[tuple[str, int]]  # name, max epochs
    cache: PixelCache | None  # of decoded images
    cache_note: str  # where it is, or why there is none
    batch_size: int

    def learner(self, batches: dict[str, int]) -> Learner:
        """Build a learner, each time the same one.

        Args:
            batches: images in a batch of "train" and of "valid".
        """
        config, classes = self.config, self.data.classes
        set_seed(config.seed, reproducible=self.device.type == "cpu")
        dls = make_loaders(
            self.data.table, classes, config.size, batches["train"], self.device, config.workers, batches["valid"],
            augment=config.augment, contrast=config.contrast, cache=self.cache,
        )  # fmt: skip
        learn = build_learner(
            dls, config.arch, dropout=config.dropout, class_weights=self.class_weights, pretrained=self.pretrained
        )
        settle_batch_norm(learn.model, max(1, len(self.data.train) // self.batch_size))
        learn.remove_cb(ProgressCallback)  # `EpochLog` shows the progress
        learn.freeze()
        return learn


def make_plan(config: FitConfig, data: Collection, origin: Origin | None = None) -> Plan:
    """Make every choice that `config` leaves open, and read the pretrained weights.

    Args:
        config: as `read_collection` returned it.
        data: the images.
        origin: the origin of the weights in a checkpoint; None reads pretrained weights, or starts from scratch.

    Raises:
        UserError: the device, the precision or the weights are not available, several processes cannot share a batch
            evenly, or a sensitivity is to be reached with more than two classes.
    """
    config.check_target_sensitivity(data.classes)
    device, processes = choose_device(config.device), distributed.world_size()
    precision = choose_precision(config.precision, device)
    pretrained = None
    if origin is None and config.weights != "none":
        pretrained = pretrained_state(config.arch, config.weights)
    if origin is None:
        origin = Origin("none: from scratch" if pretrained is None else pretrained[1], pretrained is not None)
    phases = [("frozen", config.freeze_epochs), ("unfrozen", config.epochs)]
    cache, note = _pixel_cache(config, data)
    config = config.with_choices(workers=default_workers(device) if cache is None else 0)
    if config.workers and cache is None:
        check_main_guard()
    return Plan(
        config=config,
        data=data,
        cache=cache,
        cache_note=note,
        device=device,
        device_name=describe(device) + (f", {processes} processes" if processes > 1 else ""),
        precision=precision,
        origin=origin,
        pretrained=pretrained,
        class_weights=class_weight_values(config, data.train.label, data.classes),
        phases=phases if config.freeze_epochs and (origin.pretrained or data.rehearsal) else phases[1:],
        batch_size=distributed.batch_size(config.batch_size, len(data.train)),
    )


def _pixel_cache(config: FitConfig, data: Collection) -> tuple[PixelCache | None, str]:
    """Return the cache of decoded images and a line about it; None and the reason if there is no cache."""
    if not config.cache:
        return None, "none: each image is decoded in each epoch"
    try:
        cache = PixelCache(list(data.table.path), config.size)
    except OSError as error:
        path = error.filename or "the cache folder"
        return None, f"none: {path}: {error.strerror}; {CACHE_ADVICE}"
    return cache, str(cache)
