"""Reads the weights of an export once, and checks them before they are loaded into a network; numpy, without torch."""

import copy
import hashlib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from xray_fastai.config.choices import ARCHITECTURES, members_of, network_of
from xray_fastai.export.layout import SETTINGS
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import count_of, shown
from xray_fastai.system.untrusted import open_received

HEADER = 1_000_000
"""The largest accepted safetensors header, in bytes for each member; that of a resnet101, the largest here, has
70,000."""

BACKBONES = "backbones.json"
"""The file of names and shapes of each backbone's tensors. `python -m tests.export.test_backbones` writes it."""

FACTS = "facts"
"""The key of `facts_hash` in the metadata of the weights."""

BYTES = {"F32": 4, "I64": 8}
"""The types of an export's tensors as safetensors names them, and the bytes of a value."""

BACKBONE = "0."
"""How the names of the backbone's tensors begin."""

GATE = "gate."
"""How the names of the tensors begin that the network does not have: those of `inference.gate`."""

GATE_SIDE = 16
"""Side in pixels of the pictures that the gate compares."""

GATE_SPACES = {"statistics": 14, "pictures": GATE_SIDE**2, "features": None}
"""What the gate compares, and the length of the vectors; that of the features is the architecture's."""

Layout = dict[str, tuple[str, list[int]]]
"""Type and shape of each tensor by its name."""

Tensor = TypeVar("Tensor")


@cache
def _backbones() -> dict[str, dict[str, list[int]]]:
    return json.loads(files("xray_fastai.export").joinpath(BACKBONES).read_text(encoding="utf-8"))


def layout_of(architecture: str, classes: int, backbone: dict[str, Any] | None = None, members: int = 1) -> Layout:
    """Return the tensors of a network (`architectures.build_network`).

    Args:
        architecture: a name in `ARCHITECTURES`, or timm/NAME.
        classes: how many.
        backbone: `backbone` in `model.json`, for timm/NAME.
        members: of an ensemble, whose networks are joined to one (`model.ensemble`).
    """
    tensors = _backbones()[architecture] if backbone is None else backbone["tensors"]
    if members > 1:
        own = {name.removeprefix(BACKBONE): shape for name, shape in tensors.items()}
        tensors = {f"{_start_of(k)}{name}": shape for k in range(members) for name, shape in own.items()}
    features = members * features_of(architecture, backbone)
    shapes = tensors | {"1.3.weight": [classes, features], "1.3.bias": [classes]}
    counters = "num_batches_tracked"  # of batch norm: the only integers
    return {name: ("I64" if name.endswith(counters) else "F32", shape) for name, shape in shapes.items()}


def features_of(architecture: str, backbone: dict[str, Any] | None) -> int:
    """Return the channels of one backbone's last feature maps; the arguments are those of `layout_of`."""
    return ARCHITECTURES[architecture].features if backbone is None else backbone["features"]


def gate_layout_of(model: dict[str, Any]) -> Layout:
    """Return the tensors of an export's gate (`inference.gate`); none for one without a gate.

    That of an ensemble compares the features of its first member.

    Args:
        model: the settings, as `model_json.parse` returns them.
    """
    if model.get("gate") is None:
        return {}
    shapes, classes = {"upright": [GATE_SIDE**2]}, len(model["classes"])
    for name, length in GATE_SPACES.items():
        length = length or features_of(model["architecture"], model.get("backbone"))
        k = model["gate"]["dimensions"][name]
        parts = {"mean": [length], "directions": [k, length], "centres": [classes, k]}
        shapes |= {f"{name}.{part}": shape for part, shape in parts.items()}
    return {f"{GATE}{name}": ("F32", shape) for name, shape in shapes.items()}


def network_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those of an export's tensors that are the network's."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(GATE)}


def split_tensors(tensors: dict[str, Tensor], members: int) -> list[dict[str, Tensor]]:
    """Return the tensors of each network of an ensemble, by the names that they have in a network alone.

    Each gets a copy of the mean of the members' biases: no more is left of them.

    Args:
        tensors: of the joined network, NumPy's or torch's. Those of the head may be missing.
        members: how many there are; for 1 the tensors are returned in a list.
    """
    return [tensors] if members == 1 else [_of_member(tensors, member, members) for member in range(members)]


def _of_member(tensors: dict[str, Tensor], member: int, members: int) -> dict[str, Tensor]:
    start = _start_of(member)
    own = {f"{BACKBONE}{k.removeprefix(start)}": tensor for k, tensor in tensors.items() if k.startswith(start)}
    head = {name: copy.deepcopy(tensor) for name, tensor in tensors.items() if not name.startswith(BACKBONE)}
    if (weight := head.get("1.3.weight")) is not None:  # (classes, members * F)
        features = weight.shape[1] // members
        head["1.3.weight"] = members * weight[:, member * features : (member + 1) * features]
    return own | head


