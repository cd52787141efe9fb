"""Finds the tensors of a backbone in a checkpoint, whatever program wrote it.

Programs nest them (`state_dict`, `model`, `teacher`), wrap the network (`module.`, `backbone.`, `encoder_q.`), number
its parts (`0.weight`, as RadImageNet and fastai do) or name them in their own way (timm). So nested tables become one
with dotted names, and the tensors are looked for under every prefix of these names.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from xray_fastai.config.choices import ARCHITECTURES, TIMM
from xray_fastai.model.architectures import build_whole, on_start
from xray_fastai.model.timm_networks import classifier_of
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import count_of, shown

CHANNELS = 3
"""Channels of an image that torchvision's networks take; no other of their convolutions has so few."""
DEPTH = 8
"""How deeply tables may be nested."""
COUNTER = "num_batches_tracked"
"""How the names of batch norm's counters end; files from before torch 0.4.1 lack them, and nothing reads them."""

# Where two networks of a checkpoint fit equally well, the first of these kinds is taken. DINO evaluates its teacher;
# MoCo and BYOL hand over the network that was trained, and not its average.
_PREFERRED, _LAST = re.compile(r"teacher|(?<![a-z])ema(?![a-z])"), re.compile("student|encoder_k|momentum|target")

# the published files of densenet name layers `norm.1`, torchvision's network `norm1` (torchvision/models/densenet.py)
_OLD_DENSENET = [(r"(denselayer\d+\.(?:norm|relu|conv))([12])\.", r"\1.\2.")]
# torchvision's names (convnext.py, efficientnet.py), and timm's for the same tensors
_TIMM_CONVNEXT = [
    (r"^features\.0\.", "stem."),
    (r"^features\.([246])\.(\d)\.", lambda m: f"stages.{int(m[1]) // 2}.downsample.{m[2]}."),
    (r"^features\.([1357])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"layer_scale$", "gamma"),
    (r"block\.0\.", "conv_dw."),
    (r"block\.2\.", "norm."),
    (r"block\.3\.", "mlp.fc1."),
    (r"block\.5\.", "mlp.fc2."),
]
_TIMM_EFFICIENTNET = [
    (r"^features\.0\.0\.", "conv_stem."),
    (r"^features\.0\.1\.", "bn1."),
    (r"^features\.8\.0\.", "conv_head."),
    (r"^features\.8\.1\.", "bn2."),
    (r"^features\.1\.(\d+)\.block\.0\.0\.", r"blocks.0.\1.conv_dw."),  # the first stage's blocks do not expand
    (r"^features\.1\.(\d+)\.block\.0\.1\.", r"blocks.0.\1.bn1."),
    (r"^features\.1\.(\d+)\.block\.1\.", r"blocks.0.\1.se."),
    (r"^features\.1\.(\d+)\.block\.2\.0\.", r"blocks.0.\1.conv_pw."),
    (r"^features\.1\.(\d+)\.block\.2\.1\.", r"blocks.0.\1.bn2."),
    (r"^features\.(\d)\.(\d+)\.", lambda m: f"blocks.{int(m[1]) - 1}.{m[2]}."),
    (r"block\.0\.0\.", "conv_pw."),
    (r"block\.0\.1\.", "bn1."),
    (r"block\.1\.0\.", "conv_dw."),
    (r"block\.1\.1\.", "bn2."),
    (r"block\.2\.", "se."),
    (r"block\.3\.0\.", "conv_pwl."),
    (r"block\.3\.1\.", "bn3."),
    (r"se\.fc1\.", "se.conv_reduce."),
    (r"se\.fc2\.", "se.conv_expand."),
]
OTHER_NAMES = {"densenet121": _OLD_DENSENET, "convnext_tiny": _TIMM_CONVNEXT, "efficientnet_b0": _TIMM_EFFICIENTNET}
"""By architecture, replacements that make the names of other files of torchvision's; timm's resnets have these."""


def tensors_of(content: Any) -> dict[str, torch.Tensor] | None:
    """Return all tensors of a file by their dotted names; None if it is no table, or holds no tensor."""
    tensors = {}

    def add(table: Mapping, prefix: str, depth: int) -> None:
        for key, value in table.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{key}"] = value
            elif isinstance(value, Mapping) and depth < DEPTH:
                add(value, f"{prefix}{key}.", depth + 1)

    if isinstance(content, Mapping):
        add(content, "", 0)
    return tensors or None


@dataclass(frozen=True)
class Match:
    """Describes how the tensors of a file fit the backbone of one architecture."""

    arch: str
    own: dict[str, torch.Tensor]  # the backbone's by torchvision's names, on the device "meta"
    tensors: dict[str, torch.Tensor]  # the file's, by the names in it
    prefix: str  # of the names in the file
    names: dict[str, str]  # of the backbone's tensors in such a file, without the prefix: torchvision's

    @cached_property
    def found(self) -> dict[str, torch.Tensor]:
        """The file's tensors by torchvision's names, in the shapes of the file."""
        pairs = ((name, self.tensors.get(self.prefix + alias)) for alias, name in self.names.items())
        return {name: tensor for name, tensor in pairs if tensor is not None}

    @property
    def missing(self) -> list[str]:
        return sorted(name for name in self.own.keys() - self.found.keys() if not name.endswith(COUNTER))

    @cached_property
    def bent(self) -> list[str]:
        """The tensors that have another shape, with both shapes."""
        return [
            f"{name} {list(tensor.shape)} instead of {list(self.own[name].shape)}"
            for name, tensor in self.found.items()
            if not _has_shape_of(tensor, self.own[name])
        ]

    @cached_property
    def rest(self) -> list[str]:
        """The file's other tensors, by their names in it."""
        used = {self.prefix + alias for alias in self.names}
        return [name for name in self.tensors if name not in used]

    @property
    def classifier(self) -> list[str]:
        start = f"{self.prefix}{_classifier(self.arch)}."
        return [name for name in self.rest if name.startswith(start)]

    @property
    def unknown(self) -> list[str]:
        """Tensors of the file that stand in a part of the backbone which does not have them: a larger network's."""
        parts = {alias.partition(".")[0] for alias in self.names}
        inside = (name.removeprefix(self.prefix) for name in self.rest if name.startswith(self.prefix))
        return sorted(name for name in inside if name.partition(".")[0] in parts)

    @property
    def fits(self) -> bool:
        return not (self.missing or self.bent or self.unknown)

    @property
    def first_layer(self) -> str:
        """The name of the convolution that takes the image."""
        return next(name for name, tensor in self.own.items() if tensor.ndim == 4 and tensor.shape[1] == CHANNELS)

    @property
    def channels(self) -> int:
        """The channels of an image that the file's network takes: 1 or 3."""
        return self.found[self.first_layer].shape[1]

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors by torchvision's names, in its shapes, but for a first layer of one channel."""
        return {
            name: tensor if tensor.numel() < self.own[name].numel() else tensor.reshape(self.own[name].shape)
            for name, tensor in self.found.items()
        }

    def describe(self) -> str:
        """Return what is loaded and what is not, for people."""
        under = f" ({shown(self.prefix, 60)}*)" if self.prefix else ""
        text = f"{count_of(len(self.found), 'tensor')} loaded{under}, all of the backbone"
        classifier, others = self.classifier, [name for name in self.rest if name not in set(self.classifier)]
        if classifier:
            text += f", without the classifier ({_classifier(self.arch)}: {len(classifier)})"
        if others:
            text += f"{' and' if classifier else ', without'} {count_of(len(others), 'other')} ({shown(others[0], 60)}"
            text += ", ...)" if len(others) > 1 else ")"
        return text

    def describe_faults(self) -> str:
        kinds = [("missing", self.missing), ("unknown", self.unknown), ("of another shape", self.bent)]
        return "; ".join(f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in kinds if names)


def match(arch: str, tensors: dict[str, torch.Tensor]) -> Match:
    """Find the backbone of an architecture among tensors, where most of its names are."""
    with on_start(arch):
        network = build_whole(arch).to("meta")
    classifier = f"{_classifier(arch)}."
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(classifier)}
    candidates = []
    for names in _names(arch, network, own):
        counts = Counter()
        for name, tensor in tensors.items():
            parts = name.split(".")
            for i in range(len(parts)):
                alias = names.get(".".join(parts[i:]))
                if alias is not None and _has_shape_of(tensor, own[alias]):
                    counts["".join(f"{part}." for part in parts[:i])] += 1
        candidates += [(count, -_rank(prefix), prefix, names) for prefix, count in counts.items()]
    candidates = candidates or [(0, 0, "", {name: name for name in own})]
    _, _, prefix, names = max(candidates, key=lambda candidate: candidate[:2])
    return Match(arch, own, tensors, prefix, names)


