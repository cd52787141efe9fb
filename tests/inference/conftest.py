"""What the tests of prediction share: the images of the small export, the model opened once, and the command."""

import pytest
from typer.testing import CliRunner

from xray_fastai.cli import app
from xray_fastai.inference import predict_files
from xray_fastai.inference.model import open_model


@pytest.fixture(scope="session")
def images(export):
    """The folders NORMAL, with 16 images, and PNEUMONIA, with 24."""
    return export.parent / "moved" / "train"


@pytest.fixture(scope="session")
def files(images):
    return [str(path) for path in sorted(images.glob("*/*"))]


@pytest.fixture(scope="session")
def model(export):
    return open_model(export, "cpu", "fp32")


@pytest.fixture
def says(export, model, monkeypatch):
    """Run `predict` with the small export, opened once for all tests, on these lines of standard input."""
    opened = predict_files.open_model
    monkeypatch.setattr(
        predict_files, "open_model", lambda path, *args: model if path == export else opened(path, *args)
    )

    def says(*args, stdin=None):
        command = ["predict", *map(str, args), "--model", str(export), "--device", "cpu"]
        return CliRunner().invoke(app, command, input=stdin, prog_name="xray-fastai")

    return says
