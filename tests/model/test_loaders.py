"""Processes that are started anew and load images, as on Windows, on macOS, and on Linux from Python 3.14 on."""

import multiprocessing

import pytest
import torch

from tests.conftest import draw_collection
from xray_fastai.data.dataset import check_files
from xray_fastai.data.folders import read_split
from xray_fastai.data.pixel_cache import PixelCache
from xray_fastai.model.loaders import make_loaders


def first_sum(train, valid, queue):
    train.one_batch()
    queue.put(valid.one_batch()[0].square().sum().item())


@pytest.mark.slow
def test_a_process_that_is_started_anew_reads_the_same(tmp_path):
    data = draw_collection(tmp_path / "data", {"train/NORMAL": 4, "train/PNEUMONIA": 4})
    table = check_files(read_split(data, "train"))[0]
    table["is_valid"] = table.index % 2 == 0
    cached, plain = (
        make_loaders(
            table, ["NORMAL", "PNEUMONIA"], 32, 2, torch.device("cpu"), 0,
            augment="strong", contrast="equalize", cache=cache,
        )
        for cache in (PixelCache(table.path.tolist(), 32), None)
    )  # fmt: skip
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=first_sum, args=(cached.train, cached.valid, queue))
    process.start()
    process.join(600)
    assert process.exitcode == 0
    expected = plain.valid.one_batch()[0].square().sum().item()
    assert queue.get() == cached.valid.one_batch()[0].square().sum().item() == expected
