"""`fit --weights` takes checkpoints of other programs, whatever their input was, and refuses the wrong ones."""

import argparse
import pickle
import re
from pathlib import Path

import pytest
import torch
import torchvision
from fastai.vision.all import create_body
from safetensors.torch import save_file
from torch import nn

from tests.small_network import KINDS, TORCHVISIONS, register
from tests.small_network import NAME as SMALL
from xray_fastai.config.choices import ARCHITECTURES
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.model.architectures import build_backbone, build_whole
from xray_fastai.model.checkpoint import match
from xray_fastai.model.preprocessing import Preprocessing
from xray_fastai.model.pretrained import XRV_URL, pretrained_state
from xray_fastai.system.errors import UserError


def network_of(arch: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_whole(arch)


@pytest.fixture
def load(tmp_path):
    """Return what is read of a checkpoint, and what is said about it."""
    register()

    def load(content, arch=SMALL, name="weights.pth", **options):
        (save_file if name.endswith(".safetensors") else torch.save)(content, tmp_path / name)
        return pretrained_state(arch, str(tmp_path / name), **options)

    return load


def check_same(state, network, classifier="fc."):
    expected = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(classifier)}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def renamed(state, prefix, head="fc."):
    """Return a state dict with a prefix, and without the classifier."""
    return {f"{prefix}{name}": tensor for name, tensor in state.items() if not name.startswith(head)}


def moco(state, other):
    mlp = {"module.encoder_q.fc.0.weight": torch.rand(64, 64), "module.queue": torch.rand(128, 8)}
    return {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": renamed(other, "module.encoder_k.") | renamed(state, "module.encoder_q.") | mlp,
        "optimizer": {"state": {0: {"momentum_buffer": torch.rand(8, 3, 7, 7)}}, "param_groups": [{"lr": 0.03}]},
    }


CHECKPOINTS = {
    "DistributedDataParallel": lambda state, _: {f"module.{name}": tensor for name, tensor in state.items()},
    "timm": lambda state, other: {"epoch": 3, "state_dict": other, "state_dict_ema": state},
    "MoCo": moco,
    "DINO": lambda state, other: {
        "student": renamed(other, "module.backbone."),
        "teacher": renamed(state, "backbone.") | {"head.mlp.0.weight": torch.rand(4, 4)},
        "center": torch.rand(4),
    },
    "BYOL": lambda state, other: {
        "model_state_dict": renamed(other, "target_encoder.net.") | renamed(state, "online_encoder.net.")
    },
    "Lightning": lambda state, _: {
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 0.1},
        "state_dict": {f"model.backbone.{name}": tensor for name, tensor in state.items()},
    },
    "lightly-train": lambda state, other: {
        "state_dict": renamed(other, "student_embedding_model.wrapped_model._model.")
        | renamed(state, "teacher_embedding_model.wrapped_model._model.")
    },
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_of(kind, load):
    right, wrong = network_of(SMALL), network_of(SMALL, seed=1)
    state, said = load(CHECKPOINTS[kind](right.state_dict(), wrong.state_dict()))
    check_same(state, right)
    assert f"{len(state)} tensors loaded" in said and "\n" not in said


def test_what_was_not_loaded_is_said(load):
    own = network_of(SMALL)
    assert load(own.state_dict())[1] == (
        f"weights.pth: {len(own.state_dict()) - 2} tensors loaded, all of the backbone, without the classifier (fc: 2)"
    )
    content = {"state_dict": renamed(own.state_dict(), "module.encoder_q.") | {"module.queue": torch.rand(3)}}
    said = load(content)[1]
    assert said.endswith(
        "tensors loaded (state_dict.module.encoder_q.*), all of the backbone, without 1 other (state_dict.module.queue)"
    )


def test_another_classifier_and_none(load):
    own = network_of(SMALL).state_dict()
    for content in (own | {"fc.weight": torch.rand(5, 64), "fc.bias": torch.rand(5)}, renamed(own, "")):
        check_same(load(content)[0], network_of(SMALL))


