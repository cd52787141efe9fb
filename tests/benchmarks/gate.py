"""Measures what the gate of an export withholds: X-rays that it should call, and pictures that it should not.

    XRAY_DATA=chest_xray python -m tests.benchmarks.gate FOLDER

Groups of images are held out of train/, and with them all images of their patients: two groups that were taken
differently (`tests.benchmarks.shift`), and random patients. `fit` trains a network of each of ARCHS on the rest, and
FOLDER keeps it. The table has the share of the pictures that is withheld; a picture that `predict` refuses to read
counts as withheld. Another SEED holds out other random patients, none of whom an earlier one held out, trains from
other random weights, and draws other pictures.

The last lines are the cost: the CPU time of `predict` with the gate and without, at COST_SIZE pixels.

PICTURES, folders separated by colons, adds pictures of any kind, such as photographs; those that scikit-learn,
scikit-image, matplotlib and pydicom ship are found where these are installed.
"""

import contextlib
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from scipy.ndimage import gaussian_filter

from tests.benchmarks.measuring import whole_number
from tests.benchmarks.shift import held_out, link
from xray_fastai import fit
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.data.images import open_image
from xray_fastai.data.sources import phantom
from xray_fastai.evaluation.subgroups import appearance
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.stream import predict_batches
from xray_fastai.system.errors import ImageError

# -----------------------------------------------------------------------------
ARCHS = os.environ.get("ARCHS", "resnet18,resnet50").split(",")
EPOCHS = whole_number("EPOCHS", 10)
SIZE = whole_number("SIZE", 64, 32)
SEED = whole_number("SEED", 0, 0)
COUNT = whole_number("COUNT", 100)  # pictures of each drawn kind
PICTURES = [Path(folder) for folder in os.environ.get("PICTURES", "").split(":") if folder]
SIDE = 224  # of the pictures that are drawn
HOLDOUTS = ("least typical", "thumbnail")
SHARE = 1 / 8  # of the other patients, held out at random
CROPS = 4  # random crops of each photograph
COST_SIZE = whole_number("COST_SIZE", 224, 32)
CALLS, RUNS = 64, 7  # pictures, and runs with and without the gate in turns, for its cost
# -----------------------------------------------------------------------------

Draw = Callable[[np.random.Generator], np.ndarray | Image.Image]


def spread(values: np.ndarray) -> np.ndarray:
    """Scale values to 0 to 255, 8-bit."""
    return (255 * (values - values.min()) / np.ptp(values)).round().astype(np.uint8)


def smooth_noise(rng: np.random.Generator) -> np.ndarray:
    return spread(gaussian_filter(rng.normal(size=(SIDE, SIDE)), rng.uniform(1, 30)))


def near_blank(rng: np.random.Generator) -> np.ndarray:
    """Draw one tone with a little noise, a weak ramp, or a weak spot."""
    x, y = np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 2)
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(5, 40)
    shapes = [
        rng.normal(size=(SIDE, SIDE)) * 3,
        np.cos(angle) * x + np.sin(angle) * y,
        np.exp(-(np.square(x - rng.uniform(-0.5, 0.5)) + np.square(y - rng.uniform(-0.5, 0.5))) / 0.2),
    ]
    tone = rng.uniform(40, 215) + strength * shapes[rng.integers(3)] + rng.normal(size=(SIDE, SIDE))
    return tone.clip(0, 255).astype(np.uint8)


def text_page(rng: np.random.Generator) -> Image.Image:
    """Draw lines of words, dark on light or light on dark, with a frame or a picture in some."""
    dark, light = int(rng.integers(0, 60)), int(rng.integers(190, 256))
    back, ink = (light, dark) if rng.random() < 0.8 else (dark, light)
    page = Image.new("L", (600, 800), back)
    draw, at, height = ImageDraw.Draw(page), int(rng.integers(20, 120)), int(rng.integers(10, 36))
    font = ImageFont.load_default(height)
    while at < 780 - height:
        words = ("".join(chr(c) for c in rng.integers(97, 123, rng.integers(2, 11))) for _ in range(12))
        line = " ".join(words)[: int(rng.integers(20, 80))] if rng.random() > 0.15 else ""
        draw.text((40, at), line, ink, font)
        at += int(1.4 * height)
    if rng.random() < 0.3:
        left, top = rng.integers(40, 300, 2).tolist()
        draw.rectangle((left, top, left + 200, top + 150), outline=ink, width=4)
    return page


