"""Chooses what a fit needs before it trains: device, precision, pretrained weights, class weights, phases."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from fastai.vision.all import set_seed

from xray_fastai.config.choices import FIND
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.dataset import Collection, with_data_defaults
from xray_fastai.data.pixel_cache import PixelCache
from xray_fastai.model.architectures import described
from xray_fastai.model.augmentation import augmentation_values
from xray_fastai.model.learner import build_learner, class_weight_values, settle_batch_norm
from xray_fastai.model.loaders import XrayDataLoaders, default_workers, make_loaders
from xray_fastai.model.pretrained import pretrained_state
from xray_fastai.model.xray_learner import XrayLearner
from xray_fastai.system import distributed
from xray_fastai.system.device import choose_device, choose_precision, describe
from xray_fastai.system.files import CACHE_ADVICE
from xray_fastai.system.parallel import check_main_guard
from xray_fastai.training.origin import Origin, parent_of


@dataclass(frozen=True)
class Plan:
    """Holds what does not change during a fit."""

    config: FitConfig  # with every choice made
    data: Collection
    device: torch.device
    device_name: str
    precision: str
    origin: Origin
    pretrained: dict[str, torch.Tensor] | None  # tensors of the backbone; None also where a checkpoint has the weights
    # tensors of the export to continue from, those of each of its networks; None as above
    start: list[dict[str, torch.Tensor]] | None
    class_weights: list[float] | None
    phases: list[tuple[str, int]]  # name, max epochs
    cache: PixelCache | None  # of decoded images
    cache_note: str  # where it is, or why there is none
    batch_size: int
    members: int = 1  # networks that are joined to one

    def of_member(self, member: int, time_limit: float | None = None) -> "Plan":
        """Return the plan of one network of an ensemble, with its own images and its own seed.

        Args:
            member: its number, from 0 on.
            time_limit: seconds that it may take.
        """
        config = replace(
            self.config,
            members=1,
            seed=(self.config.seed + member) % 2**32,
            time_limit=None if time_limit is None else f"{time_limit:.3f}",
        )
        start = None if self.start is None else [self.start[member % len(self.start)]]
        return replace(self, config=config, data=self.data.of_member(member), start=start, members=1)

    @property
    def lr(self) -> float:
        """The peak learning rate of the head; the default where the rate is searched."""
        if self.config.lr != FIND:
            return self.config.lr
        return with_data_defaults(replace(self.config, lr=None)).lr

    @property
    def frozen_plain(self) -> bool:
        """Whether the frozen phase trains on the images as they are."""
        return self.config.frozen_views == 1

    def dataloaders(self, batches: dict[str, int] | None = None) -> XrayDataLoaders:
        """Build the loaders, each time the same ones, after setting all seeds.

        Args:
            batches: images in a batch of "train" and of "valid"; None takes `batch_size` for both.
        """
        config, batches = self.config, batches or {"train": self.batch_size, "valid": self.batch_size}
        set_seed(config.seed, reproducible=self.device.type == "cpu")
        dls = make_loaders(
            self.data.table, self.data.classes, config.size, batches["train"], self.device, config.workers,
            batches["valid"], augment=config.augment, contrast=config.contrast, cache=self.cache,
        )  # fmt: skip
        dls.plan = self
        return dls

    def learner(self, dls: XrayDataLoaders) -> XrayLearner:
        """Build a learner with its backbone frozen; directly after `dataloaders`, each time the same one."""
        config = self.config
        learn = build_learner(
            dls, config.arch, dropout=config.dropout, class_weights=self.class_weights, pretrained=self.pretrained,
            start=self.start and self.start[0], size=config.size, members=self.members,
        )  # fmt: skip
        settle_batch_norm(learn.model, max(1, len(self.data.train) // self.batch_size))
        learn.freeze()
        return learn

    def record(self) -> dict[str, Any]:
        """Return what `model.json` holds of the network, its input and its settings."""
        config, data = self.config, self.data
        return {
            "architecture": config.arch,
            "backbone": described(config.arch, config.size),
            "classes": data.classes,
            "positive": data.positive,
            "dropout": config.dropout,
            "class_weights": self.class_weights,
            "preprocessing": {
                "size": config.size,
                "channels": "grey",
                "resize": "whole image, bilinear",
                "contrast": config.contrast,
                "scale": "imagenet",
            },
            "augmentation": augmentation_values(config.augment),
            "settings": config.to_dict(),
            "lineage": self.origin.lineage,
        } | ({"members": self.members} if self.members > 1 else {})


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
    pretrained = start = None
    if origin is None and (parent := parent_of(config)) is not None:
        start, origin = parent.weights(data.classes), parent.origin(data.classes)
    elif origin is None and config.weights != "none":
        pretrained, name = pretrained_state(config.arch, config.weights, config.weights_range)
        origin = Origin(name, pretrained=True)
    elif origin is None:
        origin = Origin("none: from scratch", pretrained=False)
    fewest = min(len(data.of_member(member).train) for member in range(config.members))
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
        start=start,
        class_weights=class_weight_values(config, data.train.label, data.classes),
        phases=phases if config.freeze_epochs and (origin.pretrained or data.rehearsal) else phases[1:],
        batch_size=distributed.batch_size(config.batch_size, fewest),
        members=config.members,
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