def test_parts_that_are_numbered(load):
    """RadImageNet's files number the children of the network, as fastai does those of its body."""
    network = network_of(SMALL)
    children = nn.Sequential(*list(network.children())[:-1])
    check_same(load(renamed(children.state_dict(), "backbone."))[0], network)
    learner = nn.Sequential(create_body(network, pretrained=False), nn.Sequential(nn.Linear(64, 2)))
    check_same(load({"model": learner.state_dict(), "opt": {"hypers": []}})[0], network)
    check_same(load(learner.state_dict(), name="weights.safetensors")[0], network)


@pytest.mark.slow
@pytest.mark.parametrize("arch", KINDS)
def test_the_numbered_parts_of(arch, load):
    network = network_of(arch)
    body = create_body(network, pretrained=False, cut=-1 if arch == "densenet121" else None)  # as `vision_learner`
    check_same(load(renamed(body.state_dict(), "0."), arch)[0], network, ARCHITECTURES[arch].classifier + ".")


# shapes of timm 1.0.31 under its names, in the order of its network
TIMM = {
    "convnext_tiny": {
        "stem.0.weight": (96, 3, 4, 4), "stem.1.bias": (96,), "stages.0.blocks.2.gamma": (96,),
        "stages.1.downsample.0.weight": (96,), "stages.1.downsample.1.weight": (192, 96, 2, 2),
        "stages.2.blocks.8.conv_dw.weight": (384, 1, 7, 7), "stages.2.blocks.8.norm.weight": (384,),
        "stages.3.blocks.0.mlp.fc1.weight": (3072, 768), "stages.3.blocks.2.mlp.fc2.bias": (768,),
    },
    "efficientnet_b0": {
        "conv_stem.weight": (32, 3, 3, 3), "bn1.running_mean": (32,), "blocks.0.0.conv_dw.weight": (32, 1, 3, 3),
        "blocks.0.0.se.conv_reduce.weight": (8, 32, 1, 1), "blocks.0.0.conv_pw.weight": (16, 32, 1, 1),
        "blocks.0.0.bn2.weight": (16,), "blocks.1.0.conv_pw.weight": (96, 16, 1, 1),
        "blocks.1.1.se.conv_expand.bias": (144,), "blocks.6.0.conv_pwl.weight": (320, 1152, 1, 1),
        "blocks.6.0.bn3.running_var": (320,), "conv_head.weight": (1280, 320, 1, 1), "bn2.bias": (1280,),
    },
}  # fmt: skip


@pytest.mark.parametrize("arch", TIMM)
def test_timms_names_of(arch):
    with torch.device("meta"):
        own = build_whole(arch).state_dict()
        found = match(arch, {name: torch.empty(shape) for name, shape in TIMM[arch].items()})
    assert found.found.keys() <= own.keys() and len(found.found) == len(TIMM[arch]) and not found.bent
    assert len(set(found.names.values())) == len(found.names) == len(found.own)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet50", "densenet121", "convnext_tiny", "efficientnet_b0"])
def test_the_names_of_the_installed_timm(arch):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        tensors = timm.create_model(arch).state_dict()
        found = match(arch, tensors)
    assert found.fits, found.describe_faults()


def test_the_old_names_of_densenet():
    with torch.device("meta"):
        state = build_whole("densenet121").state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", name): tensor for name, tensor in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert match("densenet121", old).fits


def test_the_wrong_architecture_is_refused_with_the_right_one(load):
    state = torchvision.models.resnet34(weights=None).state_dict()
    with pytest.raises(UserError, match=r'unknown: layer1\.2\..*they are those of arch="resnet34"'):
        load({"state_dict": renamed(state, "module.")}, "resnet18")
    with pytest.raises(UserError, match=r'missing: layer1\.2\..*arch="resnet18"'):
        load(torchvision.models.resnet18(weights=None).state_dict(), "resnet34")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda tensor: tensor.to("meta"), "no"),
        (lambda tensor: tensor.to_sparse(), "sparse"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "quantized"),
        (lambda tensor: tensor.to(torch.int8), "int8"),
        (lambda tensor: tensor.to(torch.complex64), "complex64"),
    ],
    ids=["meta", "sparse", "quantized", "integers", "complex"],
)
@pytest.mark.filterwarnings("ignore")  # torch's own, of what is quantized
def test_tensors_that_are_no_plain_numbers_are_refused(change, kind, load):
    own = network_of(SMALL).state_dict()
    own["conv1.weight"] = change(own["conv1.weight"])
    with pytest.raises(UserError, match=rf"^\S+: conv1\.weight holds {kind} values; save the weights as float32$"):
        load(own)