def softened(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Return a drawn body part as X-rays show it: without sharp edges, with noise."""
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(1, 4)))
    noisy = np.asarray(picture, float) + rng.normal(size=picture.size[::-1]) * rng.uniform(1, 6)
    return noisy.clip(0, 255).astype(np.uint8)


def bone(draw: ImageDraw.ImageDraw, ends: Sequence[float], width: float, tone: int) -> None:
    """Draw a shaft with two round ends, brighter at its sides, from (x, y) to (x, y)."""
    start, end, half = np.array(ends[:2]), np.array(ends[2:]), width / 2
    for centre in (start, end):
        draw.ellipse((*(centre - 0.65 * width), *(centre + 0.65 * width)), fill=tone)
    draw.line((*start, *end), fill=tone, width=round(width))
    draw.line((*start, *end), fill=round(0.75 * tone), width=round(half))


def hand(rng: np.random.Generator) -> np.ndarray:
    """Draw a hand: soft tissue, five fingers of three bones each, and the metacarpals."""
    picture = Image.new("L", (SIDE, SIDE), int(rng.integers(0, 25)))
    draw, tissue, tone = ImageDraw.Draw(picture), int(rng.integers(50, 90)), int(rng.integers(140, 230))
    wrist = np.array([SIDE / 2, SIDE * rng.uniform(0.85, 1.0)])
    angles = np.deg2rad(np.linspace(-50, 35, 5) + rng.normal(size=5) * 4 - 90)
    lengths = np.array([0.55, 0.75, 0.85, 0.78, 0.65]) * SIDE * rng.uniform(0.85, 1.05)
    tips = wrist + np.stack([np.cos(angles), np.sin(angles)], 1) * lengths[:, None]
    draw.ellipse((*(wrist - np.array([50, 95])), *(wrist + np.array([50, 15]))), fill=tissue)
    for tip in tips:
        draw.line((*wrist, *tip), fill=tissue, width=24)
    for tip in tips:
        joints = [wrist + (tip - wrist) * part for part in (0.15, 0.5, 0.72, 0.87, 1.0)]
        for start, end in pairwise(joints):
            gap = 0.08 * (end - start)
            bone(draw, (*(start + gap), *(end - gap)), 9, tone)
    return softened(picture, rng)


def limb(rng: np.random.Generator) -> np.ndarray:
    """Draw a forearm, a lower leg, or a knee: soft tissue about one or two long bones."""
    picture = Image.new("L", (SIDE, SIDE), int(rng.integers(0, 25)))
    draw, tissue, tone = ImageDraw.Draw(picture), int(rng.integers(50, 100)), int(rng.integers(150, 235))
    lean, width = rng.uniform(-30, 30), rng.uniform(50, 110)
    top, bottom = np.array([SIDE / 2 + lean, -20]), np.array([SIDE / 2 - lean, SIDE + 20])
    draw.line((*top, *bottom), fill=tissue, width=round(width))
    aside = np.array([width / 4, 0])
    if rng.random() < 0.5:
        for side in (-1, 1):
            bone(draw, (*(top + side * aside), *(bottom + side * aside)), width / rng.uniform(4, 6), tone)
    else:
        joint, gap = top + (bottom - top) * rng.uniform(0.4, 0.6), np.array([0, width / 3])
        bone(draw, (*top, *(joint - gap)), width / 2.5, tone)
        bone(draw, (*(joint + gap), *bottom), width / 2.5, tone)
    return softened(picture, rng)


def skull(rng: np.random.Generator) -> np.ndarray:
    """Draw a skull from the front: a bright ring, orbits, nose and teeth."""
    picture = Image.new("L", (SIDE, SIDE), int(rng.integers(0, 25)))
    draw, tone = ImageDraw.Draw(picture), int(rng.integers(170, 240))
    width, x, y = SIDE * rng.uniform(0.3, 0.42), SIDE / 2 + rng.normal() * 6, SIDE * 0.45
    draw.ellipse((x - width, y - 1.1 * width, x + width, y + 1.1 * width), fill=tone)
    draw.ellipse((x - 0.9 * width, y - width, x + 0.9 * width, y + width), fill=round(0.6 * tone))
    draw.rectangle((x - 0.5 * width, y + 0.6 * width, x + 0.5 * width, y + 1.5 * width), fill=round(0.7 * tone))
    for side in (-1, 1):
        at = x + side * 0.4 * width
        draw.ellipse((at - 0.22 * width, y + 0.1 * width, at + 0.22 * width, y + 0.5 * width), fill=round(0.25 * tone))
    draw.polygon([(x, y + 0.4 * width), (x - 12, y + 0.8 * width), (x + 12, y + 0.8 * width)], fill=round(0.2 * tone))
    return softened(picture, rng)


DRAWN: dict[str, Draw] = {
    "uniform noise": lambda rng: rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8),
    "gaussian noise": lambda rng: (128 + rng.uniform(10, 60) * rng.normal(size=(SIDE, SIDE))).clip(0, 255).astype("u1"),
    "smooth noise": smooth_noise,
    "blank": lambda rng: np.full((SIDE, SIDE), rng.integers(0, 256), np.uint8),
    "near-blank": near_blank,
    "text pages": text_page,
    "hands (drawn)": hand,
    "limbs (drawn)": limb,
    "skulls (drawn)": skull,
}


def shipped(package: str, folder: str, patterns: Sequence[str]) -> list[Path]:
    """List pictures that a package ships; none where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    root = Path(spec.submodule_search_locations[0], folder)
    return sorted(path for pattern in patterns for path in root.rglob(pattern))


def crops(path: Path, rng: np.random.Generator) -> Iterator[Image.Image]:
    """Yield a picture, and random squares of it with half to all of its shorter side."""
    picture = open_image(path)
    yield picture
    for _ in range(CROPS):
        side = int(min(picture.size) * rng.uniform(0.5, 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
        yield picture.crop((left, top, left + side, top + side))


def strangers(rng: np.random.Generator) -> dict[str, list]:
    """Return pictures that are no chest X-rays, by kind, as `predict_batches` takes them."""
    found: dict[str, list] = {name: [draw(rng) for _ in range(COUNT)] for name, draw in DRAWN.items()}
    images = ("*.png", "*.jpg", "*.jpeg")
    photographs = shipped("sklearn", "datasets/images", images) + shipped("skimage", "data", images)
    photographs += shipped("matplotlib", "mpl-data/sample_data", images)
    photographs += [path for folder in PICTURES for pattern in images for path in sorted(folder.rglob(pattern))]
    found["photographs"] = []
    for path in photographs:
        with contextlib.suppress(ImageError):
            found["photographs"] += crops(path, rng)
    found["MR, CT, others (pydicom)"] = shipped("pydicom", "data/test_files", ["*.dcm"])
    return {name: pictures for name, pictures in found.items() if pictures}


def changed(paths: Sequence[str]) -> dict[str, list[Image.Image]]:
    """Return X-rays as they should not be given, by what was done to them."""
    pictures = [open_image(path) for path in paths]
    turns = {name: getattr(Image.Transpose, f"ROTATE_{name}") for name in (90, 180, 270)}
    return {
        "X-rays, inverted": [ImageOps.invert(picture) for picture in pictures],
        **{f"X-rays, turned by {by}": [p.transpose(turn) for p in pictures] for by, turn in turns.items()},
        "X-rays, upside down": [ImageOps.flip(picture) for picture in pictures],
        "X-rays, mirrored": [ImageOps.mirror(picture) for picture in pictures],
    }


def withheld(model: Model, pictures: Sequence) -> float:
    """Return the share of pictures that are refused or withheld."""
    called = sum(int((batch.unlike <= model.gate.limit).sum()) for batch in predict_batches(model, pictures))
    return 1 - called / len(pictures)


def cost(model: Model, pictures: Sequence) -> float:
    """Return the CPU time of the gate as a share of that of `predict`: the least of several runs each, in turns."""
    settings = model.settings | {"preprocessing": model.settings["preprocessing"] | {"size": COST_SIZE}}
    gated = replace(model, settings=settings)
    models, files = {True: gated, False: replace(gated, gate=None)}, list(pictures)[:CALLS]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for run in range(-1, RUNS):
        for chosen, opened in models.items():
            start = time.process_time()
            for _ in predict_batches(opened, files):
                pass
            if run >= 0:  # the first fuses the network
                seconds[chosen].append(time.process_time() - start)
    return min(seconds[True]) / min(seconds[False]) - 1


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    root = find_root(os.environ["XRAY_DATA"]) if "XRAY_DATA" in os.environ else phantom.cached()
    table = read_split(root, "train")
    looks = appearance(list(table.path))
    groups = {name: table[held_out(name, table, looks)] for name in HOLDOUTS}
    rest = table[~table.patient.isin(pd.concat(groups.values()).patient)]
    patients = np.random.default_rng(0).permutation(rest.patient.unique())
    part = round(SHARE * len(patients))
    groups["random patients"] = rest[rest.patient.isin(np.roll(patients, -SEED * part)[:part])]
    if not (folder / "data").exists():
        link(folder / "data", table, table.path.isin(pd.concat(groups.values()).path).to_numpy())
    shown = {f"X-rays, {name}": list(rows.path) for name, rows in groups.items()}
    shown |= changed(groups["random patients"].path) | strangers(np.random.default_rng(SEED))
    columns = {"pictures": {name: len(pictures) for name, pictures in shown.items()}}
    for arch in ARCHS:
        export = folder / "exports" / arch
        if not export.exists():
            with contextlib.redirect_stdout(io.StringIO()):
                fit(data=str(folder / "data"), exports=str(export.parent), name=arch, arch=arch, size=SIZE,
                    epochs=EPOCHS, weights="none", seed=SEED, device="cpu")  # fmt: skip
        model = open_model(export, "cpu", "fp32")
        columns[arch] = {name: 100 * withheld(model, pictures) for name, pictures in shown.items()}
    print("withheld, in percent\n" + pd.DataFrame(columns).to_string(float_format="{:.1f}".format), flush=True)
    for arch in ARCHS:
        share = cost(open_model(folder / "exports" / arch, "cpu", "fp32"), shown["X-rays, random patients"])
        print(f"{arch}, {COST_SIZE} px: the gate adds {100 * share:.1f} % to the CPU time of predict", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
