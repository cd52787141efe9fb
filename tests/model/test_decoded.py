"""Batches from the array of decoded images: the same as fastai's own, on any device, and each file is opened once."""

import random
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import ProgressCallback, TensorImageBW, TfmdDL, Transform, load_learner
from PIL import Image

from xray_fastai.data.pixel_cache import PixelCache
from xray_fastai.model import decoded, transforms
from xray_fastai.model.decoded import DecodedLoader
from xray_fastai.model.learner import build_learner
from xray_fastai.model.loaders import EmptyLoader, make_loaders
from xray_fastai.system import parallel
from xray_fastai.system.errors import ImageError

CLASSES, CPU = ["NORMAL", "PNEUMONIA"], torch.device("cpu")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Twenty-three files of noise, nine of them for validation, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng, rows = np.random.default_rng(0), []
    for i in range(23):
        path = tmp_path / f"{rng.integers(1000)}-{i}.png"  # the cache sorts by name, the table does not
        Image.fromarray(rng.integers(0, 256, (40, 36), dtype=np.uint8)).save(path)
        rows.append((str(path), CLASSES[i % 3 == 0], i >= 14))
    return pd.DataFrame(rows, columns=["path", "label", "is_valid"])


def loaders_of(table, cached: bool, device: torch.device = CPU):
    cache = PixelCache(list(table.path), 32) if cached else None
    random.seed(0)
    return make_loaders(
        table, CLASSES, 32, 5, device, 0, 4, augment="strong", contrast="equalize", cache=cache
    )  # fmt: skip


def epochs(loaders, count: int = 2) -> list[tuple]:
    """Return all batches of some epochs, training and validation in turn."""
    torch.manual_seed(0)
    return [batch for _ in range(count) for loader in loaders.loaders for batch in loader]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for tensor, expected in zip(batch, other, strict=True):
            assert type(tensor) is type(expected) and torch.equal(tensor, expected)


@pytest.mark.parametrize("kept", [False, True], ids=["mapped", "kept on the device"])
@pytest.mark.parametrize("ahead", [0, 2])
def test_batches_are_those_of_fastais_loader(table, monkeypatch, kept, ahead):
    monkeypatch.setattr(decoded, "GROUP", 2)
    monkeypatch.setattr(decoded, "fits_on", lambda device, size: kept)
    monkeypatch.setattr(decoded, "batches_ahead", lambda device: ahead)
    plain, gathered = loaders_of(table, False), loaders_of(table, True)
    assert [type(loader) for loader in gathered.loaders] == [DecodedLoader] * 2
    assert [type(loader) for loader in plain.loaders] == [TfmdDL] * 2
    assert_same(epochs(gathered), epochs(plain))
    assert (gathered.train.images.kept is not None) == kept


def test_each_file_is_opened_once_and_a_damaged_image_is_decoded_again(table, monkeypatch):
    sources, open_image = [], transforms.open_image
    monkeypatch.setattr(
        transforms, "open_image", lambda source, size: sources.append(source) or open_image(source, size)
    )
    expected = epochs(loaders_of(table, False))
    sources.clear()
    assert_same(epochs(loaders_of(table, True)), expected)
    assert len(sources) == len(set(sources)) >= 20  # an epoch drops the last 4 of 14 training images
    sources.clear()
    assert_same(epochs(loaders_of(table, True)), expected)  # as a second fit
    assert not sources
    cache = PixelCache(list(table.path), 32)
    cache.pixels[cache.paths.index(table.path[20]), 7, 7] ^= 255
    cache.map.flush()
    assert_same(epochs(loaders_of(table, True)), expected)
    assert sources == [table.path[20]]


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_file_that_cannot_be_read_is_named(table, monkeypatch, ahead):
    monkeypatch.setattr(decoded, "batches_ahead", lambda device: ahead)
    loaders = loaders_of(table, True)
    with open(table.path[20], "wb") as file:
        file.write(b"no image")
    with pytest.raises(ImageError, match="not an image") as caught:
        epochs(loaders)
    assert str(caught.value).startswith(table.path[20])


def test_other_images_go_through_fastais_loader(table):
    loaders = loaders_of(table, True)
    test = loaders.test_dl([table.path[0], Image.open(table.path[1])], bs=2)
    assert type(test) is TfmdDL
    assert_same([test.one_batch()], [loaders_of(table, False).test_dl(list(table.path[:2]), bs=2).one_batch()])
    assert [type(loader) for loader in loaders.new_empty().loaders] == [EmptyLoader] * 2
    assert type(loaders.valid.new(shuffle=False, drop_last=False)) is DecodedLoader
    image, label = loaders.train_ds[0]
    assert image.size == (32, 32) and CLASSES[label] == table.label[0]
    images, targets, items = loaders.valid.show_batch(max_n=3, show=False)
    assert images.shape == (4, 3, 32, 32) and targets.shape == (4,) and len(items) == 3


def darker(x: TensorImageBW):
    return x // 2


def all_darker(samples: list):
    return [(image // 2, label) for image, label in samples]


@pytest.mark.parametrize(("event", "function"), [("after_item", darker), ("before_batch", all_darker)])
def test_a_transform_of_single_images_that_a_user_adds_is_used(event, function, table):
    plain, gathered = loaders_of(table, False), loaders_of(table, True)
    for loaders in (plain, gathered):
        loaders.add_tfms([Transform(function)], event)
    assert_same(epochs(gathered), epochs(plain))
    with pytest.raises(AssertionError):
        assert_same(epochs(gathered), epochs(loaders_of(table, True)))


@pytest.mark.slow
def test_fastais_tools_use_the_loaders(table, tmp_path):
    loaders = loaders_of(table, True)
    assert len(loaders.train.show_batch(unique=True, show=False)[0]) == 5  # one image in five places
    learn = build_learner(loaders, "resnet18")
    learn.remove_cb(ProgressCallback)
    assert learn.lr_find(num_it=6, show_plot=False).valley > 0
    assert len(learn.recorder.losses) == 6
    probabilities, targets = learn.get_preds()
    assert probabilities.shape == (9, 2) and torch.equal(targets, loaders.valid.classes)
    learn.export(tmp_path / "learner.pkl")
    assert type(load_learner(tmp_path / "learner.pkl").dls.valid) is EmptyLoader


def test_nothing_is_opened_any_more_when_an_epoch_is_left(table, monkeypatch):
    opened, left = [], threading.Event()
    monkeypatch.setattr(decoded, "batches_ahead", lambda device: 1)
    monkeypatch.setattr(decoded, "cores", lambda: 1)
    monkeypatch.setattr(parallel, "MAX_WAIT", 0.1)
    loader = loaders_of(table, True).train

    def cached(cache, path):
        opened.append(path)
        if len(opened) > 5:  # in the second batch
            left.wait(20)

    monkeypatch.setattr(decoded, "open_cached", cached)
    batches = loader.create_batches(iter(range(14)))
    next(batches)
    batches.close()
    left.set()
    time.sleep(0.2)  # threads that went on would open the others
    assert len(opened) in (5, 6)
