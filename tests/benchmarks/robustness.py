"""Measures an export on validation images that were degraded on purpose.

    python -m tests.benchmarks.robustness EXPORT [EXPORT ...]

As in ImageNet-C (Hendrycks & Dietterich, Benchmarking neural network robustness to common corruptions and
perturbations, ICLR 2019), each corruption has five strengths. Each is measured by the ROC AUC and by the balanced
accuracy at the export's threshold. The last lines are the means over the corruptions at each strength. Strength 0 is
the unchanged image.
"""

import io
import sys
import zlib

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from xray_fastai.data.images import open_image
from xray_fastai.data.labelled import Request, labelled_images
from xray_fastai.inference.model import open_model
from xray_fastai.inference.stream import predict_all

# -----------------------------------------------------------------------------
SIDE = 224  # px; images are degraded at this size, then resized for the network
STRENGTHS = (1, 2, 3, 4, 5)
# -----------------------------------------------------------------------------


def darker(image: Image.Image, s: int) -> Image.Image:
    return image.point([round(255 * (v / 255) ** (1 + 0.3 * s)) for v in range(256)])


def brighter(image: Image.Image, s: int) -> Image.Image:
    return image.point([round(255 * (v / 255) ** (1 / (1 + 0.3 * s))) for v in range(256)])


def flatter(image: Image.Image, s: int) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(1 - 0.15 * s)


def blurred(image: Image.Image, s: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.6 * s))


def sharpened(image: Image.Image, s: int) -> Image.Image:
    return image.filter(ImageFilter.UnsharpMask(radius=2, percent=60 * s, threshold=0))


def noisy(image: Image.Image, s: int) -> Image.Image:
    """Add noise, to each image its own: seeded by its pixels, so that a second run gives the same."""
    pixels = np.asarray(image, float)
    rng = np.random.default_rng(zlib.crc32(image.tobytes()))
    return Image.fromarray((pixels + rng.normal(0, 5 * s, pixels.shape)).clip(0, 255).astype("u1"))


def jpeg(image: Image.Image, s: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=(50, 30, 20, 12, 6)[s - 1])
    return Image.open(stream).convert("L")


def cropped(image: Image.Image, s: int) -> Image.Image:
    margin = 6 * s
    return image.crop((margin, margin, SIDE - margin, SIDE - margin)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def widened(image: Image.Image, s: int) -> Image.Image:
    """Cut top and bottom, so that the square squeezes the image as if its frame were wider."""
    margin = round(0.025 * s * SIDE)
    return image.crop((0, margin, SIDE, SIDE - margin)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def narrowed(image: Image.Image, s: int) -> Image.Image:
    """Cut the sides, as if the frame were narrower."""
    margin = round(0.025 * s * SIDE)
    return image.crop((margin, 0, SIDE - margin, SIDE)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def bordered(image: Image.Image, s: int) -> Image.Image:
    canvas, inner = Image.new("L", (SIDE, SIDE)), SIDE - 12 * s
    canvas.paste(image.resize((inner, inner), Image.Resampling.BILINEAR), (6 * s, 6 * s))
    return canvas


def marked(image: Image.Image, s: int) -> Image.Image:
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for i in range(s):
        draw.text((8, 8 + 30 * i), "R AP", fill=255, font_size=12 + 4 * s)
    return image


CORRUPTIONS = (darker, brighter, flatter, blurred, sharpened, noisy, jpeg, cropped, widened, narrowed, bordered, marked)


def main(exports: list[str]) -> None:
    for export in exports:
        model = open_model(export, "cpu")
        table = labelled_images(model.settings, Request(None, "valid")).table
        images = [open_image(path, SIDE) for path in table.path]
        positive = model.classes.index(model.positive)
        truth = table.label.eq(model.positive).to_numpy()

        def judge(images: list[Image.Image]) -> tuple[float, float]:
            p = model.probabilities(predict_all(model, images))  # noqa: B023
            return (
                roc_auc_score(truth, p[:, positive]),  # noqa: B023
                balanced_accuracy_score(truth, model.decide(p) == positive),  # noqa: B023
            )

        clean = judge(images)
        rows = {
            (corrupt.__name__, metric): [clean[i], *(value[i] for value in values)]
            for corrupt in CORRUPTIONS
            for values in [[judge([corrupt(image, s) for image in images]) for s in STRENGTHS]]
            for i, metric in enumerate(("AUC", "balanced"))
        }
        shown = pd.DataFrame(rows, index=[0, *STRENGTHS]).T
        print(f"\n{export}: {len(images)} validation images")
        print(shown.to_string(float_format="{:.3f}".format))
        print("mean")
        print(shown.groupby(level=1).mean().to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    main(sys.argv[1:])
