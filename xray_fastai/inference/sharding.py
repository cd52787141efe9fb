"""Prediction by several processes: each predicts every n-th batch, and the first process gets all of them in order.

The batches are those that one process would make, so the rows are the same. The first process writes them. After an
interruption any number of processes can continue the file.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice

import torch.distributed as dist

from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.stream import Batch, Source, predict_batches
from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError

ROUNDS = 256
"""Batches of each process whose file names are shared at once. Between two such blocks no image is decoded ahead."""


def predict_sharded(
    model: Model,
    sources: Iterator[Source],
    batch_size: int,
    tta: bool = False,
    *,
    with_images: bool,  # whether the batches need their images; without them less is sent between the processes
) -> Iterator[Batch]:
    """Predict as `predict_batches` does, by all processes; called in the first process."""
    if distributed.world_size() == 1:
        yield from predict_batches(model, sources, batch_size, tta)
        return
    distributed.share((model.path, model.settings, model.precision))
    distributed.share((batch_size, tta, with_images))
    yield from _in_turns(model, iter(sources), batch_size, tta, with_images)


def follow(device: str) -> None:
    """Predict the batches that belong to this process, which is not the first.

    Raises:
        UserError: the export differs from the one that the first process opened.
    """
    path, settings, precision = distributed.share()
    model = open_model(path, device, precision)
    if model.settings != settings:
        raise UserError(f"{path}: differs from the export on the first machine; copy that one to all machines")
    for _ in _in_turns(model, iter(()), *distributed.share()):
        pass


def _in_turns(
    model: Model, sources: Iterator[Source], batch_size: int, tta: bool, with_images: bool
) -> Iterator[Batch]:
    world, first = distributed.world_size(), distributed.rank() == 0
    while names := distributed.share(list(islice(sources, ROUNDS * world * batch_size)) if first else None):
        chunks = [names[i : i + batch_size] for i in range(0, len(names), batch_size)]
        own = chain.from_iterable(chunks[distributed.rank() :: world])
        with closing(predict_batches(model, own, batch_size, tta)) as batches:
            for _ in range(0, len(chunks), world):
                batch = next(batches, None)  # None: no chunk is left for this process
                if batch is not None and not with_images:
                    batch = replace(batch, images=batch.images[:0].clone())
                gathered = [None] * world if first else None
                dist.gather_object(batch, gathered)
                yield from (batch for batch in gathered or () if batch is not None)
