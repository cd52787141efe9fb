"""Reads the weights of an export once, and compares them with the network before they are loaded into it."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from xray_fastai.system.errors import UserError
from xray_fastai.system.text import count_of, shown
from xray_fastai.system.untrusted import open_received

HEADER = 1_000_000
"""The largest accepted safetensors header, in bytes; that of a resnet101, the largest here, has 70,000."""

TYPES = {torch.float32: "F32", torch.int64: "I64"}
"""The types of an export's tensors, and their names in safetensors."""


def read_tensors(
    folder: Path, name: str, sha256: str, network: dict[str, torch.Tensor], architecture: str
) -> dict[str, torch.Tensor]:
    """Read a safetensors file and check it.

    The format is 8 bytes with the header's length, the header (JSON), and the tensors' bytes
    (https://huggingface.co/docs/safetensors). The file is read once, so the tensors come from the same bytes as the
    hash. The size is compared before memory is taken; hash, names, shapes and types before tensors are made.

    Args:
        folder: holds the file.
        name: the file's name.
        sha256: the expected hash, in hexadecimal.
        network: the `state_dict` that the tensors are for; on the device "meta" it takes no memory.
        architecture: the network's name, for the error.

    Returns:
        The tensors by the names of `network`, on the CPU.

    Raises:
        UserError: the file is damaged, has another hash, belongs to another network, or has values that are not finite.
    """
    file = folder / name
    expected = sum(tensor.nbytes for tensor in network.values())
    with open_received(folder, name) as (stream, size):
        start = stream.read(8)
        header = int.from_bytes(start, "little")
        if len(start) < 8 or header > min(HEADER, size - 8):
            raise UserError(f"{file}: damaged: its header is incomplete, or longer than {HEADER:,} bytes; get it again")
        if size - 8 - header != expected:
            fault = "incomplete, or not" if size - 8 - header < expected else "not"
            raise UserError(
                f"{file}: {fault} the weights of {architecture}: {size - 8 - header:,} bytes of tensors instead of "
                f"{expected:,}; get the export again"
            )
        stream.seek(0)
        content = stream.read(size)
    if len(content) != size or content[:8] != start:
        raise UserError(f"{file}: changed during reading; try again")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{file}: its SHA-256 is not the one in model.json; get the export again")
    if fault := _difference(content[8 : 8 + header], network):
        raise UserError(f"{file}: not the weights of {architecture}: {fault}; get the export again")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged: {shown(error, 120)}; get the export again") from None
    for key, tensor in tensors.items():
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(f"{file}: {key} holds values that are not finite; get the export again")
    return tensors


def _difference(header: bytes, network: dict[str, torch.Tensor]) -> str | None:
    """Return the first difference between a header and the network, or None."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        actual = {key: (value["dtype"], value["shape"]) for key, value in entries.items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        return f"its header is damaged ({type(error).__name__})"
    expected = {key: (TYPES[tensor.dtype], list(tensor.shape)) for key, tensor in network.items()}
    if missing := sorted(expected.keys() - actual.keys()):
        return f"{count_of(len(missing), 'missing tensor')}: {', '.join(missing[:3])}"
    if extra := sorted(actual.keys() - expected.keys()):
        return f"{count_of(len(extra), 'unknown tensor')}: {shown(', '.join(extra[:3]), 120)}"
    for key, (kind, shape) in expected.items():
        if actual[key] != (kind, shape):
            return f"{key} is {shown(actual[key][0], 10)} {shown(actual[key][1], 40)} instead of {kind} {shape}"
    return None