@pytest.mark.filterwarnings("ignore")  # torch's own, of TorchScript
def test_an_archive_of_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"a TorchScript archive, .*; save network\.state_dict\(\)$"):
        pretrained_state(SMALL, str(tmp_path / "net.pt"))


def test_the_reason_of_a_damaged_file_is_short(tmp_path):
    torch.save(network_of(SMALL).state_dict(), tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"not a readable weights file \(.{20,120}\); get it again$"):
        pretrained_state(SMALL, str(tmp_path / "cut.pth"))


def test_a_part_of_a_network_is_refused(load):
    own = network_of(SMALL).state_dict()
    del own["layer2.0.bn1.bias"]
    with pytest.raises(UserError, match=r"not the weights of this arch= \(1 missing: layer2\.0\.bn1\.bias\)$"):
        load(own)
    own = network_of(SMALL).state_dict()
    own["conv1.weight"] = own["conv1.weight"][:, :2].contiguous()
    with pytest.raises(UserError, match=r"1 of another shape: conv1\.weight \[8, 2, 7, 7\] instead of \[8, 3, 7, 7\]"):
        load(own)
    own["conv1.weight"] = torch.full((8, 3, 7, 7), torch.nan)
    with pytest.raises(UserError, match=r"conv1\.weight holds values that are not finite"):
        load(own)


def test_tensors_of_half_precision_and_without_counters(load):
    own = {k: t.half() for k, t in network_of(SMALL).state_dict().items() if not k.endswith("num_batches_tracked")}
    state, _ = load(own)
    assert build_backbone(SMALL, state)[0].weight.dtype == torch.float32


def test_a_pickle_of_more_than_tensors_is_refused_with_the_lines_that_convert_it(load, tmp_path, monkeypatch):
    own = network_of(SMALL)
    content = {"state_dict": own.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 3}
    with pytest.raises(UserError) as refused:
        load(content, name="dino.ckpt")
    first, *lines = refused.value.on_command_line({"weights": "--weights"}).splitlines()
    assert first.startswith(f"--weights {tmp_path / 'dino.ckpt'}: holds argparse.Namespace besides tensors")
    assert len(lines) == 2
    exec("\n".join(lines), {})
    check_same(pretrained_state(SMALL, str(tmp_path / "dino-tensors.pth"))[0], own)
    torch.save(nn.Sequential(own), tmp_path / "whole.pth")
    with pytest.raises(UserError, match=r"holds torch\.nn\.modules\.container\.Sequential besides tensors") as refused:
        pretrained_state(SMALL, str(tmp_path / "whole.pth"))
    exec("\n".join(str(refused.value).splitlines()[1:]), {})
    check_same(pretrained_state(SMALL, str(tmp_path / "whole-tensors.pth"))[0], own)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.rand(3)], ids=["list", "numbers", "tensor"])
def test_a_file_without_named_tensors(content, load):
    with pytest.raises(UserError, match=r"holds no tensors by name; save network\.state_dict\(\)"):
        load(content)


