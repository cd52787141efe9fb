"""Files that are on the disk whole, or not at all, and that show it when they are damaged later."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xray_fastai.system.files import sync_folder


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Write a `.safetensors` file under its final name only once it is on the disk; its size and CRC-32."""
    half = path.with_name(f"{path.name}.tmp")
    half.touch()
    mode = half.stat().st_mode  # safetensors makes it readable by its owner alone
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, half)
    half.chmod(mode)
    known = checked(half)
    _settle(half, path)
    return known


def write_json(path: Path, content: Any) -> None:
    """Write JSON with its CRC-32, under its final name only once it is on the disk."""
    text = json.dumps(content)
    half = path.with_name(f"{path.name}.tmp")
    half.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "content": content}))
    _settle(half, path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        OSError: it can't be read.
        ValueError: it is not as it was written.
    """
    try:
        outer = json.loads(path.read_text())
        content = outer["content"]
        whole = zlib.crc32(json.dumps(content).encode()) == outer["crc32"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no checkpoint: {error}") from None
    if not whole:
        raise ValueError("its content is not what was written")
    return content


def checked(path: Path) -> dict[str, int]:
    """A file's size and CRC-32: 0.11 s for 300 MB, where SHA-256 took 0.27 s; it is for damage, not for trust."""
    crc, size = 0, 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}


def _settle(half: Path, path: Path) -> None:
    with half.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(half, path)
    sync_folder(path.parent)
