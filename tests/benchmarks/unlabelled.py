"""Measures what images without labels give an export at another place: `recalibrate --unlabelled`.

    python -m tests.benchmarks.unlabelled EXPORT FOLDER ...

Each FOLDER holds class folders with images of another place. Of these, IMAGES are taken as those without labels, at
each prevalence of PREVALENCES. The figures are of the images of other patients, weighted to the same prevalence, and
means over SEEDS.

    as it is       the export
    batch norm     adapted to FEW of the images (`unlabelled.adapt`)
    match          the intercept moved on all of them, with their prevalence stated (`unlabelled.match`)
    match, equal   the same, with validation's prevalence stated, which is wrong
    both           batch norm adapted to all of them, then the intercept moved

BLUR=2 blurs all images of the folders by a Gaussian of 2 px of the network's input: images that are taken otherwise.
"""

import os
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
from PIL import ImageFilter
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from tests.benchmarks.measuring import whole_number
from xray_fastai.data.images import open_image
from xray_fastai.data.labelled import Request, labelled_images
from xray_fastai.inference.model import Model, open_model
from xray_fastai.inference.stream import predict_all
from xray_fastai.metrics.alignment import align, log_odds
from xray_fastai.training.unlabelled import SHARE, Unlabelled, adapt, reference_of

# -----------------------------------------------------------------------------
IMAGES = whole_number("IMAGES", 200)
FEW = whole_number("FEW", 32)
PREVALENCES = [float(p) for p in os.environ.get("PREVALENCES", "0.743,0.5,0.2").split(",")]
SEEDS = range(whole_number("SEEDS", 3))
BLUR = float(os.environ.get("BLUR", "0"))
# -----------------------------------------------------------------------------


def some(truth: np.ndarray, prevalence: float, rng: np.random.Generator) -> np.ndarray:
    """Return the indices of up to `IMAGES` random images, of which this share is positive; of a class at most 70 %."""
    number = min(IMAGES, int(truth.sum() * 0.7 / prevalence), int((~truth).sum() * 0.7 / (1 - prevalence)))
    positives = round(number * prevalence)
    parts = [(truth, positives), (~truth, number - positives)]
    return rng.permutation(np.concatenate([rng.choice(np.flatnonzero(of), n, replace=False) for of, n in parts]))


def figures(model: Model, scores: np.ndarray, truth: np.ndarray, move: float, prevalence: float) -> dict[str, float]:
    """Measure scores (N,), moved down by `move`, at the export's threshold; a share `prevalence` is positive."""
    positive, scaling = model.classes.index(model.positive), model.scaling
    p = expit((scores - move) / scaling.temperature + scaling.intercept_of(positive))
    found = p >= model.threshold
    sensitivity, specificity = found[truth].mean(), (~found[~truth]).mean()
    loss = -np.log(np.where(truth, p, 1 - p).clip(1e-12))
    return {
        "AUC": roc_auc_score(truth, scores),
        "balanced": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "accuracy": prevalence * sensitivity + (1 - prevalence) * specificity,
        "NLL": prevalence * loss[truth].mean() + (1 - prevalence) * loss[~truth].mean(),
    }


def measure(model: Model, folder: str) -> pd.DataFrame:
    """Return a row for each prevalence, seed and way."""
    table = labelled_images(model.settings, Request(folder, None)).table
    truth, patients = (table.label == model.positive).to_numpy(), table.patient.to_numpy()
    pictures = [open_image(path, model.size) for path in table.path]
    pictures = [picture.filter(ImageFilter.GaussianBlur(BLUR)) if BLUR else picture for picture in pictures]
    positive, reference = model.classes.index(model.positive), reference_of(model)
    threshold = (logit(model.threshold) - model.scaling.intercept_of(positive)) * model.scaling.temperature
    scores = log_odds(predict_all(model, pictures), positive)
    rows = []
    for prevalence in PREVALENCES:
        for seed in SEEDS:
            local = some(truth, prevalence, np.random.default_rng(seed))
            others = np.flatnonzero(~np.isin(patients, patients[local]))
            independent = len(np.unique(patients[local]))

            def add(way, found, move=0.0, kind="", prevalence=prevalence, seed=seed, others=others):
                row = {"prevalence": prevalence, "way": way, "seed": seed, "kind": kind}
                rows.append(row | figures(model, found, truth[others], move, prevalence))

            def adapted(some_images):
                images = Unlabelled([pictures[i] for i in some_images], patients[some_images])
                return replace(adapt(model, images))  # without what was folded before

            add("as it is", scores[others])
            add("batch norm", log_odds(predict_all(adapted(local[:FEW]), [pictures[i] for i in others]), positive))
            for way, stated in (("match", prevalence), ("match, equal", reference.prevalence)):
                found = align(scores[local], independent, reference, threshold, stated)
                add(way, scores[others], found.threshold - threshold, found.kind)
            if prevalence == PREVALENCES[0]:
                both = log_odds(predict_all(adapted(local), [pictures[i] for i in (*local, *others)]), positive)
                found = align(both[: len(local)], independent, reference, threshold, prevalence)
                add("both", both[len(local) :], found.threshold - threshold, found.kind)
    return pd.DataFrame(rows)


def main(export: str, folders: list[str]) -> None:
    model = open_model(export, "cpu", "fp32")
    print(f"{export}: share of local statistics {SHARE}, validation's prevalence {reference_of(model).prevalence:.3f}")
    for folder in folders:
        rows = measure(model, folder)
        means = rows.groupby(["prevalence", "way"], sort=False).mean(numeric_only=True).drop(columns="seed")
        kinds = rows.groupby(["prevalence", "way"], sort=False).kind.agg(lambda kinds: " ".join(sorted(set(kinds))))
        print(
            f"\n{folder}, blur {BLUR}\n{means.assign(scores=kinds).to_string(float_format='{:.3f}'.format)}", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
