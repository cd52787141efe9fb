"""Any bytes as `model.json` or as an image are accepted, or refused in one line; nothing else happens, in limited time.

XRAY_FUZZ is the number of inputs for each test; without it there are 500, the same each time.
"""

import copy
import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import settings_of
from xray_fastai.data.image_facts import examine
from xray_fastai.data.images import open_image
from xray_fastai.data.labelled import Request, labelled_images
from xray_fastai.evaluation.report import write_report
from xray_fastai.export.model_json import parse
from xray_fastai.system.errors import ImageError, UserError
from xray_fastai.system.text import UNPRINTABLE

FUZZ = settings(
    max_examples=int(os.environ.get("XRAY_FUZZ", 500)),
    derandomize="XRAY_FUZZ" not in os.environ,
    database=None,
    deadline=10_000,  # milliseconds: what takes longer hangs
    suppress_health_check=list(HealthCheck),
)
FILE = Path("model.json")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow says of broken tags

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 3)
    | st.floats()
    | st.floats(0, 1)
    | st.text()
    | st.sampled_from(["", "NORMAL", "resnet18", "../x", "/", "\x1b[2J", "\ud800", "1e999", "__class__", "x" * 5000])
    | st.sampled_from([10**30, 10**400, -0.0, 1e308, 2**63])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def models(export):
    """Three files as fits write them: two classes; three classes, a rehearsal; interrupted before the first epoch."""
    model = settings_of(export)
    three = copy.deepcopy(model) | {
        "classes": ["A", "B", "C"],
        "positive": None,
        "threshold": None,
        "prior": None,
        "scores": None,
    }
    three["class_weights"] = None
    three["data"] |= {"rehearsal": True, "train": {"A": 1, "B": 2, "C": 3}, "valid": {"A": 1, "B": 1, "C": 1}}
    three["settings"] |= {"data": None}
    none = copy.deepcopy(model) | {"status": "interrupted", "best": None}
    none["training"]["phases"] = [{"name": "unfrozen", "epochs": 0, "best_epoch": None, "end": "an interruption"}]
    texts = [json.dumps(one, indent=2).encode() for one in (model, three, none)]
    assert all(parse(text, FILE)[1] == [] for text in texts)
    return texts


def places(node, above=()):
    """Yield the paths of all nodes."""
    yield above
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*above, key))