def backbone_of(arch: str, tensors: dict[str, torch.Tensor], origin: str) -> Match:
    """Find the backbone of an architecture among tensors, and check that it is whole.

    Behind a layer of random weights the others are worth nothing, so no tensor may be missing.

    Args:
        arch: a name in `ARCHITECTURES`.
        tensors: of a file, by their dotted names.
        origin: the file, for errors.

    Raises:
        UserError: tensors are missing, of another shape, or those of a larger network; the message names them, and the
            architecture that they fit. Or one of them has no plain numbers, or some that are not finite.
    """
    found = match(arch, tensors)
    if not found.fits:
        others = (match(other, tensors) for other in ARCHITECTURES if other != arch)
        right = next((f'; they are those of arch="{other.arch}"' for other in others if other.fits), "")
        raise UserError(f"{origin}: not the weights of this arch= ({shown(found.describe_faults(), 400)}){right}")
    for name, tensor in found.found.items():
        if (kind := _odd_kind(tensor, found.own[name])) is not None:
            raise UserError(f"{origin}: {name} holds {kind} values; save the weights as float32")
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{origin}: {name} holds values that are not finite; get the file again")
    return found


def _odd_kind(tensor: torch.Tensor, own: torch.Tensor) -> str | None:
    """Return the kind of values that the backbone's tensor `own` cannot take, such as integers; None if it can."""
    if tensor.is_meta:
        return "no"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_quantized:
        return "quantized"
    if own.is_floating_point() and not tensor.is_floating_point():
        return str(tensor.dtype).removeprefix("torch.")
    return None


