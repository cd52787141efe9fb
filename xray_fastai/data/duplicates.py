"""Find files that show the same image, by a perceptual hash and a search for all pairs of close hashes.

The hash is pHash (Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010): the signs of an
image's lowest cosine frequencies relative to their median. Zauner takes 8 x 8 frequencies. That is too few for chest
X-rays, which look very much alike. Measured on the Kaggle collection's 5,232 images of train and val (13.7 million
pairs), whose only copies are 28 pairs of identical files:

    8 x 8 = 64 bits      at most 2 bits differ: 28 true pairs of 38;   4: 28 of 200;    8: 28 of 8,752
    16 x 16 = 256 bits   at most 36 bits differ: 28 of 28;   38: 28 of 29;   48: 28 of 46

The pairs from 38 bits on are different children in the same pose (or one child, exposed twice).

The share of 500 of these images that is found within 24 bits after an edit: JPEG quality 20, half the size, brightness
+20 %, contrast +-30 %, noise of 10 grey values 1.00; gamma 0.7 or 1.5 0.99; 1 % cropped off each side 0.97; turned by
1 degree 0.78; large letters stamped in 0.43; 2 % cropped 0.09; mirrored or inverted 0. All 50 originals are within 12
bits of their copies at 224 pixels.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from PIL import Image

from xray_fastai.data.depth import FLAT

SIDE, FREQUENCIES = 32, 16
NEAR = 24
"""Two hashes that differ in at most this many of 256 bits are of the same image. Different X-rays differ in at least 38
bits in the Kaggle collection, and in at least 30 in the phantom's 510 drawings."""
_COSINES = np.cos(np.pi * np.outer(np.arange(FREQUENCIES), 2 * np.arange(SIDE) + 1) / (2 * SIDE)).astype(np.float32)
_COSINES[0] /= np.sqrt(2)  # the orthonormal DCT-II up to a factor, which changes no sign
_BLOCK = 2**22  # pairs in one step: 32 MB, for any number of images


def perceptual_hash(image: Image.Image) -> bytes:
    """Return a hash of 256 bits that changes little with size, compression, brightness and contrast.

    Args:
        image: mode "L", at least 32 pixels a side.
    """
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(np.float32)
    low = (_COSINES @ pixels @ _COSINES.T).ravel()
    return np.packbits(low > np.sort(low[1:])[len(low) // 2 - 1]).tobytes()  # the first is the mean brightness


def near_pairs(hashes: np.ndarray, max_bits: int = NEAR) -> Iterator[np.ndarray]:
    """Find all pairs of hashes that differ in few bits.

    Every hash is compared with every other, in blocks of bounded memory: 5,232 take 0.3 s, 100,000 take 78 s.

    Args:
        hashes: (N, 4) of uint64.
        max_bits: the largest number of bits that may differ.

    Yields:
        (pairs, 2): the numbers of the two rows, the smaller first.
    """
    rows = max(1, _BLOCK // max(1, len(hashes)))
    for start in range(0, len(hashes), rows):
        block, rest = hashes[start : start + rows], hashes[start:]
        apart = np.zeros((len(block), len(rest)), np.uint16)
        for word in range(hashes.shape[1]):
            apart += np.bitwise_count(block[:, word, None] ^ rest[None, :, word])
        first, second = np.nonzero(apart <= max_bits)
        later = second > first
        yield np.stack([first[later], second[later]], axis=1) + start


def same_image(table: pd.DataFrame) -> np.ndarray:
    """Number the images, with one number for identical and near-identical ones, also in a chain (A like B, B like C).

    Args:
        table: has the columns `digest`, `hash` and `contrast` of `image_facts.Facts`.

    Returns:
        (N,): the number of each image.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers, _ = pd.factorize(table.digest)  # of identical files, one is compared
    firsts = np.unique(numbers, return_index=True)[1]
    distinct = firsts[table.contrast.to_numpy()[firsts] >= FLAT]
    if len(distinct) == 0:
        return numbers
    hashes = np.frombuffer(b"".join(table.hash.iloc[distinct]), np.uint64).reshape(len(distinct), -1)
    pairs = distinct[np.concatenate(list(near_pairs(hashes)))]  # of rows
    left, right = numbers[pairs].T
    edges = coo_array((np.ones(len(left)), (left, right)), shape=(len(firsts), len(firsts)))
    return connected_components(edges, directed=False)[1][numbers]
