"""Makes the keys by which an export knows the images of its fit again, without their names or contents.

An export has a key of the content of each image of its fit: 6 bytes of a hash, with a salt of its own. So it grows by 8
bytes an image (5,232: 42 kB), and the keys of two exports cannot be compared. One of 100,000 other images is mistaken
for one of 5,232 with a probability of 2e-6. Who has an image can tell whether it was trained on, and no more. A file
that was saved again has another content, and is not found. (Hashes of what it shows are not stored: they show it,
blurred.)
"""

import base64
import contextlib
import hashlib
import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from xray_fastai.data.dataset import Collection
from xray_fastai.system.parallel import map_in_threads

KEY_BYTES = 6


def file_key(file: str) -> str:
    """Return the key of a file in `model.json`: the first 12 hexadecimal digits of the SHA-256 of its relative name.

    The key is enough to find the validation files again. File names may hold a patient's name, so an export has none.
    """
    return hashlib.sha256(file.encode()).hexdigest()[:12]


def contents_of(data: Collection) -> dict[str, str]:
    """Return the keys of the contents of a fit's images for `model.json`: sorted, in base64, with their salt."""
    salt = secrets.token_bytes(8)
    return {
        "salt": salt.hex(),
        "train": _packed(data.train.digest, salt),
        "valid": _packed(data.valid.digest, salt),
    }


def _packed(digests: Iterable[str], salt: bytes) -> str:
    return base64.b64encode(b"".join(sorted({_content_key(digest, salt) for digest in digests}))).decode()


def _content_key(digest: str, salt: bytes) -> bytes:
    return hashlib.blake2b(bytes.fromhex(digest), key=salt, digest_size=KEY_BYTES).digest()


def uses_in_fit(table: pd.DataFrame, contents: dict[str, str]) -> np.ndarray:
    """Return for each image what the fit used its content for (N,): "train", "valid" or ""."""
    salt, uses = bytes.fromhex(contents["salt"]), {}
    for use in ("valid", "train"):
        packed = base64.b64decode(contents[use])
        uses |= {packed[i : i + KEY_BYTES]: use for i in range(0, len(packed), KEY_BYTES)}

    def use_of(path: str) -> str:
        with contextlib.suppress(OSError), open(path, "rb") as stream:  # the reader of the pixels reports an error
            return uses.get(_content_key(hashlib.file_digest(stream, _md5).hexdigest(), salt), "")
        return ""

    return np.array(list(map_in_threads(use_of, table.path)), dtype=object)


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)  # as `image_facts.Facts.digest`
