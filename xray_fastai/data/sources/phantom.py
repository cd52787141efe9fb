"""Draw synthetic chest X-rays from formulas, for the first run and for tests.

No image shows a patient, and none has a medical meaning. A fit on them is a rehearsal of the pipeline.

Measured on `write()`: a threshold on mean brightness has an AUC of 0.56 and 0.58 (seeds 0 and 1). A rehearsal
(`dataset.REHEARSAL`, ResNet50 from random weights, seed 42) has a ROC AUC of 0.999 on test after 11 epochs of 20 steps.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from xray_fastai.system.errors import UserError
from xray_fastai.system.files import CACHE_ADVICE, cache_dir

DRAWING = 2  # version of the drawings; a cache folder of another version is not used

Disease = Literal["bacteria", "virus"]

SPLITS = {"train": 0.64, "val": 0.2, "test": 0.16}  # share of all images
PNEUMONIA = {"train": 2 / 3, "val": 1 / 2, "test": 1 / 2}  # share of a split's images; Kaggle's train has 0.74
MINIMUM_IMAGES = 24  # 4 in val and in test, 2 of each class


def _edge(distance: np.ndarray, softness: float = 0.02) -> np.ndarray:
    """Return 0 outside and 1 inside: a step at `distance` 0 with a width of about 4 `softness`."""
    return 0.5 + 0.5 * np.tanh(distance / (2 * softness))


def _ellipse(x: np.ndarray, y: np.ndarray, cx: float, cy: float, a: float, b: float, tilt: float = 0.0) -> np.ndarray:
    """Return the distance from the centre in units of the radius: 1 on the border of the ellipse."""
    cos, sin = np.cos(tilt), np.sin(tilt)
    return np.hypot(((x - cx) * cos + (y - cy) * sin) / a, ((y - cy) * cos - (x - cx) * sin) / b)


def _texture(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, frequency: float, waves: int = 40) -> np.ndarray:
    """Return a smooth random field of unit variance, a sum of plane waves that is the same at every resolution.

    `x` and `y` are affine in row and column, so each wave is an outer product, and their sum one matrix product.
    einsum computes it without BLAS, so the number of threads cannot change a bit of the result.
    """
    angle, phase = rng.uniform(0, 2 * np.pi, (2, waves))
    k = 2 * np.pi * frequency * rng.uniform(0.5, 1.5, waves)
    kx, ky = k * np.cos(angle), k * np.sin(angle)
    rows = np.outer(x[:, 0], kx) + np.outer(y[:, 0], ky) + phase  # (size, waves)
    columns = np.outer(x[0] - x[0, 0], kx) + np.outer(y[0] - y[0, 0], ky)
    left, right = np.hstack([np.cos(rows), -np.sin(rows)]), np.hstack([np.cos(columns), np.sin(columns)])
    return np.sqrt(2 / waves) * np.einsum("ik,jk->ij", left, right)


def _ribs(anatomy: np.random.Generator, x: np.ndarray, y: np.ndarray, cage: np.ndarray) -> np.ndarray:
    """Draw the strong, nearly level posterior ribs, and the fainter anterior ribs that fall towards the sternum."""
    u = np.minimum(np.abs(x) / cage, 1.1)  # 0 at the spine, 1 at the chest wall
    spacing, start = anatomy.uniform(0.145, 0.18), anatomy.uniform()
    strength = anatomy.uniform(0.04, 0.085)
    side = anatomy.normal(0, 0.01) * np.sign(x)
    posterior = (y + side - anatomy.uniform(-0.05, 0.12) * u - anatomy.uniform(0.12, 0.2) * u**4) / spacing + start
    anterior = (y + side + anatomy.uniform(0.3, 0.45) * u) / (1.15 * spacing) + start
    total = np.zeros_like(x)
    for phase, weight, fade in (
        (posterior, strength, _edge(u - 0.12)),
        (anterior, 0.6 * strength, _edge(u - 0.5, 0.05)),
    ):
        wave = np.cos(2 * np.pi * phase)
        bone, marrow = _edge(wave - 0.15, 0.12), _edge(wave - 0.75, 0.1)
        total += weight * fade * (bone - 0.35 * marrow)  # the cortex is denser than the marrow
    return total * _edge(1.04 - u, 0.015) * _edge(y + 0.7, 0.04)


def _opacities(
    anatomy: np.random.Generator, rng: np.random.Generator, x: np.ndarray, y: np.ndarray, disease: Disease, width: float
) -> np.ndarray:
    """Draw opacities: for bacteria one or two consolidated lobes; for a virus several faint patches on both sides."""
    lobar = disease == "bacteria"
    count = anatomy.choice([1, 2], p=[0.8, 0.2]) if lobar else anatomy.integers(3, 7)
    side = anatomy.choice([-1, 1])
    ragged, mottled = 0.15 * _texture(anatomy, x, y, 1.5), 1 + 0.2 * _texture(anatomy, x, y, 3.0)
    density = np.zeros_like(x)
    for i in range(count):
        cx = side * (-1) ** i * width * anatomy.uniform(0.4, 0.75)
        cy = anatomy.uniform(-0.45, 0.35)
        a, b = anatomy.uniform(0.18, 0.34, 2) if lobar else anatomy.uniform(0.12, 0.22, 2)
        strength = anatomy.uniform(0.32, 0.62) if lobar else anatomy.uniform(0.26, 0.5)
        moved = rng.normal(0, 0.015, 2)
        d = ragged + _ellipse(x, y, cx + moved[0], cy + moved[1], a, b, anatomy.uniform(0, np.pi))
        density += strength * rng.uniform(0.85, 1.15) * _edge(1 - d, anatomy.uniform(0.1, 0.22)) * mottled
    return density


def draw(
    rng: np.random.Generator, disease: Disease | None = None, size: int = 128, patient: int | None = None
) -> Image.Image:
    """Draw one chest X-ray in AP view, with the heart on the right of the image.

    Args:
        rng: determines what differs between two images of a patient: position, exposure, noise.
        disease: None draws a NORMAL image.
        size: width and height in pixels.
        patient: seed of the anatomy and of the position of the opacities; None takes one from `rng`.

    Returns:
        An image of mode "L".
    """
    return draw_with_opacities(rng, disease, size, patient)[0]


def draw_with_opacities(
    rng: np.random.Generator, disease: Disease | None = None, size: int = 128, patient: int | None = None
) -> tuple[Image.Image, np.ndarray]:
    """Draw a chest X-ray as `draw` does, and return it with the density that its opacities add.

    Returns:
        The image, and the density (size, size) from 0 on, where soft tissue has about 0.5. A NORMAL image has none.
    """
    anatomy = np.random.default_rng(rng.integers(2**32) if patient is None else patient)

    # Body coordinates: both from -1 to 1, y downwards, the spine at x = 0.
    tilt, zoom = np.deg2rad(rng.normal(0, 3)), rng.uniform(0.84, 1.0)
    y, x = np.meshgrid(*2 * [(np.arange(size) + 0.5) / size * 2 - 1], indexing="ij")
    x, y = zoom * (x * np.cos(tilt) + y * np.sin(tilt)), zoom * (y * np.cos(tilt) - x * np.sin(tilt))
    x, y = x + rng.normal(0, 0.04), y + rng.normal(0, 0.04)
    ax = np.abs(x)

    width, fat = anatomy.uniform(0.66, 0.78), anatomy.uniform(0.05, 0.14)
    depth = np.abs((y - anatomy.uniform(0.3, 0.45)) / anatomy.uniform(1.12, 1.22))
    cage = width * np.sqrt(np.maximum(1 - depth**2.4, 0.01))  # half width of the chest at each height
    shoulders = _edge(y + anatomy.uniform(0.9, 1.0) - 0.3 * ax)
    shoulders *= _edge(0.5 * (ax - width) - y - anatomy.uniform(0.2, 0.4))
    body = np.maximum.reduce([_edge(cage + fat - ax), shoulders, _edge(0.24 - ax, 0.03) * _edge(-y)])
    thickness = body * (0.42 + 0.16 * np.sqrt(np.clip(1 - (ax / (width + fat + 0.25)) ** 2, 0, 1)))

    base, domed = anatomy.uniform(0.42, 0.62), anatomy.uniform(0.9, 1.5)
    diaphragm = base + rng.normal(0, 0.02) + domed * (ax - 0.33) ** 2 + 0.02 * np.sign(x)
    abdomen = _edge(y - diaphragm, 0.015) * body
    lungs = _edge(cage - 0.02 - ax) * _edge(ax - 0.08) * _edge(diaphragm - y, 0.015) * _edge(y + 0.74, 0.03)

    big, low = anatomy.uniform(0.85, 1.2), base - anatomy.uniform(0.18, 0.24)
    ventricles = _ellipse(x, y, 0.15, low, 0.34 * big, 0.24 * big, anatomy.uniform(0.4, 0.8))
    heart = np.maximum.reduce(
        [
            _edge(1 - ventricles, 0.04),
            _edge(1 - _ellipse(x, y, -0.06, low, 0.15 * big, 0.25), 0.06),  # the right atrium
            _edge(1 - _ellipse(x, y, 0.09, -0.22, 0.09, 0.11), 0.12),  # the aortic knob
            _edge(anatomy.uniform(0.11, 0.17) + 0.15 * np.maximum(y, -0.4) ** 2 - ax, 0.02),  # the great vessels
        ]
    )
    stomach = _edge(1 - _ellipse(x, y, 0.42, base + 0.17, 0.17, 0.09, 0.2), 0.12) * anatomy.uniform(0, 0.14)
    trachea = _edge(0.045 - np.abs(x + 0.01), 0.01) * _edge(-0.3 - y, 0.03)
    discs = _edge(np.cos(2 * np.pi * y / anatomy.uniform(0.13, 0.16)), 0.2)
    vertebrae = _edge(0.085 - ax, 0.012) * (0.75 + 0.25 * discs) * body
    clavicle_y = anatomy.uniform(-0.68, -0.6) - anatomy.uniform(0.1, 0.3) * ax + 0.04 * np.sin(7 * ax)
    clavicles = _edge(0.028 - np.abs(y - clavicle_y), 0.008) * _edge(ax - 0.1) * _edge(0.6 - ax) * body
    humeri = _edge(1 - _ellipse(ax, y, 1.0, -0.72, 0.16, 0.14), 0.06) * body

    hilum = np.exp(-(((ax - 0.17) / 0.2) ** 2) - (y / 0.28) ** 2)
    vessels = np.maximum(0, 1 - 1.6 * np.abs(_texture(anatomy, x, y, 4.0))) * (0.3 + 1.2 * hilum)
    haze = 1 + 0.3 * x * anatomy.normal() + 0.3 * y * anatomy.normal()

    # Density as a film shows it: about 0.5 for soft tissue, 0 for the air around the body.
    density = thickness + 0.2 * abdomen + 0.13 * vertebrae
    density += 0.1 * heart * lungs * (1.2 - 0.4 * np.minimum(ventricles, 1)) - stomach
    density += _ribs(anatomy, x, y, cage) * body * (1 - 0.75 * abdomen) * (1 - 0.4 * heart)
    density += 0.13 * clavicles + 0.13 * humeri - 0.07 * trachea
    air = anatomy.uniform(0.26, 0.38) * haze
    air -= anatomy.uniform(0.05, 0.1) * hilum + anatomy.uniform(0.04, 0.08) * vessels
    visible = lungs * (1 - 0.9 * heart)
    consolidated = air - _opacities(anatomy, rng, x, y, disease, width) if disease else air
    density -= np.maximum(consolidated, 0.02) * visible

    return _expose(rng, density), (np.maximum(air, 0.02) - np.maximum(consolidated, 0.02)) * visible


def _expose(rng: np.random.Generator, density: np.ndarray) -> Image.Image:
    """Convert density to grey values. Window, gamma and grain are random, so brightness does not show the class."""
    low, high = np.percentile(density, [2, 99])
    grey = np.clip((density - low) / (high - low), 0, 1.1)
    grey = grey ** np.exp(rng.uniform(-0.55, 0.55)) * rng.uniform(0.6, 1.0) + rng.uniform(0, 0.15)
    pixels = Image.fromarray((255 * np.clip(grey, 0, 1)).astype(np.uint8))
    if rng.random() < 0.5:  # the lead marker
        at, height = pixels.width * rng.uniform([0.02, 0.03], [0.09, 0.2]), pixels.width * 0.09
        ImageDraw.Draw(pixels).text(tuple(at), "R", fill=int(rng.integers(190, 256)), font_size=height)
    pixels = pixels.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.005) * pixels.width))
    grain = rng.normal(0, rng.uniform(1.5, 6), density.shape)
    return Image.fromarray(np.clip(np.asarray(pixels) + grain, 0, 255).astype(np.uint8))


def write(root: Path, images: int = 510, seed: int = 0, size: int = 96) -> Path:
    """Write `root`/{train,val,test}/{NORMAL,PNEUMONIA}/*.jpeg, laid out and named as the Kaggle collection.

    A patient has 1 to 4 images, all in one split. The same arguments give the same bytes. From 498 images on, val has
    50 or more of each class.

    Args:
        root: a folder that is empty or does not exist.
        images: the number of images, `MINIMUM_IMAGES` or more.
        seed: the seed of the whole collection.
        size: width and height in pixels.

    Returns:
        `root`.

    Raises:
        ValueError: `images` is below `MINIMUM_IMAGES`.
        FileExistsError: `root` is not empty.
    """
    if images < MINIMUM_IMAGES:
        raise ValueError(
            f"{images} images are too few for three splits of two classes: ask for {MINIMUM_IMAGES} or more"
        )
    root = Path(root)
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty")

    counts = {split: round(share * images) for split, share in SPLITS.items() if split != "train"}
    counts = {"train": images - sum(counts.values()), **counts}
    patient = 0  # numbered over all splits, so that no patient is in two
    for split, count in counts.items():
        pneumonia = round(PNEUMONIA[split] * count)
        for label, remaining in (("NORMAL", count - pneumonia), ("PNEUMONIA", pneumonia)):
            folder = root / split / label
            folder.mkdir(parents=True)
            while remaining > 0:
                patient += 1
                taken = _write_patient(folder, patient, np.random.SeedSequence([seed, patient]), remaining, size)
                remaining -= taken
    return root


def _write_patient(folder: Path, patient: int, entropy: np.random.SeedSequence, max_images: int, size: int) -> int:
    """Write 1 to 4 images of one patient, but at most `max_images`, and return their number."""
    rng = np.random.default_rng(entropy)
    count = min(max_images, int(rng.choice([1, 2, 3, 4], p=[0.4, 0.3, 0.2, 0.1])))
    anatomy = int(rng.integers(2**32))
    disease = None
    if folder.name == "PNEUMONIA":
        disease = "bacteria" if rng.random() < 0.6 else "virus"
        first = int(rng.integers(1, 2000))  # Kaggle counts over the collection, not over each patient's images
        names = [f"person{patient}_{disease}_{first + i}" for i in range(count)]
    else:
        prefix = "NORMAL2-IM" if rng.random() < 0.4 else "IM"
        names = [f"{prefix}-{patient:04d}-{i + 1:04d}" for i in range(count)]
    for name in names:
        draw(rng, disease, size, anatomy).save(folder / f"{name}.jpeg", quality=90)
    return count


def cached() -> Path:
    """Return the folder of the default drawings, in the user's cache folder. The first call draws them.

    Raises:
        UserError: the cache folder cannot be written to.
    """
    cache = None
    try:
        cache = cache_dir()
        folder = cache / f"phantom-{DRAWING}"
        if folder.is_dir():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        drawn = Path(tempfile.mkdtemp(prefix="phantom-", dir=cache))
        try:
            write(drawn)
            os.rename(drawn, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(drawn, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the rehearsal's images cannot be written there ({error.strerror}); {CACHE_ADVICE}, or give data=",
            value=cache or "cache folder",
        ) from None
    return folder
