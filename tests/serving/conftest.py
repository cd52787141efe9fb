"""What the tests of the server share: a running one, its page in a browser, files to send."""

import dataclasses
import io
import re
import resource
import shutil
import signal
import socket
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import requests
import uvicorn
from PIL import Image

from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.inference.model import open_model
from xray_fastai.inference.predict import predict
from xray_fastai.inference.rows import RowBuilder
from xray_fastai.serving.app import Predictor, create_app

BROKEN = b"\xff\xd8\xff\xe0 not a JPEG"


def address_of(process):
    """Return the address of a started server as soon as it listens, and its output up to then."""
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("page"):
            address = line.split()[1]
        if "Ctrl-C" in line:
            return address, output
    pytest.fail(output + process.stderr.read())


def stop(process, number):
    """Stop a server by a signal, and check that it ends without an error."""
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "") and output.endswith("Stopped.\n"), output + errors


def no_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # any write to a file fails


@pytest.fixture(scope="module")
def server(export, start):
    """The address of a server on a free port; the server cannot write to a disk."""
    process = start("serve", "--model", export, "--port", 0, "--device", "cpu", preexec_fn=no_disk)
    yield address_of(process)[0]
    stop(process, signal.SIGINT)


@pytest.fixture(scope="session")
def photos(export):
    return sorted((export.parent / "moved" / "train").glob("*/*"))


def send(server, *files, heatmap=False, options=None, **kwargs):
    parts = [("file", (file.name, file.read_bytes()) if hasattr(file, "name") else file) for file in files]
    params = {"heatmap": str(heatmap).lower()} | (options or {})
    return requests.post(f"{server}/predict", params=params, files=parts, timeout=60, **kwargs)


def dicom(stored=None, **header):
    """A DICOM file of 64 x 64 values, from 0 to 4000 unless they are given."""
    pytest.importorskip("pydicom", reason='pip install "xray-fastai[test]" brings pydicom')
    from tests.data.dicom_files import content_of, header_of

    stored = np.linspace(0, 4000, 64 * 64).round().astype(np.uint16).reshape(64, 64) if stored is None else stored
    return content_of(header_of(stored, bits=12, **({"WindowCenter": 2000, "WindowWidth": 1000} | header)))


def noise(width, height, kind="PNG"):
    stream, ramp = io.BytesIO(), np.linspace(0, 155, width).astype(np.uint8)  # noise alone has no contrast: it is blank
    Image.fromarray(ramp + np.random.default_rng(0).integers(0, 100, (height, width), np.uint8)).save(stream, kind)
    return stream.getvalue()


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no browser: install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


class Brightness:
    """A gate that finds bright images unlike the training images."""

    def __init__(self, limit):
        self.limit = limit

    def unlike(self, images, features):
        return images.float().mean((1, 2, 3)).numpy() / 2.56


@pytest.fixture(scope="session")
def gated(export, photos):
    """The small model with a gate that withholds the last of the photos, but not the first."""
    model = dataclasses.replace(open_model(export, "cpu", "fp32"), gate=Brightness(100))
    first, last = predict([photos[0], photos[-1]], model).unlike
    assert first < last
    return dataclasses.replace(model, gate=Brightness(float(first + last) / 2))


@contextmanager
def served(builder):
    """Serve in a thread, and yield the address."""
    predictor = Predictor(builder)
    config = uvicorn.Config(create_app(predictor, {"localhost"}), ws="none", lifespan="off", log_config=None)
    uvicorn_server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=uvicorn_server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            uvicorn_server.should_exit = True
            thread.join()
            predictor.close()


@contextmanager
def opened(browser, server, **kwargs):
    """Open the page; at the end it must have logged no error and sent requests to no other server."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **kwargs)
    page, errors, urls = context.new_page(), [], []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    page.goto(server)
    yield page
    context.close()
    assert not errors
    assert all(url.startswith((f"{server}/", "data:image/", f"blob:{server}/")) for url in urls), urls


@pytest.fixture
def page(browser, server):
    with opened(browser, server) as page:
        yield page


@pytest.fixture
def gated_page(browser, gated):
    with served(RowBuilder(gated, PredictConfig())) as server, opened(browser, server) as page:
        yield page


def drop(page, *paths):
    """Drop files on the page, as the browser receives them from the desktop."""
    box = page.locator("#drop").bounding_box()
    where = {"x": box["x"] + 20, "y": box["y"] + 20}
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    devtools = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, **where, "data": data})


def done(page, number):
    page.locator("#status", has_text=re.compile(f"^{number} files? done")).wait_for(timeout=30_000)
