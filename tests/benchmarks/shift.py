"""Measures recipes on images that were taken differently, which random validation images cannot show.

    XRAY_DATA=chest_xray python -m tests.benchmarks.shift [RECIPE ...]

Groups of images that differ from the rest are held out of train/, and with them all images of their patients. `fit`
trains each recipe on the rest. Its export is measured on random validation images of the rest, on the same images in
the other class's frame, and on each group. A recipe is good if its worst group is good. HOLDOUTS names the groups:

    least typical    the 15 % of each class whose brightness, contrast and sharpness are most like the other class
    darkest, ...     the 15 % of each class that are darkest, sharpest, ... (`xray_fastai.evaluation.subgroups`)
    thumbnail        the 15 % of each class that a linear model of 28 x 28 px (40 principal components) gets most wrong
    stretch, zoom    the 15 % of each class framed most like the other (`tests.benchmarks.views`: 5 minutes each)
    source           studies named IM- and virus; trained on NORMAL2-IM- and bacteria (the Kaggle collection's names)
    cluster          of four clusters by appearance, the smallest that has 30 images of each class

The other class's frame: in the Kaggle collection pneumonia images are wider. The mean of width / height of 50 originals
is 1.46, and 1.23 for normal images. The network's square input squeezes wide images more. So normal images lose a fifth
of their height, at top and bottom, and pneumonia images a fifth of their width. That is a hard test: what the squares
still show of the frame separates the classes with an AUC of 0.62 (`tests.benchmarks.views`).

After Geirhos et al., Shortcut learning in deep neural networks, Nature Machine Intelligence 2020, and Zech et al.,
Variable generalization performance of a deep learning model to detect pneumonia in chest radiographs, PLOS Medicine
2018. Without XRAY_DATA the drawn X-rays are used, whose classes have the same appearance.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.benchmarks.measuring import whole_number
from tests.benchmarks.robustness import SIDE, narrowed, widened
from tests.benchmarks.views import MAX_CHANGES, views
from xray_fastai import fit
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.data.images import open_image
from xray_fastai.data.labelled import Request, labelled_images
from xray_fastai.data.sources import phantom
from xray_fastai.evaluation.subgroups import appearance, unusual
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.stream import predict_all
from xray_fastai.model.augmentation import AUGMENT

# -----------------------------------------------------------------------------
RECIPES = {  # settings of a fit that differ from the common ones
    "default": {},
    "equalized": {"augment": "light"},
    "strong": {"contrast": "none"},
    "light": {"contrast": "none", "augment": "light"},
    "plain": {"recipe": "plain"},
    "unstretched": {},
    "stretched": {},
    "less-stretched": {},
}
AUGMENTATIONS = {  # of these, what differs from AUGMENT["strong"]
    "unstretched": {"max_stretch": 1.0, "max_blur": 0.0, "max_noise": 0.0},
    "stretched": {"max_stretch": 1.15, "max_blur": 0.0, "max_noise": 0.0},
    "less-stretched": {"max_stretch": 1.15},
}
HOLDOUTS = os.environ.get("HOLDOUTS", "least typical,thumbnail").split(",")
SEEDS = range(whole_number("SEEDS", 3))
COMMON = {
    "arch": os.environ.get("ARCH", "resnet18"),
    "size": whole_number("SIZE", 64, 32),
    "epochs": whole_number("EPOCHS", 16),
    "weights": "none",
}
SHARE = 0.15
FRAME = 4  # strength at which a fifth of height or width is lost
# -----------------------------------------------------------------------------


def held_out(name: str, table: pd.DataFrame, looks: pd.DataFrame) -> np.ndarray:
    """Return which images a hold-out removes, boolean (N,)."""
    positives, patients = (table.label == "PNEUMONIA").to_numpy(), table.patient.to_numpy()
    if name == "source":
        chosen = table.file.map(lambda file: re.match(r"IM-|person\d+_virus", Path(file).name) is not None).to_numpy()
        if not chosen.any():
            raise SystemExit("source: the file names are not those of the Kaggle collection")
        return chosen
    if name == "thumbnail":
        with ThreadPoolExecutor() as pool:
            small = np.stack(list(pool.map(lambda path: np.asarray(open_image(path, 28), float).ravel(), table.path)))
        model = make_pipeline(
            PCA(40, whiten=True, random_state=0), LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000)
        )
        folds = GroupKFold(5)
        p = cross_val_predict(model, small, positives, groups=patients, cv=folds, method="predict_proba")[:, 1]
        print(f"thumbnail: the linear model's own AUC is {roc_auc_score(positives, p):.3f}")
        return most_like_the_other(p, positives)
    if name in MAX_CHANGES:
        values = views(table)[0][name].to_numpy()
        higher = values[positives].mean() > values[~positives].mean()
        return most_like_the_other(values if higher else -values, positives)
    if name == "cluster":
        scaled = StandardScaler().fit_transform(looks)
        cluster = KMeans(4, n_init=10, random_state=0).fit_predict(scaled)
        sizes = pd.crosstab(cluster, positives)
        return cluster == sizes[sizes.min(axis=1) >= 30].sum(axis=1).idxmin()
    return unusual(looks, positives, patients, SHARE)[name]


def most_like_the_other(score: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return the `SHARE` of each class whose `score` (N,), higher for positives, is most like the other class."""
    return np.where(
        positives,
        score < np.quantile(score[positives], SHARE),
        score > np.quantile(score[~positives], 1 - SHARE),
    )


