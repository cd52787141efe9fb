"""What a fit settles before it trains: device, precision, pretrained weights, class weights, phases."""

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


@dataclass(frozen=True)
class Plan:
    """The fixed facts of a fit."""

    config: FitConfig  # nothing in it is left to choose
    data: Collection
    device: torch.device
    device_name: str
    precision: str
    origin: str  # of the weights that training starts from, for people
    pretrained: tuple[dict, str] | None  # None also where a checkpoint has the weights
    class_weights: list[float] | None
    phases: list[tuple[str, int]]  # name, epochs at most
    cache: PixelCache | None  # of decoded images
    cache_note: str  # where it is, or why there is none
    batch_size: int
    parameters: tuple[int, int] = (0, 0)  # all, and those that train in the frozen phase

    @property
    def fine_tunes(self) -> bool:
        """Whether training starts from pretrained weights."""
        return self.origin != FROM_SCRATCH

    def learner(self, batches: dict[str, int]) -> Learner:
        """A new learner, the same each time; `batches` are the images at once in "train" and "valid"."""

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


FROM_SCRATCH = "none: from scratch"


def make_plan(config: FitConfig, data: Collection, origin: str | None = None) -> Plan:
    """Settle all that `config` left open, and read the pretrained weights.

    Args:
        config: as `read_collection` gave it back.
        data: the images.
        origin: of the weights in a checkpoint, in place of reading pretrained ones.

    Raises:
        UserError: a device, precision or weights that are not to be had here, or a batch that several processes can't
            share.
    """

    device, processes = choose_device(config.device), distributed.world_size()
    precision = choose_precision(config.precision, device)
    config = config.with_choices(workers=default_workers(device))
    pretrained = None
    if origin is None and config.weights != "none":
        pretrained = pretrained_state(config.arch, config.weights)
    if origin is None:
        origin = FROM_SCRATCH if pretrained is None else pretrained[1]
    phases = [("frozen", config.freeze_epochs), ("unfrozen", config.epochs)]
    cache, note = _pixel_cache(config, data)
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
        phases=phases[1:] if origin == FROM_SCRATCH or config.freeze_epochs == 0 else phases,
        batch_size=distributed.batch_size(config.batch_size, len(data.train)),
    )


def _pixel_cache(config: FitConfig, data: Collection) -> tuple[PixelCache | None, str]:
    """The cache for the images of a fit, and what to say of it."""

    if not config.cache:
        return None, "none: each image is decoded in each epoch"
    try:
        cache = PixelCache(list(data.table.path), config.size)
    except OSError as error:
        return None, f"none: {error.filename or 'the cache folder'}: {error.strerror}; XDG_CACHE_HOME names another"
    return cache, str(cache)
