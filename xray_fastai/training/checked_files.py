"""Writes a checkpoint's files atomically, with their checksums, and finds damage when it reads them."""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xray_fastai.system.files import atomic_write


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Write a `.safetensors` file atomically, and return its size and CRC-32."""
    with atomic_write(path, sync=True) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes its file readable by the owner only
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.chmod(mode)
        return checksum(temporary)


def write_json(path: Path, content: Any) -> None:
    """Write JSON with its CRC-32 atomically."""
    text = json.dumps(content)
    with atomic_write(path, sync=True) as temporary:
        temporary.write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "content": content}))


def read_json(path: Path) -> Any:
    """Read JSON that `write_json` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    try:
        outer = json.loads(path.read_text())
        content = outer["content"]
        intact = zlib.crc32(json.dumps(content).encode()) == outer["crc32"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a checkpoint: {error}") from None
    if not intact:
        raise ValueError("the checksum does not match")
    return content


def checksum(path: Path) -> dict[str, int]:
    """Return a file's size and CRC-32.

    CRC-32 detects damage, not forgery: it took 0.11 s for 300 MB, SHA-256 0.27 s.
    """
    crc, size = 0, 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"bytes": size, "crc32": crc}
