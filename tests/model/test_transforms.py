"""An opened X-ray is shown with black as black, and takes the decoded images along into a loading process only."""

import multiprocessing.context
import pickle

import numpy as np
import pytest
from PIL import Image

from xray_fastai.model.transforms import OpenXray, XrayImage


@pytest.mark.parametrize(("process", "cache"), [(None, None), ("one that is starting", "decoded images")])
def test_the_decoded_images_go_into_a_loading_process_only(process, cache, monkeypatch):
    monkeypatch.setattr(multiprocessing.context, "get_spawning_popen", lambda: process)
    assert pickle.loads(pickle.dumps(OpenXray(32, "decoded images"))).cache == cache  # noqa: S301


def test_without_pythons_undocumented_function_images_are_decoded_again(tmp_path, monkeypatch):
    Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).save(tmp_path / "x.png")
    monkeypatch.delattr(multiprocessing.context, "get_spawning_popen")
    with pytest.warns(UserWarning, match="get no decoded images, slower: ImportError"):
        opened = pickle.loads(pickle.dumps(OpenXray(32, "decoded images")))  # noqa: S301
    assert opened.cache is None
    assert np.array_equal(opened(str(tmp_path / "x.png")), np.arange(1024, dtype=np.uint8).reshape(32, 32))


def test_black_is_shown_as_black():
    image = XrayImage(Image.new("L", (4, 4)))
    assert image.show().images[0].cmap.name == "gray"
    assert image.show(cmap="bone").images[0].cmap.name == "bone"