def _start_of(member: int) -> str:
    """Return how the names of the tensors of a member's backbone begin."""
    return f"{BACKBONE}0.{member}."


def size_of(layout: Layout) -> int:
    """Return the bytes that tensors take together."""
    return sum(BYTES[kind] * int(np.prod(shape, dtype=np.int64)) for kind, shape in layout.values())


def facts_hash(model: dict[str, Any]) -> str:
    """Return the SHA-256 of what weights were trained for: network, classes and their order, and preprocessing.

    A fit writes it into the metadata of the weights, so that a `model.json` with other facts is not taken for theirs.
    Temperature, intercepts and threshold may be chosen again.
    """
    facts = {name: model[name] for name in ("architecture", "classes", "preprocessing")}
    if members_of(model) > 1:
        facts["members"] = model["members"]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_weights(folder: Path, name: str, model: dict[str, Any]) -> dict[str, np.ndarray]:
    """Read a safetensors file and check it.

    The format is 8 bytes with the header's length, the header (JSON), and the tensors' bytes
    (https://huggingface.co/docs/safetensors). The file is read once, so the tensors come from the same bytes as the
    hash. The size is compared before memory is taken; hash, names, shapes and types before tensors are made.

    Args:
        folder: holds the file.
        name: the file's name.
        model: the settings, as `model_json.parse` returns them.

    Returns:
        The tensors by the names of `layout_of` and `gate_layout_of`.

    Raises:
        UserError: the file is damaged, has another hash, belongs to another network or other settings, or has values
            that are not finite.
    """
    file, network, members = folder / name, network_of(model), members_of(model)
    layout = layout_of(model["architecture"], len(model["classes"]), model.get("backbone"), members)
    layout |= gate_layout_of(model)
    expected, longest = size_of(layout), members * HEADER
    with open_received(folder, name) as (stream, size):
        start = stream.read(8)
        header = int.from_bytes(start, "little")
        if len(start) < 8 or header > min(longest, size - 8):
            fault = f"its header is incomplete, or longer than {longest:,} bytes"
            raise UserError(f"{file}: damaged: {fault}; get it again")
        if size - 8 - header != expected:
            fault = "incomplete, or not" if size - 8 - header < expected else "not"
            raise UserError(
                f"{file}: {fault} the weights of {network}: {size - 8 - header:,} bytes of tensors instead of "
                f"{expected:,}; get the export again"
            )
        stream.seek(0)
        content = stream.read(size)
    if len(content) != size or content[:8] != start:
        raise UserError(f"{file}: changed during reading; try again")
    if hashlib.sha256(content).hexdigest() != model["weights"]["sha256"]:
        raise UserError(f"{file}: its SHA-256 is not the one in model.json; get the export again")
    if fault := _difference(content[8 : 8 + header], layout):
        raise UserError(f"{file}: not the weights of {network}: {fault}; get the export again")
    expected_facts = json.loads(content[8 : 8 + header]).get("__metadata__", {}).get(FACTS)
    if expected_facts not in (None, facts_hash(model)):  # earlier exports have none
        raise UserError(
            f"{file}: trained for another architecture, other classes or another preprocessing than {SETTINGS} says; "
            "get the export again"
        )
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged: {shown(error, 120)}; get the export again") from None
    for key, tensor in tensors.items():
        if not np.isfinite([tensor.min(), tensor.max()]).all():  # NaN is both
            raise UserError(f"{file}: {key} holds values that are not finite; get the export again")
    return tensors


def _difference(header: bytes, layout: Layout) -> str | None:
    """Return the first difference between a header and the network's tensors, or None."""
    if header.count(b"[") + header.count(b"{") > 4 * len(layout) + 100:  # three a tensor
        return "its header is damaged (more lists and objects than its tensors have)"
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        actual = {key: (value["dtype"], value["shape"]) for key, value in entries.items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        return f"its header is damaged ({type(error).__name__})"
    if missing := sorted(layout.keys() - actual.keys()):
        return f"{count_of(len(missing), 'missing tensor')}: {', '.join(missing[:3])}"
    if extra := sorted(actual.keys() - layout.keys()):
        return f"{count_of(len(extra), 'unknown tensor')}: {shown(', '.join(extra[:3]), 120)}"
    for key, (kind, shape) in layout.items():
        if actual[key] != (kind, shape):
            return f"{key} is {shown(actual[key][0], 10)} {shown(actual[key][1], 40)} instead of {kind} {shape}"
    return None
