"""Prediction in several processes: each predicts every n-th batch, and the first writes them all in order.

Batches are those of one process, so that what is written is too. It grows as it goes, on the first process's machine;
after an interruption, any number of processes can go on with it.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice

from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.stream import Batch, Source, predict_batches
from xray_fastai.inference.tta import Views
from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError

ROUNDS = 256
"""Batches of each process whose names are handed out at once; between two such blocks nothing is decoded ahead."""


def predict_sharded(
    model: Model,
    sources: Iterator[Source],
    batch_size: int,
    views: Views | None = None,
    *,
    pictures: bool,  # whether the batches that come back need their images
) -> Iterator[Batch]:
    """As `inference.predict_batches`, in the first process, of what all of them predict."""
    if distributed.world_size() == 1:
        yield from predict_batches(model, sources, batch_size, views)
        return
    distributed.share((model.path, model.settings, model.precision))
    distributed.share((batch_size, views, pictures))
    yield from _in_turns(model, iter(sources), batch_size, views, pictures)


def follow(device: str) -> None:
    """The part of a process that is not the first."""
    path, settings, precision = distributed.share()
    model = open_model(path, device, precision)
    if model.settings != settings:
        raise UserError(f"{path}: on this machine not the export that it is on the first; give all the same")
    for _ in _in_turns(model, iter(()), *distributed.share()):
        pass


def _in_turns(
    model: Model, sources: Iterator[Source], batch_size: int, views: Views | None, pictures: bool
) -> Iterator[Batch]:
    import torch.distributed as dist

    world, first = distributed.world_size(), distributed.rank() == 0
    while names := distributed.share(list(islice(sources, ROUNDS * world * batch_size)) if first else None):
        chunks = [names[i : i + batch_size] for i in range(0, len(names), batch_size)]
        own = chain.from_iterable(chunks[distributed.rank() :: world])
        with closing(predict_batches(model, own, batch_size, views)) as batches:
            for _ in range(0, len(chunks), world):
                batch = next(batches, None)  # None: no chunk is left for this process
                if batch is not None and not pictures:
                    batch = replace(batch, images=batch.images[:0].clone())
                turn = [None] * world if first else None
                dist.gather_object(batch, turn)
                yield from (batch for batch in turn or () if batch is not None)
