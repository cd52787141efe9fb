"""Puts pictures into an HTML file, and makes large ones smaller so that together they keep to a size."""

import math
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from xray_fastai.system.text import data_uri
from xray_fastai.system.untrusted import read_received

PICTURE_FILE_BYTES, PICTURE_PIXELS = 100_000_000, 100_000_000
"""Limits of a picture file: an export may come from others."""


def embed_pictures(files: Iterable[Path], budget: int) -> dict[Path, dict[str, Any]]:
    """Convert PNG files to data URIs of together at most `budget` bytes before base64.

    Small files stay as they are, so the large ones get more of the budget; these become smaller JPEGs.

    Returns:
        For each file `uri`, `width` and `height` (of the file itself), `reduced` (whether it became smaller), and
        `fault`: why it cannot be shown, or None.
    """
    shares = {file: {"top_losses.png": 8, "batch.png": 3}.get(file.name, 1) for file in files}
    left, shares_left = budget, sum(shares.values())
    pictures = {}
    for file in sorted(shares, key=lambda file: file.stat().st_size / shares[file]):
        try:
            data, kind, (width, height) = _fit_into(file, left * shares[file] // shares_left)
            uri = data_uri(data, f"image/{kind}")
            pictures[file] = {"uri": uri, "width": width, "height": height, "reduced": kind == "jpeg", "fault": None}
            left -= len(data)
        except Exception as error:  # Pillow raises many kinds on a damaged file
            pictures[file] = {"fault": f"cannot be shown ({type(error).__name__}: {error})"}
        shares_left -= shares[file]
    return pictures


def _fit_into(file: Path, limit: int) -> tuple[bytes, str, tuple[int, int]]:
    """Return a PNG's bytes, or those of the largest JPEG within the limit; the kind; and the PNG's width and height."""
    data = read_received(file.parent, file.name, PICTURE_FILE_BYTES)
    with Image.open(BytesIO(data), formats=["PNG"]) as image:
        size = image.size
        if size[0] * size[1] > PICTURE_PIXELS:
            raise ValueError(f"{size[0]} x {size[1]} pixels")
        if len(data) <= limit:
            image.verify()
            return data, "png", size
        image = image.convert("RGB")
    scale = min(1.0, 65000 / max(size))  # a JPEG's side has at most 65,535 pixels
    while min(size) * scale >= 64:
        stream = BytesIO()
        smaller = image.resize([round(side * scale) for side in size], Image.Resampling.LANCZOS, reducing_gap=3.0)
        smaller.save(stream, "JPEG", quality=82, optimize=True, progressive=True)
        if stream.tell() <= limit:
            return stream.getvalue(), "jpeg", size
        scale *= min(0.9, math.sqrt(limit / stream.tell()))
    raise ValueError(f"{len(data):,} bytes cannot be reduced below {limit:,}")