def alike(value):
    """Draw values of the same type: most of them are accepted, and so reach the code that uses them."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(0, 10**6) | st.integers()
    if isinstance(value, float):
        return st.floats(0, 100) | st.floats()
    if isinstance(value, str):
        return st.text(max_size=30) | st.text("abc <>&{}%$\\'\"", max_size=30)
    return values


@st.composite
def changes(draw, text):
    """Draw a model.json with one to three nodes replaced, removed or added."""
    model = json.loads(text)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        path = draw(st.sampled_from(sorted(places(model), key=str)))
        if not path:
            continue
        *above, last = path
        node = model
        for step in above:
            node = node[step]
        match draw(st.sampled_from(["alike", "alike", "other", "remove", "add", "copy"])):
            case "alike":
                node[last] = draw(alike(node[last]))
            case "other":
                node[last] = draw(values)
            case "remove":
                del node[last]
            case "add" if isinstance(node, dict):
                node[draw(st.text(max_size=12))] = draw(values)
            case "copy" if isinstance(node, list):
                node.append(copy.deepcopy(node[last]))
    return model


def taken(content):
    """Return the settings, or None if they are refused with a correct message."""
    try:
        return parse(content, FILE)[0]
    except UserError as error:
        text = str(error)
        assert text.startswith("model.json: ") and not UNPRINTABLE.search(text) and len(text) < 400, text
        return None


EACH = [None, True, False, -1, 0, 1, 10**400, 0.5, -1e300, 1e308, "", "NORMAL", "x" * 5000, [], [None], {}, {"a": None}]


@pytest.mark.slow
def test_each_node_in_turn_becomes_each_value(models, tmp_path):
    """If the file is accepted, the report can be written."""
    for text in models:
        for path in [path for path in places(json.loads(text)) if path]:
            for value in EACH:
                node = model = json.loads(text)
                for step in path[:-1]:
                    node = node[step]
                node[path[-1]] = value
                content = json.dumps(model).encode()
                if taken(content):
                    (tmp_path / "model.json").write_bytes(content)
                    write_report(tmp_path)


@pytest.mark.slow
@FUZZ
@given(st.data())
def test_a_changed_model_json(models, tmp_path_factory, data):
    """For accepted settings the report is written and the images are searched: no code meets an unexpected value."""
    content = json.dumps(data.draw(changes(data.draw(st.sampled_from(models))))).encode()
    model = taken(content)
    event("refused" if model is None else "taken")
    if model is None:
        return
    folder = tmp_path_factory.getbasetemp() / "reported"
    folder.mkdir(exist_ok=True)
    (folder / "model.json").write_bytes(content)
    write_report(folder)
    if not model["data"]["rehearsal"]:
        with pytest.raises(UserError):
            labelled_images(model, Request(None, "test"))


@st.composite
def spoiled(draw, seed):
    """Draw bytes with up to six of them changed, a part removed, inserted or doubled, or the end cut off."""
    content = bytearray(seed)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["byte", "word", "remove", "insert", "double", "cut"])):
            case "byte" if content:
                content[at] = draw(st.integers(0, 255) | st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
            case "word":
                extreme = st.sampled_from(
                    [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\1\0\0\0"]
                )
                content[at : at + 4] = draw(extreme | st.binary(min_size=4, max_size=4))
            case "remove":
                del content[at : at + draw(st.integers(1, 40))]
            case "insert":
                content[at:at] = draw(st.binary(max_size=40))
            case "double":
                content[at:at] = content[at : at + draw(st.integers(1, 40))]
            case "cut" if draw(st.booleans()):
                del content[at:]
    return bytes(content)


@pytest.mark.slow
@FUZZ
@given(st.data())
def test_a_model_json_of_spoiled_bytes(models, data):
    taken(data.draw(spoiled(data.draw(st.sampled_from(models))) | st.binary(max_size=200)))


def encodings():
    """Make a small image in each supported format and mode."""
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 256, (24, 20), np.uint8))
    deep = Image.fromarray(rng.integers(0, 4096, (24, 20)).astype(np.uint16))
    exif = Image.Exif()
    exif[274] = 6
    kinds = [
        *(("PNG", grey.convert(mode), {}) for mode in ("L", "LA", "RGB", "RGBA", "P", "1")),
        ("PNG", deep, {}),
        ("PNG", grey.convert("P"), {"transparency": 3}),
        ("PNG", grey, {"save_all": True, "append_images": [grey.rotate(90)]}),
        *(("JPEG", grey.convert(mode), {"exif": exif}) for mode in ("L", "RGB", "CMYK")),
        ("JPEG", grey, {"progressive": True, "icc_profile": b"profile" * 20}),
        ("GIF", grey.convert("P"), {}),
        ("GIF", grey.convert("P"), {"save_all": True, "append_images": [grey.rotate(90)]}),
        *(("TIFF", grey.convert(mode), {}) for mode in ("L", "RGB", "CMYK", "F", "I", "1", "LAB")),
        *(("TIFF", deep, {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_deflate", "packbits")),
        ("TIFF", grey.convert("RGB"), {"compression": "jpeg"}),
        ("TIFF", grey, {"save_all": True, "append_images": [grey.rotate(90)]}),
        ("WEBP", grey.convert("RGB"), {}),
        ("WEBP", grey.convert("RGBA"), {"lossless": True}),
        *(("BMP", grey.convert(mode), {}) for mode in ("L", "RGB", "RGBA", "1", "P")),
        ("PPM", grey, {}),
        ("JPEG2000", grey, {}),
    ]
    for kind, image, options in kinds:
        stream = io.BytesIO()
        try:
            image.save(stream, kind, **options)
        except (OSError, ValueError):  # this Pillow was built without it
            continue
        yield stream.getvalue()


ENCODINGS = list(encodings())


def with_sums(content: bytes) -> bytes:
    """Correct the checksums of a PNG, so that the changed bytes reach the decoder."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    out, at = bytearray(content[:8]), 8
    while at + 12 <= len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        chunk = content[at + 4 : at + 8 + size]
        out += content[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        at += 12 + size
    return bytes(out)


@pytest.mark.slow
@FUZZ
@given(st.data())
def test_spoiled_images(tmp_path_factory, data):
    seed = data.draw(st.sampled_from(ENCODINGS))
    content = data.draw(spoiled(seed)) if data.draw(st.integers(0, 19)) else data.draw(st.binary(max_size=200))
    content = with_sums(content) if data.draw(st.booleans()) else content
    size = data.draw(st.sampled_from([None, 16, 64]))
    try:
        image = open_image(content, size)
        assert image.mode == "L" and (size is None or image.size == (size, size))
        event("opened")
    except ImageError as error:
        assert len(str(error).splitlines()) == 1
    file = tmp_path_factory.getbasetemp() / "spoiled"
    file.write_bytes(content)
    try:
        examine(file)
    except ImageError as error:
        assert str(error).startswith(f"{file}: ")
