"""Which files show the same image: a perceptual hash, and a search for all pairs that are close in it.

The hash is that of Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), known as pHash:
the signs of an image's lowest cosine frequencies against their median. There 8 x 8 of them are taken; chest X-rays are
too much alike for that. Measured on the Kaggle collection's 5,232 images of train and val, whose only copies are 28
pairs of identical files, among 13.7 million pairs:

    8 x 8 = 64 bits      at most 2 bits apart: 28 true pairs of 38;    4: 28 of 200;    8: 28 of 8,752
    16 x 16 = 256 bits   at most 36 bits apart: 28 of 28;   38: 28 of 29;   48: 28 of 46

The pairs from 38 on are different children in the same pose (or one child, exposed again). The share of 500 of these
images that is found again within 24 bits, after an edit: JPEG quality 20, halved, brightness +20 %, contrast +-30 %,
noise of 10 grey values 1.00; gamma 0.7 or 1.5 0.99; 1 % cropped off each side 0.97; turned by 1 degree 0.78; large
letters stamped in 0.43; 2 % cropped 0.09; mirrored or inverted none. All 50 originals are within 12 bits of their
copies at 224 pixels.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from PIL import Image

SIDE, FREQUENCIES = 32, 16
NEAR = 24
"""Bits of 256 that two hashes of one image differ in at most. No two images of different X-rays are that close in the
Kaggle collection (the closest are 38 apart) or in the phantom's 600 drawings (30)."""
FLAT = 4.0
"""Grey images of less contrast than this (standard deviation, of 255) show nothing, and their hash is noise."""
_COSINES = np.cos(np.pi * np.outer(np.arange(FREQUENCIES), 2 * np.arange(SIDE) + 1) / (2 * SIDE)).astype(np.float32)
_COSINES[0] /= np.sqrt(2)  # the orthonormal DCT-II, but for a factor that no sign depends on
_BLOCK = 2**22  # pairs compared at once: 32 MB a step, whatever the number of images


def perceptual_hash(image: Image.Image) -> bytes:
    """256 bits, close for images that show the same, whatever their size, compression, brightness and contrast.

    Args:
        image: of mode "L", at least 32 pixels a side.
    """
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(np.float32)
    low = (_COSINES @ pixels @ _COSINES.T).ravel()
    return np.packbits(low > np.sort(low[1:])[len(low) // 2 - 1]).tobytes()  # the first is the mean brightness


def near_pairs(hashes: np.ndarray, most: int = NEAR) -> Iterator[np.ndarray]:
    """All pairs that differ in few bits.

    Every hash is compared with every other, in blocks of bounded memory: 5,232 take 0.3 s, 100,000 take 78 s.

    Args:
        hashes: (N, 4) of uint64.
        most: bits that may differ.

    Yields:
        (pairs, 2): the rows' numbers, the smaller first.
    """
    rows = max(1, _BLOCK // max(1, len(hashes)))
    for start in range(0, len(hashes), rows):
        block, rest = hashes[start : start + rows], hashes[start:]
        apart = np.zeros((len(block), len(rest)), np.uint16)
        for word in range(hashes.shape[1]):
            apart += np.bitwise_count(block[:, word, None] ^ rest[None, :, word])
        first, second = np.nonzero(apart <= most)
        later = second > first
        yield np.stack([first[later], second[later]], axis=1) + start


def same_image(table: pd.DataFrame) -> np.ndarray:
    """A number for each image, equal for identical and near-identical ones, and for what these link.

    Args:
        table: with columns `digest`, `hash` and `contrast`, as `facts.Facts` has them.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers, _ = pd.factorize(table.digest)  # identical files are compared once
    firsts = np.unique(numbers, return_index=True)[1]
    seen = firsts[table.contrast.to_numpy()[firsts] >= FLAT]
    if len(seen) == 0:
        return numbers
    hashes = np.frombuffer(b"".join(table.hash.iloc[seen]), np.uint64).reshape(len(seen), -1)
    pairs = seen[np.concatenate(list(near_pairs(hashes)))]  # of rows
    left, right = numbers[pairs].T
    edges = coo_array((np.ones(len(left)), (left, right)), shape=(len(firsts), len(firsts)))
    return connected_components(edges, directed=False)[1][numbers]