def _names(arch: str, network: nn.Module, own: dict[str, torch.Tensor]) -> list[dict[str, str]]:
    """Return how programs name a backbone's tensors: each way as their names: torchvision's."""
    numbers = {name: str(i) for i, (name, _) in enumerate(network.named_children())}
    numbered = {}
    for name in own:
        part, _, rest = name.partition(".")
        if part in numbers:
            numbered[f"{numbers[part]}.{rest}"] = name
    ways = [{name: name for name in own}, numbered]
    if arch in OTHER_NAMES:
        other = {}
        for name in own:
            alias = name
            for pattern, replacement in OTHER_NAMES[arch]:
                alias = re.sub(pattern, replacement, alias)
            other[alias] = name
        ways.append(other)
    return ways


def _has_shape_of(tensor: torch.Tensor, own: torch.Tensor) -> bool:
    """Return whether a tensor has the shape of `own`, but for sides of 1, or is a first layer of one channel."""
    if own.ndim == 4 and own.shape[1] == CHANNELS and tensor.ndim == 4 and tensor.shape[1] == 1:
        return (tensor.shape[0], *tensor.shape[2:]) == (own.shape[0], *own.shape[2:])
    return [side for side in tensor.shape if side != 1] == [side for side in own.shape if side != 1]


def _classifier(arch: str) -> str:
    """Return the prefix of the classifier's tensors."""
    return classifier_of(arch) if arch.startswith(TIMM) else ARCHITECTURES[arch].classifier


def _rank(prefix: str) -> int:
    return 0 if _PREFERRED.search(prefix) else 2 if _LAST.search(prefix) else 1