def grey_images(size=48) -> torch.Tensor:
    return torch.randint(0, 256, (3, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def one_channel(arch: str) -> nn.Module:
    network = network_of(arch)
    name, layer = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    bias = layer.bias is not None
    new = nn.Conv2d(1, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, bias=bias)
    network.set_submodule(name, new)
    return network


def features(arch: str, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the maps (B, F, h, w) of torchvision's own network, before it pools them."""
    if hasattr(network, "features"):
        maps = network.features(images)
        return maps.relu() if arch.startswith("densenet") else maps
    for name, part in network.named_children():
        if name == "avgpool":
            break
        images = part(images)
    return images


def trained(arch: str, network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Give batch norm the statistics of images, as in a network that was trained."""
    with torch.no_grad():
        features(arch, network.train(), images)
    return network.eval()


@pytest.mark.parametrize("black_white", [(-1024.0, 1024.0), (0.0, 255.0), (1.0, 0.0)])
@pytest.mark.parametrize("arch", [SMALL, *(pytest.param(arch, marks=pytest.mark.slow) for arch in KINDS[2:])])
def test_one_channel_gives_the_features_of_the_original(arch, black_white, load):
    """At the borders, too, where the zeros around an image are another grey value in each normalization."""
    black, white = black_white
    images = grey_images()
    own_input = black + (white - black) * images.float() / 255  # (B, 1, S, S)
    original = trained(arch, one_channel(arch), own_input)
    state, said = load(original.state_dict(), arch, weights_range=f"{black:g},{white:g}")
    assert said.endswith(f", for an input of {black:g} to {white:g}")
    backbone = build_backbone(arch, state)[:-1].eval()
    with torch.no_grad():
        expected = features(arch, original, own_input)
        found = backbone(Preprocessing("none")(images))
    assert expected.std() > 1e-3
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_three_channels_of_another_range(load):
    """RadImageNet's networks were trained on (value - 127.5) / 127.5 in each channel."""
    images = grey_images()
    own_input = (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)
    original = trained(SMALL, network_of(SMALL), own_input)
    state, _ = load(original.state_dict(), weights_range="-1,1")
    with torch.no_grad():
        expected = features(SMALL, original, own_input)
        found = build_backbone(SMALL, state)[:-1].eval()(Preprocessing("none")(images))
        other = build_backbone(SMALL, load(original.state_dict())[0])[:-1].eval()(Preprocessing("none")(images))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max() < (other - expected).abs().max()


def test_one_channel_needs_its_range(load):
    state = one_channel(SMALL).state_dict()
    with pytest.raises(UserError, match=r"weights_range: weights\.pth is of a network for one channel; give"):
        load(state)


@pytest.mark.parametrize("text", ["1", "1,1", "a,b", "0,1,2", "0,nan", ""])
def test_a_range_is_two_numbers(text):
    with pytest.raises(UserError, match="give two different numbers, such as 0,1 or -1024,1024"):
        FitConfig(weights="file.pth", weights_range=text)
    with pytest.raises(UserError, match="weights_range 0,1: is for a file in weights=; leave it out"):
        FitConfig(weights="xrv", weights_range="0,1")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder in which torch hub keeps files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.slow
def test_xrv_gives_the_features_of_torchxrayvision(hub):
    original = one_channel("resnet50")
    original.fc = nn.Linear(2048, 18)
    images = grey_images(64)
    own_input = (2 * (images.float() / 255) - 1) * 1024  # torchxrayvision/utils.py: normalize
    trained("resnet50", original, own_input)
    torch.save(original.state_dict(), hub / Path(XRV_URL).name)
    state, said = pretrained_state("resnet50", "xrv")
    assert said.startswith(f"torchxrayvision resnet50-res512-all ({Path(XRV_URL).name}: 318 tensors loaded")
    with torch.no_grad():
        expected = features("resnet50", original, own_input)
        found = build_backbone("resnet50", state)[:-1].eval()(Preprocessing("none")(images))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("arch", [arch for arch in TORCHVISIONS if arch != "resnet50"])
def test_xrv_is_a_resnet50(arch, hub):
    with pytest.raises(UserError, match=f"weights xrv: are those of resnet50, and arch= is {arch}; give"):
        pretrained_state(arch, "xrv")


def test_xrv_offline(hub, monkeypatch):
    for proxy in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # no server listens on this port
    with pytest.raises(UserError) as refused:
        pretrained_state("resnet50", "xrv")
    text = str(refused.value)
    assert text.startswith(f"weights xrv: {Path(XRV_URL).name} could not be downloaded (") and "\n" not in text
    assert XRV_URL in text and str(hub) in text
    assert not list(hub.iterdir())


def test_a_hostile_file_of_xrv_is_not_run(hub, tmp_path):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "trace"), "w")

    (hub / Path(XRV_URL).name).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="could run code"):
        pretrained_state("resnet50", "xrv")
    assert not (tmp_path / "trace").exists()
