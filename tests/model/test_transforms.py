"""An opened X-ray is shown with black as black, and an export holds no decoded images."""

import pickle

from PIL import Image

from xray_fastai.model.transforms import OpenXray, XrayImage


def test_a_pickle_holds_no_decoded_images():
    assert pickle.loads(pickle.dumps(OpenXray(32, "decoded images"))).cache is None  # noqa: S301


def test_black_is_shown_as_black():
    image = XrayImage(Image.new("L", (4, 4)))
    assert image.show().images[0].cmap.name == "gray"
    assert image.show(cmap="bone").images[0].cmap.name == "bone"
