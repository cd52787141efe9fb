"""`--arch timm/NAME`: fit, export, verify, predict, heat maps and ONNX with networks of many kinds."""

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.conftest import draw_collection
from tests.ensembles import joined
from xray_fastai import fit, load_learner, verify
from xray_fastai.export.model_json import read_settings
from xray_fastai.inference.gradcam import grad_cam
from xray_fastai.inference.model import open_model
from xray_fastai.inference.onnx_export import export_onnx
from xray_fastai.model.architectures import build_backbone, build_network, split_parameters
from xray_fastai.model.folding import fold_batch_norm
from xray_fastai.model.preprocessing import Preprocessing
from xray_fastai.model.pretrained import pretrained_state
from xray_fastai.model.timm_networks import bare, build_timm
from xray_fastai.system.errors import UserError
from xray_fastai.training.data_parallel import sync_batch_norm

NAMES = ("tf_efficientnet_lite0", "convnextv2_atto", "resnet10t", "vit_tiny_patch16_224", "mobilenetv4_conv_small")
SIZE = 64
timm = pytest.importorskip("timm", reason="timm is not installed")


def images(count=4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def source_of(name: str) -> nn.Module:
    """Return one of timm's networks with its classifier, whose batch norm has the statistics of images."""
    torch.manual_seed(0)
    network = timm.create_model(name)
    if not takes_one_size(name):
        with torch.no_grad():
            network.train()(normalized(name, images(8)))
    return network.eval()


def takes_one_size(name: str) -> bool:
    return timm.get_pretrained_cfg(name).fixed_input_size


def normalized(name: str, grey: torch.Tensor) -> torch.Tensor:
    """Return images as timm's own transforms give them."""
    config = timm.get_pretrained_cfg(name)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.mean, config.std))
    return (grey / 255 - mean) / std


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_fit_and_all_that_an_export_is_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arch = f"timm/{name}"
    data = draw_collection(tmp_path / "data", {f"{split}/{c}": 6 for split in ("train", "val") for c in "AB"})
    options = {"size": SIZE, "batch_size": 6, "workers": 0, "device": "cpu", "weights": "none", "epochs": 1}
    path = fit(data=data, arch=arch, valid="folder", name="mine", **options).path
    model = read_settings(path)
    assert model["architecture"] == arch and model["versions"]["timm"] == timm.__version__
    result = verify(path)
    assert result.ok, result
    opened = open_model(path, "cpu", precision="fp32")
    exact, features = opened.logits_and_features(images(), exact=True)
    assert features.shape == (4, model["backbone"]["features"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the network runs without fused")
        fast, fast_features = opened.logits_and_features(images())
    scale = exact.abs().max().clamp_min(1)
    assert (fast - exact).abs().max() < 1e-4 * scale
    assert (fast_features - features).abs().max() < 1e-4 * features.abs().max()
    maps = grad_cam(opened, images(), [0, 1, 0, 1])
    assert maps.shape[0] == 4 and maps.shape[1] == maps.shape[2] >= 2 and np.isfinite(maps).all()
    ensemble = open_model(joined(path, tmp_path / "two", members=2), "cpu", precision="fp32")
    assert verify(ensemble).ok and f"2 x {arch}" in str(verify(ensemble))
    both, their_features = ensemble.logits_and_features(images(), exact=True)
    torch.testing.assert_close(their_features[:, : features.shape[1]], features, rtol=1e-3, atol=1e-4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the network runs without fused")
        assert (ensemble.outputs(images()) - both).abs().max() < 1e-4 * both.abs().max().clamp_min(1)
    assert grad_cam(ensemble, images(), [0, 1, 0, 1]).shape == maps.shape
    learn = load_learner(path)
    assert all(torch.equal(t, opened.network.state_dict()[k]) for k, t in learn.model.state_dict().items())
    assert learn.predict(next((data / "train" / "A").iterdir()))[2].sum() == pytest.approx(1, abs=1e-5)
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    assert export_onnx(path, tmp_path / "mine.onnx").difference < 1e-4
    assert export_onnx(ensemble.path, tmp_path / "two.onnx").difference < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_groups_are_halves_by_depth(name):
    network = build_network(f"timm/{name}", 2, 0.5, SIZE)
    early, late, head = split_parameters(network, f"timm/{name}")
    assert {id(p) for group in (early, late, head) for p in group} == {id(p) for p in network.parameters()}
    assert len(early) + len(late) + len(head) == len(list(network.parameters()))
    order = [id(p) for p in network.parameters()]
    assert order.index(id(early[0])) == 0 and len(head) == 2
    assert 0.2 < len(early) / (len(early) + len(late)) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_timm_gives_the_features_of_the_original(name, tmp_path):
    """Whatever the network's own normalization is; its classifier and other parts that take no part stay out."""
    source = source_of(name)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    state, said = pretrained_state(f"timm/{name}", str(tmp_path / "weights.pth"))
    assert "all of the backbone" in said
    backbone = build_backbone(f"timm/{name}", state, SIZE)[:-1].eval()
    if takes_one_size(name):
        source.set_input_size(img_size=(SIZE, SIZE))
    with torch.no_grad():
        expected = source.forward_features(normalized(name, images()))
        found = backbone(Preprocessing("none")(images()))
    if takes_one_size(name):  # a class token, and tokens of places
        expected = expected[:, 1:].transpose(1, 2).reshape(found.shape)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet10t", "mobilenetv4_conv_small"])
def test_batch_norm_is_folded(name):
    network = build_network(f"timm/{name}", 2, 0.5, SIZE).eval()
    folded = fold_batch_norm(network)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    assert not any("batch_norm" in str(node.target) for node in folded.graph.nodes)
    batch = Preprocessing("none")(images())
    with torch.no_grad():
        assert torch.allclose(folded(batch), network(batch), atol=1e-4)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv4_conv_small"])
def test_batch_norm_over_processes_keeps_the_activation(name, one_process):
    network = build_network(f"timm/{name}", 2, 0, SIZE).train()
    names, batch = list(network.state_dict()), Preprocessing("none")(images(16))
    body = copy.deepcopy(network)[0]
    assert sync_batch_norm(network, torch.device("cpu"))
    assert list(network.state_dict()) == names
    features, expected = network[0](batch), body(batch)
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()
    features.square().mean().backward()
    expected.square().mean().backward()
    gradient, other = (torch.cat([p.grad.flatten() for p in part.parameters()]) for part in (network[0], body))
    assert (gradient - other).norm() < 1e-2 * other.norm()


def test_another_timm_network_is_refused(tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"not the weights of this arch= \(\d+ missing: "):
        pretrained_state("timm/convnextv2_atto", str(tmp_path / "weights.pth"))


def test_names_that_timm_does_not_know():
    with pytest.raises(UserError, match=r"arch timm/resnet10: timm .* has no such network; did you mean resnet10"):
        build_backbone("timm/resnet10", None, SIZE)


def test_a_fit_says_so_before_it_reads_the_images(tmp_path):
    with pytest.raises(UserError, match="has no such network"):
        fit(data=tmp_path / "nowhere", arch="timm/resnet10", exports=str(tmp_path / "exports"))


def test_a_size_that_the_network_does_not_take():
    with pytest.raises(UserError, match="size 32: timm/inception_v3 does not take such images"):
        build_backbone("timm/inception_v3", None, 32)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_weights_for_one_size_are_fitted_to_another(name):
    weights = bare(f"timm/{name}").state_dict()
    fitted, again, random = (build_timm(f"timm/{name}", SIZE, w).state_dict() for w in (weights, weights, None))
    assert all(torch.equal(again[key], t) for key, t in fitted.items())
    assert {key: t.shape for key, t in fitted.items()} == {key: t.shape for key, t in random.items()}
    same = [key for key, t in weights.items() if torch.equal(fitted[f"network.{key}"], t)]
    assert len(weights) // 2 < len(same) < len(weights)


@pytest.mark.slow
def test_an_export_whose_tensors_are_not_those_of_its_network(tmp_path, monkeypatch):
    """Shapes stand in model.json, the network is made by the installed timm."""
    monkeypatch.chdir(tmp_path)
    data = draw_collection(tmp_path / "data", {f"{split}/{c}": 6 for split in ("train", "val") for c in "AB"})
    options = {"size": 32, "batch_size": 6, "workers": 0, "device": "cpu", "weights": "none", "epochs": 1}
    path = fit(data=data, arch="timm/resnet10t", valid="folder", name="mine", **options).path
    file = Path(path) / "model.json"
    model = json.loads(file.read_text())
    name = next(iter(model["backbone"]["tensors"]))
    model["backbone"]["tensors"][name][0] += 1
    file.write_text(json.dumps(model))
    assert not verify(path).ok
    del model["backbone"]
    file.write_text(json.dumps(model))
    with pytest.raises(UserError, match="backbone: missing"):
        load_learner(path)
