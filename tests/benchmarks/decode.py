"""Measures how fast files are decoded to the network's size: ours, plain fastai, and the JPEG decoder's limit.

    python -m tests.benchmarks.decode

On one core. The files are the JPEGs of ORIGINALS=DIR, or of the folder `originals` next to XRAY_DATA, or drawn ones.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
from fastai.vision.all import PILImage, Resize, ResizeMethod
from PIL import Image

from tests.benchmarks.measuring import rates, show, whole_number
from xray_fastai.data.images import open_image
from xray_fastai.data.sources.phantom import draw

# -----------------------------------------------------------------------------
SIZES = [int(size) for size in os.environ.get("SIZES", "128,224").split(",")]
REPEATS = whole_number("REPEATS", 5)
DRAWN, SIDE = 12, 1400  # the number of drawn images, and their side in pixels
# -----------------------------------------------------------------------------


def find_images(folder: Path) -> list[Path]:
    beside = Path(os.environ["XRAY_DATA"]).parent / "originals" if "XRAY_DATA" in os.environ else None
    given = Path(os.environ["ORIGINALS"]) if "ORIGINALS" in os.environ else beside
    if given is not None and given.is_dir():
        return sorted(path for path in given.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    rng = np.random.default_rng(0)
    for i in range(DRAWN):
        draw(rng, None, SIDE).save(folder / f"{i}.jpeg", quality=90)
    return sorted(folder.iterdir())


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        paths = find_images(Path(temporary))
        sides = [max(Image.open(path).size) for path in paths]
        print(f"{len(paths)} JPEGs, {min(sides)} to {max(sides)} pixels wide or high")
        for size in SIZES:
            resize = Resize(size, ResizeMethod.Squish)

            def plain(resize=resize) -> int:
                for path in paths:
                    resize(PILImage.create(path))
                return len(paths)

            def ours(size=size) -> int:
                for path in paths:
                    open_image(path, size)
                return len(paths)

            def limit(size=size) -> int:
                for path in paths:
                    image = Image.open(path)
                    image.draft("L", (size, size))
                    image.load()
                return len(paths)

            ways = {"plain fastai": plain, "xray-fastai": ours, "limit: reduced decoding": limit}
            title = f"{size} x {size} px"
            show(title, rates(ways, REPEATS), "images/s", ("plain fastai", "limit: reduced decoding"))


if __name__ == "__main__":
    main()
