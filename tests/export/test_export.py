"""An export loads in both ways, in any folder, without its training data and without running code from it."""

import json
import pickle
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import settings_of
from tests.small_network import WIDTHS
from xray_fastai import load_learner
from xray_fastai.export.run_folder import reserve
from xray_fastai.system.errors import UserError

PREDICT = """
import json, sys, warnings
warnings.simplefilter("ignore")
from fastai.vision.all import load_learner
label, index, probabilities = load_learner(sys.argv[1]).predict(sys.argv[2])
print()
print(json.dumps([label, int(index), probabilities.tolist()]))
"""


def predicted_by_fastai(*args, cwd):
    """Predict in a new process, in an empty folder."""
    command = [sys.executable, "-c", PREDICT, *map(str, args)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_fastai_alone_loads_the_pickle_in_a_new_process_and_gives_the_same(resnet18_export, an_image, tmp_path):
    export = resnet18_export
    label, index, probabilities = load_learner(export).predict(an_image)
    pickled = predicted_by_fastai(export / "learner.pkl", an_image, cwd=tmp_path)
    assert [label, int(index)] == pickled[:2] and label == settings_of(export)["classes"][index]
    assert probabilities.tolist() == pytest.approx(pickled[2], abs=1e-5)
    assert sum(pickled[2]) == pytest.approx(1, abs=1e-5)


def test_predict_takes_a_path_a_picture_or_an_array(export, an_image):
    learn = load_learner(export)
    picture = Image.open(an_image)
    sources = [str(an_image), an_image, picture, np.asarray(picture), np.asarray(picture.convert("RGB"))]
    probabilities = [learn.predict(source)[2].tolist() for source in sources]
    for other in probabilities[1:]:
        assert other == pytest.approx(probabilities[0], abs=1e-3)
    assert learn.predict(picture)[2].tolist() == pytest.approx(probabilities[0], abs=1e-5)


def test_the_weights_are_fp32_and_named_as_the_module_is(export):
    state = load_file(export / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}
    assert state["1.3.weight"].shape == (2, WIDTHS[-1])


def test_loading_unpickles_nothing(export, an_image, tmp_path):
    """The export's pickle is replaced by one that would write a file; neither loading nor predicting runs it."""
    copy = copy_of(export, tmp_path)
    mark = tmp_path / "mark"

    class Hostile:
        def __reduce__(self):
            return open, (str(mark), "w")

    (copy / "learner.pkl").write_bytes(pickle.dumps(Hostile()))
    load_learner(copy).predict(an_image)
    assert not mark.exists()


def test_nothing_of_the_machine_is_in_an_export(export):
    for file in ("model.json", "learner.pkl", "history.csv"):
        content = (export / file).read_bytes()
        assert b"IM-train" not in content and b"persontrain" not in content
    assert str(export).encode() not in (export / "learner.pkl").read_bytes()


def copy_of(export, folder):
    import shutil

    return shutil.copytree(export, folder / "copy")


def test_a_changed_export_is_refused(export, tmp_path):
    copy = copy_of(export, tmp_path)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: its SHA-256"):
        load_learner(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model | {"format": 99}, "written by a newer version"),
        (lambda model: {}, "damaged"),
        (lambda model: [], "damaged"),
        (lambda model: model | {"weights": 3}, "damaged"),
        (lambda model: model | {"prior": [0.5]}, "damaged: prior: not the probabilities of 2 classes"),
        (lambda model: model | {"prior": [0.5, 0.6]}, "damaged: prior: not the probabilities of 2 classes"),
        (lambda model: model | {"prior": [0.0, 1.0]}, "damaged: prior"),
    ],
)
def test_a_model_json_of_another_kind_is_refused(change, words, export, tmp_path):
    copy = copy_of(export, tmp_path)
    (copy / "model.json").write_text(json.dumps(change(settings_of(export))))
    with pytest.raises(UserError, match=words):
        load_learner(copy)


def test_weights_of_another_network_are_refused(export, tmp_path):
    from xray_fastai.system.files import sha256

    copy = copy_of(export, tmp_path)
    save_file({"a": torch.zeros(1)}, copy / "model.safetensors")
    model = settings_of(export)
    model["weights"]["sha256"] = sha256(copy / "model.safetensors")
    (copy / "model.json").write_text(json.dumps(model))
    with pytest.raises(UserError, match="not the weights of small_resnet"):
        load_learner(copy)


@pytest.mark.parametrize("what", ["missing", "file", "empty"])
def test_no_export(what, tmp_path):
    path = tmp_path / what
    if what == "file":
        path.write_text("")
    elif what == "empty":
        path.mkdir()
    with pytest.raises(UserError, match="not an export"):
        load_learner(path)


def test_a_name_taken_meanwhile_loses_nothing(tmp_path):
    with reserve(tmp_path, "run") as run:
        (run.partial / "file").write_text("mine")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "file").write_text("theirs")
        path = run.publish()
    assert path == tmp_path / "run-2"
    assert (path / "file").read_text() == "mine" and (tmp_path / "run" / "file").read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run-2"]


def test_who_may_read_one_file_may_read_all(export):
    assert len({file.stat().st_mode for file in export.iterdir() if file.is_file()}) == 1


def globals_in(pickled):
    """Return the globals that a pickle of protocol 2 to 5 looks up, and its strings."""
    strings, names, texts = [], set(), set()
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            names.add(argument.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
            texts.add(argument)
    return names, texts


def test_the_pickle_holds_names_and_no_code_and_no_path(export):
    """Bytecode would open under one version of Python only, and would hold a path of the training machine."""
    with zipfile.ZipFile(export / "learner.pkl") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        names, texts = globals_in(archive.read(name))
    # `PosixPath` exists on one kind of system only, and its module changed its name in Python 3.13
    assert {name for name in names if name.startswith("pathlib")} == {"pathlib.Path"}
    own = {name.removeprefix("xray_fastai.") for name in names if name.startswith("xray_fastai")}
    assert own == {
        "model.architectures.split_parameters",
        "model.augmentation.Affine",
        "model.augmentation.Blur",
        "model.augmentation.Noise",
        "model.augmentation.stretch_matrix",
        "model.learner.CalibratedCrossEntropy",
        "model.loaders.EmptyLoader",
        "model.loaders.XrayDataLoaders",
        "model.optimizer.FusedAdam",
        "model.recorder.EpochAverage",
        "model.recorder.EpochLoss",
        "model.recorder.EpochMetric",
        "model.recorder.EpochRecorder",
        "model.recorder.SmoothLoss",
        "model.transforms.Equalize",
        "model.transforms.OpenXray",
        "model.transforms.XrayImage",
        "model.xray_learner.NeedsImages",
        "model.xray_learner.XrayLearner",
    }
    # how cloudpickle writes a function by value (its `_builtin_type` alone only names a type)
    assert not [name for name in names if "_make_function" in name or "_make_cell" in name]
    assert "CodeType" not in texts
    assert not [text for text in texts if text.endswith(".py") or str(Path(torch.__file__).parents[1]) in text]
