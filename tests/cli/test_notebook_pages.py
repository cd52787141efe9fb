"""What a notebook shows of the results: tables and pictures within the page; names of files are text in it."""

import base64
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from tests.conftest import draw_collection
from tests.small_network import NAME as SMALL
from xray_fastai import evaluate, fit, interpret, predict

HOSTILE = "<img src=x onerror=alert(1)>&amp.jpeg"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    @property
    def pictures(self) -> list[bytes]:
        found = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [base64.b64decode(re.fullmatch("data:image/png;base64,(.+)", source)[1]) for source in found]

    def check(self):
        """Nothing runs on the page, and it loads nothing."""
        assert not {"script", "iframe", "link", "object"} & {tag for tag, _ in self.tags}
        assert not [name for _, attributes in self.tags for name in attributes if name.startswith("on")]
        assert all(picture.startswith(b"\x89PNG") for picture in self.pictures)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = draw_collection(tmp_path_factory.mktemp("page") / "<b>data", {"test/NORMAL": 3, "test/PNEUMONIA": 3})
    (image, *_) = sorted((root / "test" / "NORMAL").iterdir())
    image.rename(image.with_name(HOSTILE))
    return root


@pytest.mark.curves
def test_a_fit(collection, tmp_path):
    settings = {"arch": SMALL, "size": 32, "batch_size": 8, "device": "cpu", "weights": "none", "epochs": 1}
    result = fit(collection, **settings, exports=tmp_path / "<i>a&b")
    page = Page(result._repr_html_())
    page.check()
    assert len(page.pictures) == 1 and str(result.path) in page.text and "i" not in {tag for tag, _ in page.tags}
    assert f"phase unfrozen, epoch 1, validation loss {result.history[0]['valid_loss']:.3f}" in page.text
    result.path.rename(tmp_path / "moved")
    assert Page(result._repr_html_()).pictures == []


def test_an_evaluation(export, data, tmp_path):
    page = Page(evaluate(export, data, output=tmp_path)._repr_html_())
    page.check()
    assert len(page.pictures) == 7 and "ensitivity" in page.text and str(data) in page.text


def test_an_interpretation(export, data, tmp_path):
    page = Page(interpret(export, data, "test", output=tmp_path)._repr_html_())
    page.check()
    assert len(page.pictures) == 1 and HOSTILE in page.text


def test_predictions(export, data):
    with pd.option_context("display.max_colwidth", None):
        page = Page(predict(data / "test" / "NORMAL", export)._repr_html_())
    page.check()
    assert HOSTILE in page.text and "p_PNEUMONIA" in page.text
