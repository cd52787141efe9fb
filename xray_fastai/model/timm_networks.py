"""Builds timm's networks (`--arch timm/NAME`) as backbones that give feature maps. timm is an extra of this package."""

import copy
import difflib
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from xray_fastai.config.choices import TIMM
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import shown

PLAIN = ("Conv2d", "Conv2dSame")
"""Classes of a first layer whose weights are used as they are, so that they can be rewritten (`input_range`)."""


class TimmBackbone(nn.Module):
    """Maps images (B, 3, S, S) to the last features of one of timm's networks (B, F, h, w).

    The tokens of a transformer become a map again; those that stand for no place (class, registers) are left out.
    """

    def __init__(self, network: nn.Module, layout: "Layout"):
        super().__init__()
        self.network, self.layout = network, layout

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = self.network.forward_features(images)
        if self.layout.kind == "NHWC":
            return found.permute(0, 3, 1, 2)
        if self.layout.kind == "NLC":
            side = self.layout.side
            return found[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        return found

    def split(self) -> list[list[nn.Parameter]]:
        """Return the parameters of the earlier and of the later half of the layers, by timm's own numbers of them."""
        timm = import_timm()
        depths = timm.models.group_parameters(self.network, self.network.group_matcher(), reverse=True)
        middle, halves = max(depths.values()) // 2, ([], [])
        for name, parameter in self.network.named_parameters():
            halves[depths[name] > middle].append(parameter)
        return list(halves)


@dataclass(frozen=True)
class Layout:
    """Describes the features of a network for one size of image."""

    features: int  # F
    kind: str  # NCHW, NHWC, or NLC: tokens
    side: int  # h and w
    unused: tuple[str, ...]  # parts of timm's network that do not take part: they belong to the classifier


def import_timm() -> Any:
    """Return the library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(f'timm/NAME needs {error.name}, not installed; pip install "xray-fastai[timm]"') from None
    return timm


def check_name(arch: str | None) -> None:
    """Check that the installed timm knows a network; one that is not timm's, or None, passes.

    Raises:
        UserError: timm is not installed, or does not know the network.
    """
    if arch is None or not arch.startswith(TIMM):
        return
    timm, name = import_timm(), arch.removeprefix(TIMM)
    if not timm.is_model(name):
        known = difflib.get_close_matches(name.partition(".")[0], timm.list_models())
        hint = f"did you mean {', '.join(known)}?" if known else "see timm.list_models()"
        raise UserError(f"timm {timm.__version__} has no such network; {hint}", option="arch", value=arch)


def create(arch: str, **options: Any) -> nn.Module:
    """Build one of timm's networks without a classifier and with random weights, unless `options` say something else.

    Raises:
        UserError: as `check_name`; or timm cannot build it.
    """
    check_name(arch)
    try:
        return import_timm().create_model(arch.removeprefix(TIMM), num_classes=0, **options)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        fault = f"timm cannot build it ({shown(error, 200)}); give another"
        raise UserError(fault, option="arch", value=arch) from None


def config_of(arch: str) -> Any:
    """Return timm's `pretrained_cfg`: normalization, names of the first layer and the classifier.

    Raises:
        UserError: as `check_name`.
    """
    check_name(arch)
    return import_timm().get_pretrained_cfg(arch.removeprefix(TIMM))


def classifier_of(arch: str) -> str:
    name = config_of(arch).classifier
    return name if isinstance(name, str) else name[0]  # several heads, for distillation


@cache
def layout_of(arch: str, size: int) -> Layout:
    """Return what comes out of a network for images of `size` x `size`, found without computing.

    Raises:
        UserError: as `create`; or the network does not take such images, or gives no feature maps.
    """
    with torch.random.fork_rng(devices=[]):  # else the first network of a process would get other random weights
        network = create(arch, **_for_size(arch, size)).to("meta").eval()
    called: set[nn.Module] = set()
    for part in network.children():
        part.register_forward_pre_hook(lambda module, _: called.add(module))
    images = torch.empty(1, 3, size, size, device="meta")
    try:
        found = network.forward_features(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"{arch} does not take such images ({shown(error, 120)}); give another", option="size",
                        value=size) from None  # fmt: skip
    features, kind, side = network.num_features, None, 0
    if found.ndim == 4 and found.shape[1] == features:
        kind, side = "NCHW", found.shape[2]
    elif found.ndim == 4 and found.shape[3] == features:
        kind, side = "NHWC", found.shape[1]
    elif found.ndim == 3 and found.shape[2] == features:
        places = found.shape[1] - getattr(network, "num_prefix_tokens", 0)
        kind, side = "NLC", round(places**0.5)
        kind = kind if side**2 == places else None
    if kind is None:
        raise UserError(f"its features {list(found.shape)} are no map; give another", option="arch", value=arch)
    unused = tuple(name for name, part in network.named_children() if part not in called and list(part.parameters()))
    return Layout(features, kind, side, unused)


def build_timm(arch: str, size: int, weights: dict[str, torch.Tensor] | None = None) -> TimmBackbone:
    """Build a backbone for images of `size` x `size`.

    Args:
        arch: timm/NAME.
        size: side of the images.
        weights: tensors of `bare(arch)` by their names; None leaves random weights.

    Raises:
        UserError: as `layout_of`.
    """
    layout = layout_of(arch, size)
    network = create(arch, **_for_size(arch, size))
    if weights is not None:
        network.load_state_dict(network.state_dict() | _for_shapes_of(network, weights, arch, size))
    return TimmBackbone(_without(network, layout.unused), layout)


def _for_shapes_of(
    network: nn.Module, weights: dict[str, torch.Tensor], arch: str, size: int
) -> dict[str, torch.Tensor]:
    """Return weights in which the embeddings of positions are interpolated for images of `size`.

    The module of a network in timm has the function by which timm itself does so, under a name that is not documented.

    Raises:
        UserError: timm has none for this network.
    """
    own = network.state_dict()
    if all(own[name].shape == tensor.shape for name, tensor in weights.items()):
        return weights
    interpolated = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    fitted = {} if interpolated is None else interpolated(dict(weights), network)
    if any(name not in fitted or fitted[name].shape != own[name].shape for name in weights):
        native = config_of(arch).input_size[-1]
        raise UserError(f"weights of {arch} are for {native} pixels; give these", option="size", value=size)
    return {name: fitted[name] for name in weights}


def bare(arch: str) -> nn.Module:
    """Build a network for images of the size that timm's weights were trained with, without unused parts."""
    size = config_of(arch).input_size[-1]
    return _without(create(arch), layout_of(arch, size).unused)


def published(arch: str) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors of timm's weights and their name; from the cache of Hugging Face's hub, or the internet.

    Raises:
        UserError: timm has none, or they are not cached and cannot be downloaded.
    """
    config, name = config_of(arch), arch.removeprefix(TIMM)
    if not config.has_weights:
        raise UserError(f'timm has none for {name}; give a file, or weights="none"', option="weights", value="imagenet")
    try:
        network = create(arch, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # of what class depends on the library that downloads
        raise UserError(
            f"those of {arch} are not in Hugging Face's cache and could not be downloaded ({shown(error, 120)}). On a "
            f"computer with internet, get https://huggingface.co/{config.hf_hub_id}, and give its model.safetensors by "
            'weights=FILE. To train from scratch, give weights="none"',
            option="weights",
            value="imagenet",
        ) from None
    return network.state_dict(), f"timm's {config.architecture}.{config.tag}"


def check_first_layer(network: nn.Module, layer: str, arch: str) -> None:
    """Check that a first layer can be rewritten for another input.

    Raises:
        UserError: it changes its weights before it uses them.
    """
    kind = type(network.get_submodule(layer.removesuffix(".weight"))).__name__
    if kind not in PLAIN:
        raise UserError(
            f"its first layer, a {kind}, cannot be rewritten for this package's input; give another", option="arch",
            value=arch,
        )  # fmt: skip


def shapes_of(arch: str, size: int) -> dict[str, list[int]]:
    """Return the shapes of a backbone's tensors by their names in an export."""
    state = build_timm(arch, size).state_dict()
    return {f"0.0.{name}": list(tensor.shape) for name, tensor in state.items()}


def with_plain_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy in which timm's batch norm with an activation inside is torch's, with the activation behind it."""
    network = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.BatchNorm2d) and hasattr(layer, "act"):
            plain = nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum).to(layer.weight.device)
            plain.load_state_dict(layer.state_dict(), strict=False)
            network.set_submodule(name, nn.Sequential(plain, layer.drop, layer.act).train(layer.training))
    return network


def _for_size(arch: str, size: int) -> dict[str, int]:
    """Return the option by which a network that takes images of one size is built for `size`."""
    return {"img_size": size} if config_of(arch).fixed_input_size else {}


def _without(network: nn.Module, unused: tuple[str, ...]) -> nn.Module:
    for name in unused:
        setattr(network, name, nn.Identity())
    return network
