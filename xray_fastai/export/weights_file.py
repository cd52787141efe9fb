"""The weights of an export: read once, and compared with the network that they are for before they go into it."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from xray_fastai.system.errors import UserError
from xray_fastai.system.text import shown
from xray_fastai.system.untrusted import open_received

HEADER = 1_000_000
"""Bytes that a safetensors header may have; that of a resnet101, the largest here, has 70,000."""

TYPES = {torch.float32: "F32", torch.int64: "I64"}
"""What an export's tensors are, and how safetensors calls it."""


def read_tensors(
    folder: Path, name: str, sha256: str, network: dict[str, torch.Tensor], architecture: str
) -> dict[str, torch.Tensor]:
    """Read a safetensors file (https://huggingface.co/docs/safetensors: 8 bytes, the header's length; the header, JSON;
    the tensors' bytes).

    The file is opened once: the bytes that were hashed are those that become tensors. Its size is compared before
    memory is taken; hash, names, shapes and types before there is a tensor.

    Args:
        folder: where the file has to be.
        name: of the file.
        sha256: that it has to have, in hexadecimal.
        network: the `state_dict` that the tensors are for; of a network on the device "meta", which takes no memory.
        architecture: the network's name, for the error.

    Returns:
        The tensors, as `network` has them, on the CPU.

    Raises:
        UserError: the file is damaged, not the one that `sha256` is of, not of this network, or has values that are
            not finite.
    """
    file = folder / name
    wanted = sum(tensor.nbytes for tensor in network.values())
    with open_received(folder, name) as (stream, size):
        start = stream.read(8)
        header = int.from_bytes(start, "little")
        if len(start) < 8 or header > min(HEADER, size - 8):
            raise UserError(f"{file}: damaged: its header is cut short, or longer than the {HEADER:,} bytes it may be")
        if size - 8 - header != wanted:
            fault = "cut short, or not" if size - 8 - header < wanted else "not"
            raise UserError(
                f"{file}: {fault} the weights of {architecture}: {size - 8 - header:,} bytes of tensors instead of "
                f"{wanted:,}; get the export anew"
            )
        stream.seek(0)
        content = stream.read(size)
    if len(content) != size or content[:8] != start:
        raise UserError(f"{file}: changed while it was read; try again")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{file}: its SHA-256 is not the one in model.json; get the export anew")
    if fault := _difference(content[8 : 8 + header], network):
        raise UserError(f"{file}: not the weights of {architecture}: {fault}; get the export anew")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged: {shown(error, 120)}; get the export anew") from None
    for key, tensor in tensors.items():
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(f"{file}: {key} holds values that are not finite; get the export anew")
    return tensors


def _difference(header: bytes, network: dict[str, torch.Tensor]) -> str | None:
    """What the header has that the network has not, or the other way round."""
    try:
        told = json.loads(header)
        told.pop("__metadata__", None)
        found = {key: (value["dtype"], value["shape"]) for key, value in told.items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        return f"its header is damaged ({type(error).__name__})"
    wanted = {key: (TYPES[tensor.dtype], list(tensor.shape)) for key, tensor in network.items()}
    if missing := sorted(wanted.keys() - found.keys()):
        return f"{len(missing)} tensors are missing: {', '.join(missing[:3])}"
    if surplus := sorted(found.keys() - wanted.keys()):
        return f"{len(surplus)} tensors too many: {shown(', '.join(surplus[:3]), 120)}"
    for key, (kind, shape) in wanted.items():
        if found[key] != (kind, shape):
            return f"{key} is {shown(found[key][0], 10)} {shown(found[key][1], 40)} instead of {kind} {shape}"
    return None
