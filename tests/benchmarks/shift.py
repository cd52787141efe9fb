"""Does a recipe hold up on images that were taken differently? What random validation images can't show.

    XRAY_DATA=chest_xray python -m tests.benchmarks.shift [RECIPE ...]

For each hold-out, images that differ from the rest are taken out of train/ (and every image of their patients, which
then goes unused), each recipe is trained on what is left by `fit`, and its export is judged twice: on random validation
images of the rest, and on what was taken out. A recipe is good when its worst hold-out is good. Hold-outs:

    least typical    the 15 % of each class whose brightness, contrast and sharpness speak most for the other class
    darkest, ...     the 15 % of each class that are darkest, sharpest, ... (`xray_fastai.groups`)
    thumbnail        the 15 % of each class that a linear model of 28 x 28 px (40 principal components) gets most wrong
    source           studies named IM- and virus; trained on NORMAL2-IM- and bacteria (the Kaggle collection's names)
    cluster          of four clusters by appearance, the smallest that has 30 images of each class

After Geirhos et al., Shortcut learning in deep neural networks, Nature Machine Intelligence 2020, and Zech et al.,
Variable generalization performance of a deep learning model to detect pneumonia in chest radiographs, PLOS Medicine
2018. Without XRAY_DATA the phantom is used, whose classes no appearance tells apart.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, recall_score, roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from xray_fastai import fit, phantom
from xray_fastai.dataset import find_root, labelled_images, read_split
from xray_fastai.groups import appearance, unusual
from xray_fastai.images import open_image
from xray_fastai.inference import open_model, predict_all

# -----------------------------------------------------------------------------
RECIPES = {  # settings of a fit that differ from the common ones
    "default": {},
    "equalized": {"augment": "light"},
    "strong": {"contrast": "none"},
    "light": {"contrast": "none", "augment": "light"},
    "plain": {"recipe": "plain"},
}
HOLDOUTS = os.environ.get("HOLDOUTS", "least typical,thumbnail").split(",")
SEEDS = range(int(os.environ.get("SEEDS", "3")))
COMMON = {
    "arch": os.environ.get("ARCH", "resnet18"),
    "size": int(os.environ.get("SIZE", "64")),
    "epochs": int(os.environ.get("EPOCHS", "8")),
    "weights": "none",
}
SHARE = 0.15
# -----------------------------------------------------------------------------


def held_out(name: str, table: pd.DataFrame, looks: pd.DataFrame) -> np.ndarray:
    """The images that a hold-out takes out, a boolean (N,)."""
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
        return (~positives & (p > np.quantile(p[~positives], 1 - SHARE))) | (
            positives & (p < np.quantile(p[positives], SHARE))
        )
    if name == "cluster":
        scaled = StandardScaler().fit_transform(looks)
        cluster = KMeans(4, n_init=10, random_state=0).fit_predict(scaled)
        sizes = pd.crosstab(cluster, positives)
        return cluster == sizes[sizes.min(axis=1) >= 30].sum(axis=1).idxmin()
    return unusual(looks, positives, patients, SHARE)[name]


def link(root: Path, table: pd.DataFrame, chosen: np.ndarray) -> None:
    """`root`/train without the patients of the chosen images, `root`/test with the chosen ones."""
    others = ~table.patient.isin(table.patient[chosen])
    for split, rows in (("test", table[chosen]), ("train", table[others])):
        for row in rows.itertuples():
            target = root / split / row.label / Path(row.file).name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(Path(row.path).resolve())


def judge(export: Path, split: str) -> dict[str, float]:
    """AUC, balanced accuracy, sensitivity and specificity at the export's threshold."""
    model = open_model(export, "cpu")
    images = labelled_images(model.settings, None, split)
    p = model.probabilities(predict_all(model, list(images.path)))
    positive = model.classes.index(model.positive)
    truth, called = images.label.eq(model.positive).to_numpy(), model.decide(p) == positive
    return {
        "auc": roc_auc_score(truth, p[:, positive]),
        "balanced": balanced_accuracy_score(truth, called),
        "sens": recall_score(truth, called),
        "spec": recall_score(~truth, ~called),
    }


def main(recipes: list[str]) -> None:
    root = find_root(os.environ["XRAY_DATA"]) if "XRAY_DATA" in os.environ else phantom.cached()
    table = read_split(root, "train")
    looks = appearance(list(table.path))
    print(f"{root.name}: {len(table):,} images; {COMMON}")
    print(f"{'recipe':<14}{'hold-out':<15}{'seed':>4}{'images':>7}  | random: AUC  balanced | shifted: AUC  balanced"
          f"    sens    spec | minutes")  # fmt: skip
    rows = []
    for holdout in HOLDOUTS:
        chosen = held_out(holdout, table, looks)
        with tempfile.TemporaryDirectory() as folder:
            link(Path(folder) / "data", table, chosen)
            for recipe in recipes:
                for seed in SEEDS:
                    settings = COMMON | RECIPES[recipe] | {"seed": seed, "data": f"{folder}/data", "exports": folder}
                    start = time.perf_counter()
                    with contextlib.redirect_stdout(io.StringIO()):
                        export = fit(**settings, name=f"{recipe}-{seed}").path
                    minutes = (time.perf_counter() - start) / 60
                    random, shifted = judge(export, "valid"), judge(export, "test")
                    rows.append({"recipe": recipe, "hold-out": holdout, "random": random["auc"],
                                 "shifted": shifted["auc"], "balanced": shifted["balanced"]})  # fmt: skip
                    print(
                        f"{recipe:<14}{holdout:<15}{seed:>4}{chosen.sum():>7}  | {random['auc']:>11.4f}"
                        f"{random['balanced']:>10.3f} | {shifted['auc']:>12.4f}{shifted['balanced']:>10.3f}"
                        f"{shifted['sens']:>8.3f}{shifted['spec']:>8.3f} | {minutes:>7.1f}",
                        flush=True,
                    )
    means = pd.DataFrame(rows).groupby(["recipe", "hold-out"], sort=False).agg(["mean", "std"]).round(4)
    print("\nmean and standard deviation over seeds\n" + means.to_string())


if __name__ == "__main__":
    main(sys.argv[1:] or list(RECIPES))