def link(root: Path, table: pd.DataFrame, chosen: np.ndarray) -> None:
    """Link the images into `root`/train, without the patients of the chosen images."""
    for row in table[~table.patient.isin(table.patient[chosen])].itertuples():
        target = root / "train" / row.label / Path(row.file).name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(Path(row.path).resolve())


def measure(model: Model, images: list, positive: np.ndarray) -> dict[str, float]:
    """Return the AUC, and balanced accuracy, sensitivity and specificity at the export's threshold.

    Args:
        model: an export.
        images: paths or pictures.
        positive: (N,), true where an image is of the class to detect.
    """
    p = model.probabilities(predict_all(model, images))
    which = model.classes.index(model.positive)
    predicted = model.decide(p) == which
    return {
        "AUC": roc_auc_score(positive, p[:, which]),
        "balanced": balanced_accuracy_score(positive, predicted),
        "sensitivity": recall_score(positive, predicted),
        "specificity": recall_score(~positive, ~predicted),
    }


def measure_export(export: Path, held: dict[str, pd.DataFrame]) -> dict[tuple[str, str], float]:
    """Measure an export on random validation images, on the same in the other class's frame, and on each group.

    Args:
        export: its folder.
        held: the images of each group that was held out.

    Returns:
        Values by images and measure.
    """
    model = open_model(export, "cpu")
    valid = labelled_images(model.settings, Request(None, "valid")).table
    positive = valid.label.eq(model.positive).to_numpy()
    pictures = [open_image(path, SIDE) for path in valid.path]
    swapped = [(narrowed if p else widened)(im, FRAME) for p, im in zip(positive, pictures, strict=True)]
    values = {"random": measure(model, list(valid.path), positive), "reframed": measure(model, swapped, positive)}
    for name, rows in held.items():
        values[name] = measure(model, list(rows.path), rows.label.eq(model.positive).to_numpy())
    return {(images, name): value for images, row in values.items() for name, value in row.items()}


def main(recipes: list[str]) -> None:
    root = find_root(os.environ["XRAY_DATA"]) if "XRAY_DATA" in os.environ else phantom.cached()
    table = read_split(root, "train")
    looks = appearance(list(table.path))
    groups = {name: held_out(name, table, looks) for name in HOLDOUTS}
    held = {name: table[chosen] for name, chosen in groups.items()}
    out = np.any(list(groups.values()), axis=0)
    sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in held.items())
    print(f"{root.name}: {len(table):,} images, of which {out.sum():,} are held out ({sizes}); {COMMON}", flush=True)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        link(Path(folder) / "data", table, out)
        for recipe in recipes:
            for seed in SEEDS:
                settings = COMMON | RECIPES[recipe] | {"seed": seed, "data": f"{folder}/data", "exports": folder}
                start = time.perf_counter()
                changed = patch.dict(AUGMENT["strong"], AUGMENTATIONS.get(recipe, {}))
                with contextlib.redirect_stdout(io.StringIO()), changed:
                    export = fit(**settings, name=f"{recipe}-{seed}").path
                minutes = (time.perf_counter() - start) / 60
                rows[recipe, seed] = measure_export(export, held) | {("fit", "minutes"): minutes}
                shutil.rmtree(export)
                print(f"\n{recipe}, seed {seed}: {minutes:.1f} minutes", flush=True)
                print(as_table(pd.Series(rows[recipe, seed])), flush=True)
    results = pd.DataFrame(rows).T.rename_axis(["recipe", "seed"])
    for recipe, runs in results.groupby("recipe", sort=False):
        print(f"\n{recipe}: mean of {len(runs)} seeds\n" + as_table(runs.mean()))


def as_table(values: pd.Series) -> str:
    """Format values as one row for each kind of images."""
    return values.drop("fit", level=0).unstack(sort=False).to_string(float_format="{:.4f}".format)


if __name__ == "__main__":
    main(sys.argv[1:] or list(RECIPES))
