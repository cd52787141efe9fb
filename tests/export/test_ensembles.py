"""The export of an ensemble: read, checked and refused as that of one network."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests import small_network
from tests.conftest import settings_of
from tests.ensembles import MEMBERS, joined
from tests.export.test_export import predicted_by_fastai
from xray_fastai import load_learner, verify
from xray_fastai.config.choices import MAX_MEMBERS
from xray_fastai.export import weights_file
from xray_fastai.export.network import load_network
from xray_fastai.export.weights_file import facts_hash, layout_of, network_part, read_weights, size_of, split_tensors
from xray_fastai.model.architectures import build_network
from xray_fastai.model.ensemble import split
from xray_fastai.system.errors import UserError

TYPES = {torch.float32: "F32", torch.int64: "I64"}


@pytest.fixture
def copy(ensemble, tmp_path):
    return shutil.copytree(ensemble, tmp_path / "sent")


def change(folder, **values):
    (folder / "model.json").write_text(json.dumps(settings_of(folder) | values))


@pytest.mark.parametrize("arch", [small_network.NAME, "resnet18", "densenet121", "convnext_tiny", "efficientnet_b0"])
def test_the_layout_is_that_of_the_joined_network(arch):
    small_network.register()
    with torch.device("meta"):
        network = build_network(arch, 3, 0.5, members=4)
    expected = {name: (TYPES[t.dtype], list(t.shape)) for name, t in network.state_dict().items()}
    assert layout_of(arch, 3, members=4) == expected
    assert size_of(layout_of(arch, 3, members=4)) == sum(t.nbytes for t in network.state_dict().values())


def test_it_is_verified_without_torch(ensemble):
    result = verify(ensemble)
    assert result.ok, result
    assert "ok: 3 x small_resnet, 32 x 32 px, 2 classes" in str(result)
    assert f"ok: {MEMBERS * 72 + 2} tensors" in str(result)
    code = (
        "import sys; from tests import small_network; small_network.allow();"
        "from xray_fastai.export import weights_file as w;"
        f"w._backbones()[small_network.NAME] = {layout_of_one()!r};"
        f"from xray_fastai import verify; assert verify({str(ensemble)!r}).ok; assert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=sys.path[0])
    assert ran.returncode == 0, ran.stderr


def layout_of_one():
    one = layout_of(small_network.NAME, 2)
    return {name: shape for name, (_, shape) in one.items() if name.startswith("0.")}


def test_the_network_gives_the_mean_of_the_members(ensemble, export):
    images = torch.rand(4, 3, 32, 32)
    _, first = load_network(export)
    model, network = load_network(ensemble)
    assert model["members"] == MEMBERS
    with torch.no_grad():
        alone = [member(images) for member in split(network, MEMBERS)]
        torch.testing.assert_close(torch.stack(alone).mean(0), network(images), atol=1e-5, rtol=0)
        shift = first[1][-1].bias - network[1][-1].bias
        torch.testing.assert_close(alone[0] + shift, first(images), atol=1e-5, rtol=0)
        assert (alone[0] - alone[1]).abs().max() > 1e-2


@pytest.mark.parametrize("of_torch", [False, True])
def test_the_tensors_of_a_member_are_those_of_its_network(ensemble, of_torch):
    model, network = load_network(ensemble)
    tensors = network_part(read_weights(ensemble, "model.safetensors", model))
    if of_torch:
        tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    for state, member in zip(split_tensors(tensors, MEMBERS), split(network, MEMBERS), strict=True):
        own = member.state_dict()
        assert state.keys() == own.keys()
        assert all(np.allclose(state[name], own[name]) for name in own)
    biases = [state["1.3.bias"] for state in split_tensors(tensors, MEMBERS)]
    biases[0] += 1
    assert not np.allclose(biases[0], biases[1])  # each has its own, which safetensors asks for
    without_head = {name: tensor for name, tensor in tensors.items() if not name.startswith("1.")}
    assert not any(name.startswith("1.") for name in split_tensors(without_head, MEMBERS)[2])
    assert split_tensors(tensors, 1) == [tensors]


def test_the_learner_and_the_pickle_have_all_members(ensemble, an_image):
    from fastai.vision.all import load_learner as by_fastai

    learn, pickled = load_learner(ensemble), by_fastai(ensemble / "learner.pkl")
    _, network = load_network(ensemble)
    assert "3 x small_resnet, 32 px" in repr(learn)
    for found in (learn, pickled):
        assert all(torch.equal(t, found.model.state_dict()[name]) for name, t in network.state_dict().items())
    label, _, probabilities = learn.predict(an_image)
    other, _, again = pickled.predict(an_image)
    assert label == other and probabilities.tolist() == pytest.approx(again.tolist(), abs=1e-6)
    assert "Conv2d" in str(learn.summary())
    assert len(learn.opt_func(learn.splitter(learn.model), lr=1).param_lists) == 3


@pytest.mark.slow
def test_fastai_alone_loads_the_pickle_in_a_new_process(resnet18_export, an_image, tmp_path):
    folder = joined(resnet18_export, tmp_path / "two", members=2)
    label, _, probabilities = load_learner(folder).predict(an_image)
    pickled = predicted_by_fastai(folder / "learner.pkl", an_image, cwd=tmp_path)
    assert label == pickled[0] and probabilities.tolist() == pytest.approx(pickled[2], abs=1e-5)


FAULTS = {
    10**9: "members: input should be less than or equal to 20",
    MAX_MEMBERS + 1: "members: input should be less than or equal to 20 (it is 21)",
    0: "greater than or equal to 1",
    -1: "greater than or equal to 1",
    1.5: "valid integer",
    "3": "valid integer",
    True: "valid integer",
}


@pytest.mark.parametrize("value", FAULTS, ids=repr)
def test_a_number_of_members_that_can_not_be(value, copy, run, refused, an_image):
    change(copy, members=value)
    refused(run("verify", copy), copy / "model.json", "damaged: ", FAULTS[value])
    refused(run("predict", an_image, "--model", copy), FAULTS[value])
    with pytest.raises(UserError):
        load_learner(copy)


@pytest.mark.parametrize(("value", "words"), [(4, "4 x small_resnet"), (2, "2 x small_resnet"), (None, "small_resnet")])
def test_another_number_of_members_than_the_weights_have(value, words, copy, run, refused):
    change(copy, members=value)
    refused(run("verify", copy), "not the weights of " + words)


def test_the_header_may_be_longer_by_the_number_of_members(ensemble, monkeypatch):
    size = int.from_bytes((ensemble / "model.safetensors").read_bytes()[:8], "little")
    monkeypatch.setattr(weights_file, "HEADER", -(-size // MEMBERS))
    assert verify(ensemble).ok
    monkeypatch.setattr(weights_file, "HEADER", size // MEMBERS - 1)
    assert "its header is incomplete, or longer than" in str(verify(ensemble))


def test_one_network_that_says_it_is_three(export, tmp_path, run, refused):
    sent = shutil.copytree(export, tmp_path / "sent")
    change(sent, members=3)
    refused(run("verify", sent), "not the weights of 3 x small_resnet")


def test_the_facts_of_one_network_are_as_they_were(ensemble, export):
    one = settings_of(export)
    assert facts_hash(one) == facts_hash(one | {"members": 1}) == facts_hash(one | {"members": None})
    assert len({facts_hash(one | {"members": n}) for n in (1, 2, 3)}) == 3


def test_runs_names_the_network(ensemble, run):
    assert "3 x small_resnet 32" in run("runs", "--exports", ensemble.parent).output
