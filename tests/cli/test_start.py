"""Commands import what they need: a model predicts without fastai, and is verified without torch.

Each test runs in a process of its own, where a finder notes which module imported one of the libraries first.
"""

import subprocess
import sys

import pytest

WATCH = """
import sys

unwanted, importers = {unwanted!r}, {{}}

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in unwanted:
            frame = sys._getframe(1)
            while frame.f_globals["__name__"].startswith("importlib"):
                frame = frame.f_back
            importers.setdefault(name, frame.f_globals["__name__"])

sys.meta_path.insert(0, Watch())

def xray(*args):
    from xray_fastai.cli import app
    try:
        app(list(args))
    except SystemExit as stop:
        assert not stop.code, stop.code

{code}
found = [f"{{name}}, by {{importers.get(name)}}" for name in unwanted if name in sys.modules]
sys.exit(f"imported: {{found}}" if found else 0)
"""


def imports_none_of(unwanted, code, *args):
    command = [sys.executable, "-c", WATCH.format(unwanted=unwanted, code=code), *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_verify_needs_no_torch(resnet18_export):
    imports_none_of(
        ["torch", "fastai", "matplotlib", "sklearn", "pandas"], 'xray("verify", sys.argv[1])', resnet18_export
    )


@pytest.mark.slow
def test_predict_and_serve_need_no_fastai(resnet18_export, an_image):
    code = """
export, image = sys.argv[1:]
xray("predict", image, "--model", export)

from xray_fastai.inference.model import open_model  # the forward passes of evaluate and interpret
from xray_fastai.inference.stream import predict_all
model = open_model(export)
predict_all(model, [image])

import xray_fastai.serving.server  # `serve` until it is ready, and an answer without a heat map
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.inference.rows import RowBuilder
from xray_fastai.serving.app import Predictor, create_app
from xray_fastai.serving.predictions import Options, predict_file
builder = RowBuilder(model, PredictConfig())
predictor = Predictor(builder)
create_app(predictor, {"localhost"})
assert predict_file(builder, predictor.decoder, "a.jpeg", open(image, "rb").read(), Options(heatmap=False)).prediction
predictor.close()
"""
    imports_none_of(["fastai", "matplotlib", "sklearn", "pandas", "scipy"], code, resnet18_export, an_image)


@pytest.mark.slow
def test_evaluate_interpret_and_export_need_no_fastai(resnet18_export, tmp_path, monkeypatch):
    """And nothing of onnxruntime's telemetry is kept: it writes an identifier of the machine if it may."""
    pytest.importorskip("onnxruntime")
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)  # an earlier export in this process set it
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    code = """
export, data, output = sys.argv[1:]
xray("export", export, "--output", output + "/small.onnx")
found = [name for name in ("matplotlib", "sklearn") if name in sys.modules]
assert not found, f"export imports {found}, by {importers}"
xray("evaluate", "--model", export, "--data", data, "--split", "train", "--output", output)
xray("interpret", "--model", export, "--data", data, "--split", "train", "--output", output)
unwanted.remove("matplotlib"), unwanted.remove("sklearn")  # for metrics and pictures
"""
    unwanted = ["fastai", "matplotlib", "sklearn"]
    imports_none_of(unwanted, code, resnet18_export, resnet18_export.parent / "moved", tmp_path)
    assert not list(tmp_path.rglob("*onnxruntime*"))


def test_the_tests_above_see_what_a_command_imports_and_name_the_module_that_did():
    with pytest.raises(AssertionError, match=r"imported: \['safetensors, by xray_fastai\.export\.weights_file'\]"):
        imports_none_of(["safetensors", "torch"], "import xray_fastai.export.weights_file")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["fit", "--data", "nowhere"], "--data nowhere: no such folder"),
        (["fit", "--name", "taken"], "--name taken: exports/taken already exists"),
        (["predict", "a.jpeg", "--model", "nowhere"], "a.jpeg: no such file or folder; give images"),
        (["predict", "exports", "--model", "nowhere"], "nowhere: not an export"),
        (["evaluate"], "exports: no export in it"),
        (["serve", "--model", "nowhere"], "nowhere: not an export"),
    ],
)
def test_a_wrong_path_is_answered_before_torch_is_imported(command, words, tmp_path):
    (tmp_path / "exports" / "taken").mkdir(parents=True)
    code = f"""
import contextlib, io, os
os.chdir({str(tmp_path)!r})
from xray_fastai.cli import app
with contextlib.redirect_stderr(io.StringIO()) as said:
    try:
        app({command!r})
    except SystemExit as stop:
        assert stop.code == 1
assert {words!r} in said.getvalue(), said.getvalue()
"""
    imports_none_of(["torch", "fastai"], code)
