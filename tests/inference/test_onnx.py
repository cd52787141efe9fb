"""An ONNX file gives `predict`'s probabilities without torch; it is not written if it does not."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import settings_of
from xray_fastai import DISCLAIMER
from xray_fastai.inference import onnx_export
from xray_fastai.inference.model import Model
from xray_fastai.inference.predict import predict
from xray_fastai.model.architectures import build_network
from xray_fastai.system.files import sha256

SNIPPET = """
import json, os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else onnxruntime leaves an identifier in ~/.cache
import numpy as np, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("rehearsal.onnx")
metadata = session.get_modelmeta().custom_metadata_map  # classes, positive, threshold, size and more
size = int(metadata["size"])
image = Image.open("image.jpeg")
image.draft("L", (2 * size, 2 * size))  # a large JPEG at reduced scale, as `predict` decodes it
image = image.convert("L").resize((size, size), Image.Resampling.BILINEAR)
(p,) = session.run(None, {"images": np.array(image)[None, None]})[0]  # (classes,)
print(dict(zip(json.loads(metadata["classes"]), p)), metadata.get("positive"), "from", metadata.get("threshold"))
"""
"""The example in the README."""


@pytest.fixture(scope="module")
def written(export, run, tmp_path_factory):
    """Write the small export as ONNX; give the file and the printed text."""
    output = tmp_path_factory.mktemp("onnx") / "small.onnx"
    result = run("export", export, "--format", "onnx", "--output", output)
    assert result.exit_code == 0, result.output
    return output, result.stdout


@pytest.fixture
def written_before(written, monkeypatch):
    """Copy a file that was written before, because writing one takes a second."""
    monkeypatch.setattr(onnx_export, "_write", lambda model, path, versions: shutil.copy(written[0], path))


@pytest.fixture
def files(an_image):
    """Write images of several kinds, sizes and formats."""
    rng, made = np.random.default_rng(0), []
    xray = Image.open(an_image).convert("L")
    for name, picture in {
        "as-it-is.png": xray,
        "colour.png": Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8)),
        "dark.png": xray.point(lambda grey: grey // 4),
        "small.jpeg": xray,
        "large.jpeg": xray.resize((400, 500)),  # decoded at an eighth of its size
        "large.png": xray.resize((400, 500)),
    }.items():
        picture.save(name)
        made.append(name)
    return made


def test_the_readmes_lines_say_what_predict_says(written, export, files, capsys):
    assert SNIPPET.strip() in (Path(__file__).parents[2] / "xray_fastai/inference/README.md").read_text("utf-8")
    output, _ = written
    table = predict(files, export, device="cpu", precision="fp32")
    for row in table.itertuples():
        names = {}
        exec(SNIPPET.replace("rehearsal.onnx", str(output)).replace("image.jpeg", row.path), names)
        assert names["p"] == pytest.approx([row.p_NORMAL, row.p_PNEUMONIA], abs=1e-5)
        assert float(names["metadata"]["threshold"]) == row.threshold and names["metadata"]["positive"] == "PNEUMONIA"
    assert table.p_PNEUMONIA.max() - table.p_PNEUMONIA.min() > 0.1  # else all would agree with all
    assert "'NORMAL': " in capsys.readouterr().out


def test_the_readmes_lines_need_no_torch():
    imported = [node for node in ast.walk(ast.parse(SNIPPET)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", None) or name.name for node in imported for name in node.names}
    assert modules == {"json", "os", "numpy", "onnxruntime", "PIL"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="where onnxruntime's cache is, is known for Linux alone")
def test_onnxruntime_keeps_no_identifier_in_the_readmes_lines(written, an_image, tmp_path):
    """A new process, as earlier imports would change the result; that of `export` is in `tests/cli/test_start.py`."""
    lines = SNIPPET.replace("rehearsal.onnx", str(written[0])).replace("image.jpeg", str(an_image))
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / ".cache"), "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", lines], env=home, check=True, capture_output=True)
    assert not list(tmp_path.rglob("*onnxruntime*"))


def test_any_number_of_images_at_once(written, export):
    output, _ = written
    session = onnxruntime.InferenceSession(output)
    (given,), (got,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["N", 1, 32, 32])
    assert (got.name, got.shape) == ("probabilities", ["N", 2])
    images = np.random.default_rng(0).integers(0, 256, (11, 1, 32, 32), np.uint8)
    (together,) = session.run(None, {"images": images})
    alone = [session.run(None, {"images": image[None]})[0][0] for image in images]
    assert together == pytest.approx(np.array(alone), abs=1e-6)
    assert together.sum(axis=1) == pytest.approx(np.ones(11), abs=1e-6)


def test_the_file_tells_what_it_is(written, export):
    output, said = written
    model, file = settings_of(export), onnx.load(output)
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(metadata["classes"]) == model["classes"] and metadata["positive"] == model["positive"]
    assert float(metadata["threshold"]) == model["threshold"] and float(metadata["temperature"]) == model["temperature"]
    assert metadata["gate"].startswith("none: any picture gets probabilities") and "gate          none: any" in said
    assert metadata["calibration_kind"] == "none" and "intercepts" not in metadata and "not calibrated" in said
    assert metadata["weights_sha256"] == model["weights"]["sha256"] and metadata["export"] == "small"
    assert json.loads(metadata["preprocessing"]) == model["preprocessing"]
    assert json.loads(metadata["versions"]) == model["versions"]
    assert json.loads(metadata["exported_by"])["onnx"] == onnx.__version__
    assert metadata["disclaimer"] == file.doc_string == DISCLAIMER
    assert str(export.parent) not in json.dumps(metadata)
    assert "32 images in onnxruntime" in said and "small_resnet, 32 x 32 px" in said


def test_the_newest_export_by_its_name_in_this_folder(written_before, export, run):
    shutil.copytree(export, "exports/first")
    result = run("export")
    assert result.exit_code == 0, result.output
    assert Path("first.onnx").is_file() and sorted(path.name for path in Path().iterdir()) == ["exports", "first.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "contrast"), [("densenet121", "none"), ("efficientnet_b0", "equalize")])
def test_other_networks(architecture, contrast, export):
    settings = settings_of(export)
    settings |= {"architecture": architecture, "preprocessing": settings["preprocessing"] | {"contrast": contrast}}
    network = build_network(architecture, len(settings["classes"]), dropout=0.5).eval()
    network[1][-1].bias.data.zero_()  # the features of random weights are small beside it
    images = torch.from_numpy(onnx_export._test_images(32))
    logits = Model(export, settings, network).logits(images).numpy()
    network[1][-1].weight.data /= np.ptp(logits[:, 1] - logits[:, 0]) / 4  # else all have the same probabilities
    model = Model(export, settings, network)
    assert np.ptp(model.probabilities(model.logits(images).numpy())[:, 0]) > 0.3
    onnx_export._write(model, Path("a.onnx"), {})
    assert onnx_export._difference(model, Path("a.onnx"), onnxruntime) < 1e-5


# what is refused


def test_what_differs_from_torch_is_not_written(written_before, export, run, refused, monkeypatch):
    honest = Model.probabilities
    monkeypatch.setattr(Model, "probabilities", lambda *args: honest(*args) + np.array([2e-4, 0]))
    refused(run("export", export), "small.onnx: not written", "differs from torch's by 0.0002")
    monkeypatch.setattr(Model, "probabilities", lambda *args: honest(*args) * np.nan)
    refused(run("export", export), "small.onnx: not written", "differs from torch's by nan")
    assert not list(Path().iterdir())


def test_what_onnxruntime_does_not_take_is_not_written(written_before, export, run, refused, monkeypatch):
    write = onnx_export._write

    def spoil(model, path, versions):
        write(model, path, versions)
        path.write_bytes(path.read_bytes()[:10_000])

    monkeypatch.setattr(onnx_export, "_write", spoil)
    refused(run("export", export), "cannot run the written file")
    assert not list(Path().iterdir())


def test_stopped_it_leaves_nothing(written_before, export, run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_export, "_difference", stop)
    result = run("export", export)
    assert result.exit_code == 130 and "nothing was written" in result.stderr
    assert not list(Path().iterdir())


def test_bad_input(export, run, refused, monkeypatch):
    Path("there.onnx").write_text("mine")
    refused(run("export", export, "--output", "there.onnx"), "--output there.onnx: already exists")
    assert Path("there.onnx").read_text() == "mine"
    refused(run("export", export, "--output", "none/a.onnx"), "--output none/a.onnx: there is no folder none")
    refused(run("export", "none"), "none: not an export")
    refused(run("export"), "exports: no export in it")
    assert run("export", export, "--format", "tflite").exit_code == 2
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(run("export", export), 'pip install "xray-fastai[onnx]"')
    assert [path.name for path in Path().iterdir()] == ["there.onnx"]


def test_an_export_from_before_there_was_a_choice_of_contrast(export, run, tmp_path):
    older = shutil.copytree(export, tmp_path / "older")
    settings = settings_of(older)
    del settings["preprocessing"]["contrast"], settings["settings"]["contrast"]
    save_file(load_file(export / "model.safetensors"), older / "model.safetensors")  # without the hash of the settings
    settings["weights"]["sha256"] = sha256(older / "model.safetensors")
    (older / "model.json").write_text(json.dumps(settings))
    result = run("export", older, "--format", "onnx", "--output", tmp_path / "older.onnx")
    assert result.exit_code == 0, result.output
