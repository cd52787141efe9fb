"""The cache of decoded images: the same fit with fewer decodings; a stale, damaged, shared or missing cache."""

import copy
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.conftest import QUICK
from xray_fastai.data import pixel_cache
from xray_fastai.data.images import open_image
from xray_fastai.data.pixel_cache import PixelCache
from xray_fastai.model import transforms


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded, once for each decoding."""
    sources = []

    def counted(source, size):
        if isinstance(source, str):
            sources.append(source)
        return open_image(source, size)

    monkeypatch.setattr(transforms, "open_image", counted)
    return sources


@pytest.fixture
def fit(run, collection, decoded):
    """Fit two epochs of two batches; what was printed, the history, and how many files were decoded."""

    def fit(name, *options):
        decoded.clear()
        args = ["--weights", "none", "--epochs", 2, "--batch-size", 18, "--name", name]
        result = run("fit", "--data", collection, *QUICK, *args, *options)
        assert result.exit_code == 0, result.output
        return result.output, (Path("exports") / name / "history.csv").read_text(), len(decoded)

    return fit


@pytest.mark.slow
def test_a_file_is_decoded_once_and_the_fit_is_the_same(fit, run, collection):
    images = sum(1 for _ in collection.glob("tra*/*/*")) + sum(1 for _ in collection.glob("val/*/*"))
    _, plain, often = fit("plain", "--no-cache")
    assert often > images and not pixel_cache.cache_files()

    output, first, once = fit("first")
    (file,) = pixel_cache.cache_files()
    assert f"{file}, " in output.replace("\n", "") and first == plain and once <= images
    _, second, none = fit("second")
    assert second == plain and none == 0
    for export in ("first", "second"):
        assert b".pixels" not in (Path("exports") / export / "learner.pkl").read_bytes()

    content = bytearray(file.read_bytes())
    content[4 * images + 5 * 32 * 32] ^= 255  # a pixel of the sixth image
    file.write_bytes(content)
    _, mended, one = fit("mended")
    assert mended == plain and one == 1

    for changed in (collection / "train" / "NORMAL").iterdir():  # all: bf16 may not tell one that validates
        Image.open(changed).rotate(180).save(changed, quality=95)
    _, other, all_again = fit("changed")
    assert other != plain and all_again == once
    (new,) = pixel_cache.cache_files()
    assert new != file

    result = run("data", "cache")
    assert result.exit_code == 0 and "in 1 file\n" in result.output and str(new.parent) in result.output
    assert "deleted" in run("data", "cache", "--clear").output and not pixel_cache.cache_files()


def test_two_at_once(tmp_path):
    rng, paths = np.random.default_rng(0), [str(tmp_path / f"{i}.png") for i in range(50)]
    images = dict(zip(paths, rng.integers(0, 256, (50, 32, 32), dtype=np.uint8), strict=True))
    for path, image in images.items():
        Image.fromarray(image).save(path)
    with ThreadPoolExecutor(8) as pool:
        caches = list(pool.map(lambda _: PixelCache(paths, 32), range(8)))
        assert len({cache.path for cache in caches}) == 1 and len(pixel_cache.cache_files()) == 1

        def use(cache):
            for path in rng.permutation(paths):
                found = cache.get(path)
                assert found is None or np.array_equal(found, images[path])
                cache.put(path, images[path])

        list(pool.map(use, caches))
    assert all(np.array_equal(PixelCache(paths[::-1], 32).get(path), image) for path, image in images.items())
    assert PixelCache(paths, 32).get(str(tmp_path / "another.png")) is None


@pytest.mark.slow
def test_where_no_cache_can_be(fit, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        output, history, _ = fit("full")
    assert "No space left on device" in output and not pixel_cache.cache_files()
    with monkeypatch.context() as patched:
        patched.setattr(pixel_cache, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=60_000)))
        output, _, _ = fit("scarce")
    assert "more than half of the free space" in output and not pixel_cache.cache_files()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    output, same, _ = fit("nowhere")
    assert "none: " in output and same == history


def test_files_unused_for_long_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(pixel_cache, "UNUSED_DAYS", 0)
    path = tmp_path / "an.png"
    Image.new("L", (32, 32)).save(path)
    small, large = (PixelCache([str(path)], size) for size in (32, 64))
    assert pixel_cache.cache_files() == [large.path] != [small.path]


def test_another_process_opens_the_file_again(collection):
    paths = [str(path) for path in collection.glob("train/*/*")]
    cache = PixelCache(paths, 32)
    image = np.asarray(open_image(paths[0], 32))
    cache.put(paths[0], image)
    assert (copy.copy(cache).get(paths[0]) == image).all()  # as it comes to another process
    pixel_cache.clear()
    with pytest.raises(FileNotFoundError):
        copy.copy(cache)
    assert (cache.get(paths[0]) == image).all()  # the file stays open
