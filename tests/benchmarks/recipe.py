"""Measures parts of a recipe from scratch that `fit` does not have, on images unlike the training images.

    XRAY_DATA=chest_xray python -m tests.benchmarks.recipe FOLDER [VARIANT ...]

The groups that are held out are those of `tests.benchmarks.elsewhere`: "least typical", "thumbnail", and an eighth of
the other patients ("random"). "reframed" are the random ones in the other class's frame (`tests.benchmarks.shift`).
`fit` trains each variant of its defaults on the rest, first all with seed 0, then all with seed 1, and so on. FOLDER
keeps a line for each fit (fits.jsonl). What is there is not fitted again, so several short runs add up.

    default     the defaults
    averages    the same fits again, and `ema` (an average of their weights over about one epoch) and `mean` (over the
                last 40 % of the steps, in which the rate falls). Batch norm's statistics are averaged, too
    rescaled    half of the images are made smaller, down to a third of the side, and large again
    jpeg        half of them go through JPEG, of a quality of 10 to 90
    sharpened   half of them are sharpened by an unsharp mask
    dropout     0.2, in place of 0.5
    smooth05, smooth10    label smoothing of 0.05, 0.1 (in training alone)
    classes     images are drawn so that both classes are as frequent, in place of weights in the loss
    looks       images are drawn so that brightness, contrast, sharpness and shape say nothing about the class
    trivial     each image is changed by one random operation (torchvision's TrivialAugmentWide)
    augmix      each image is mixed with three chains of such operations (torchvision's AugMix)
    textures    half of them go through a random convolution (RandConv: Xu et al., ICLR 2021)
    distilled   half of the loss compares the outputs to those of three networks in one export (`members`), which are
                trained on the same images before
    sam         sharpness-aware minimization (Foret et al., ICLR 2021), which takes two passes a step
"""

import contextlib
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.vision.all import Callback, TensorImage, Transform
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchvision.transforms.v2 import AugMix, TrivialAugmentWide
from torchvision.transforms.v2.functional import jpeg

from tests.benchmarks.elsewhere import groups_of
from tests.benchmarks.measuring import Runs, chosen, whole_number
from tests.benchmarks.robustness import SIDE, narrowed, widened
from tests.benchmarks.second_hospital import by_patient
from tests.benchmarks.shift import FRAME, link, measure
from xray_fastai import dataloaders, fit, open_learner, save_export
from xray_fastai.data.folders import find_root, read_split
from xray_fastai.data.images import open_image
from xray_fastai.evaluation.subgroups import appearance
from xray_fastai.inference.model import open_model
from xray_fastai.model import loaders
from xray_fastai.model.augmentation import Blur, build_augmentation

# -----------------------------------------------------------------------------
SEEDS = range(whole_number("FIRST_SEED", 0, 0), whole_number("FIRST_SEED", 0, 0) + whole_number("SEEDS", 3))
COMMON = {
    "arch": os.environ.get("ARCH", "resnet18"),
    "size": whole_number("SIZE", 64, 32),
    "epochs": whole_number("EPOCHS", 8),
    "batch_size": whole_number("BATCH", 80),
    "weights": "none",
    "device": os.environ.get("DEVICE", "cpu"),
    "quiet": True,
}
IMAGES = whole_number("IMAGES", 10**6)  # of the rest, which is trained on; of whole patients, but for the last
AVERAGED = 0.4  # the last part of the steps that `mean` averages; there the rate falls (`callbacks.Schedule`)
LARGEST_WEIGHT = 10.0  # of an image, over the smallest, in `looks`
# -----------------------------------------------------------------------------


class Some(Transform):
    "Changes each image of a training batch by itself, with probability 0.5."

    order = Blur.order
    split_idx = 0

    def encodes(self, x: TensorImage):
        images = x.as_subclass(torch.Tensor).clone()  # (B, 1, H, W)
        for i in torch.rand(len(images)).lt(0.5).nonzero().flatten().tolist():
            images[i : i + 1] = self.changed(images[i : i + 1])
        return type(x)(images.clamp(0, 1))


class Rescale(Some):
    "Makes an image smaller and large again: with or without antialiasing, by lines or by cubes."

    def changed(self, image: torch.Tensor) -> torch.Tensor:
        side = image.shape[-1]
        scale, antialias, cubic = torch.rand(3).tolist()
        small = F.interpolate(
            image, [round(side * (1 + 2 * scale) / 3)] * 2, mode="bilinear", antialias=antialias > 0.5
        )
        return F.interpolate(small, [side] * 2, mode="bicubic" if cubic > 0.5 else "bilinear")


class Jpeg(Some):
    "Writes an image as JPEG, and reads it."

    order = Blur.order + 1  # a file is written last

    def changed(self, image: torch.Tensor) -> torch.Tensor:
        pixels = (255 * image[0]).round().byte().cpu()
        return jpeg(pixels, int(torch.randint(10, 91, ())))[None].to(image) / 255


class Sharpen(Some):
    "Adds up to 1.5 times what a Gaussian of up to 1/64 of the side takes away."

    def changed(self, image: torch.Tensor) -> torch.Tensor:
        blurred = Blur(1 / 64, 1.0).encodes(TensorImage(image)).as_subclass(torch.Tensor)
        return image + 1.5 * torch.rand(()).item() * (image - blurred)


class Changed(Transform):
    "Changes each image of a training batch by one of torchvision's random augmentations."

    order = Blur.order
    split_idx = 0

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]):
        self.change = change

    def encodes(self, x: TensorImage):
        pixels = (255 * x.as_subclass(torch.Tensor)).round().byte()  # (B, 1, H, W)
        return type(x)(torch.stack([self.change(image) for image in pixels]).to(x.dtype) / 255)


class RandomConvolution(Some):
    "Mixes an image with its convolution by random weights, of 1, 3, 5 or 7 pixels a side, in a random proportion."

    def changed(self, image: torch.Tensor) -> torch.Tensor:
        side = 2 * int(torch.randint(4, ())) + 1
        kernel = torch.randn(1, 1, side, side, device=image.device) / side
        other = F.conv2d(image - 0.5, kernel, padding="same") + 0.5
        share = torch.rand(()).item()
        return share * image + (1 - share) * other


class Averages(Callback):
    "Averages weights and batch norm's statistics after each step: over about an epoch, and over the last steps."

    def before_fit(self):
        self.ema, self.mean, self.steps, self.averaged = self._now(), {}, 0, 0

    def _now(self) -> dict[str, torch.Tensor]:
        state = self.model.state_dict()
        return {name: tensor.detach().clone() for name, tensor in state.items() if tensor.is_floating_point()}

    def after_batch(self):
        if not self.training:
            return
        self.steps += 1
        now = self.model.state_dict()
        for name, tensor in self.ema.items():
            tensor.lerp_(now[name], max(1 / self.steps, 1 / self.n_iter))
        if self.steps > (1 - AVERAGED) * self.n_epoch * self.n_iter:
            self.averaged += 1
            self.mean = self.mean or self._now()
            for name, tensor in self.mean.items():
                tensor.lerp_(now[name], 1 / self.averaged)


class Smoothing(Callback):
    "Smooths the labels in training; the validation loss stays as it is."

    def __init__(self, share: float):
        self.share = share

    def before_train(self):
        self.loss_func.func.label_smoothing = self.share

    def before_validate(self):
        self.loss_func.func.label_smoothing = 0.0

    after_fit = before_validate


class Distilled(Callback):
    "Adds to the loss how far the outputs are from a teacher's, on the same augmented images."

    def __init__(
        self,
        teacher: Path,  # an export
        share: float = 0.5,  # of the loss
        temperature: float = 2.0,  # by which both outputs are divided
    ):
        self.teacher, self.share, self.temperature = open_learner(teacher).model.eval(), share, temperature

    def after_loss(self):
        if not self.training:
            return
        with torch.inference_mode():
            target = self.teacher.to(self.x.device)(self.x)
        logs = [(outputs / self.temperature).log_softmax(1) for outputs in (self.pred, target.clone())]
        apart = F.kl_div(*logs, log_target=True, reduction="batchmean") * self.temperature**2
        self.learn.loss_grad = (1 - self.share) * self.loss_grad + self.share * apart


class Drawn(Callback):
    "Draws the images of an epoch with replacement, in proportion to weights of the images."

    def __init__(
        self,
        weights: Callable[[pd.DataFrame], np.ndarray],  # of the training images' table
    ):
        self.weights = weights

    def before_fit(self):
        loader = self.dls.train
        weights = self.weights(loader.items)
        loader.shuffle_fn = lambda indices: np.random.choice(indices, len(indices), p=weights / weights.sum()).tolist()


class Sam(Callback):
    "Takes the gradient where the loss is highest nearby: at a distance along the gradient."

    def __init__(
        self,
        distance: float = 0.05,  # the L2 norm of the step to there
    ):
        self.distance = distance

    def after_backward(self):
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        steps = [p.grad * (self.distance / (norm + 1e-12)) for p in parameters]
        statistics = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        with torch.no_grad():
            torch._foreach_add_(parameters, steps)
        for module in statistics:
            module.track_running_stats = False  # the second pass must not count
        self.opt.zero_grad()
        self.loss_func(self.model(*self.xb), *self.yb).backward()
        for module in statistics:
            module.track_running_stats = True
        with torch.no_grad():
            torch._foreach_sub_(parameters, steps)


def of_classes(table: pd.DataFrame) -> np.ndarray:
    """Return weights (N,) with which both classes are as frequent."""
    return (1 / table.groupby("label").path.transform("size")).to_numpy()


def of_looks(table: pd.DataFrame) -> np.ndarray:
    """Return weights (N,): 1 / p(own class | appearance), by a logistic regression on other patients' images."""
    positives, looks = table.label.eq("PNEUMONIA").to_numpy(), appearance(list(table.path))
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    p = cross_val_predict(model, looks, positives, groups=table.patient, cv=GroupKFold(5), method="predict_proba")
    weights = 1 / p[np.arange(len(p)), positives.astype(int)]
    weights = np.minimum(weights, LARGEST_WEIGHT)
    return weights / np.where(positives, weights[positives].sum(), weights[~positives].sum())


def teacher(folder: Path) -> Path:
    """Return the export of three networks, which is trained where it is missing."""
    if not (folder / "teachers" / "teacher").exists():
        fit(folder / "data", **COMMON, seed=1000, members=3, exports=folder / "teachers", name="teacher")
    return folder / "teachers" / "teacher"


@dataclass(frozen=True)
class Variant:
    """Describes what differs from the defaults."""

    settings: dict[str, Any] = field(default_factory=dict)
    transforms: Sequence[Transform] = ()  # of training batches, besides the default's
    callbacks: Callable[[Path], Sequence[Callback]] = lambda folder: ()  # of the folder of all fits


VARIANTS = {
    "default": Variant(),
    "averages": Variant(callbacks=lambda folder: [Averages()]),
    "rescaled": Variant(transforms=[Rescale()]),
    "jpeg": Variant(transforms=[Jpeg()]),
    "rescaled-jpeg": Variant(transforms=[Rescale(), Jpeg()]),
    "sharpened": Variant(transforms=[Sharpen()]),
    "dropout": Variant({"dropout": 0.2}),
    "smooth05": Variant(callbacks=lambda folder: [Smoothing(0.05)]),
    "smooth10": Variant(callbacks=lambda folder: [Smoothing(0.1)]),
    "classes": Variant({"class_weights": "none"}, callbacks=lambda folder: [Drawn(of_classes)]),
    "looks": Variant({"class_weights": "none"}, callbacks=lambda folder: [Drawn(of_looks)]),
    "trivial": Variant(transforms=[Changed(TrivialAugmentWide())]),
    "augmix": Variant(transforms=[Changed(AugMix())]),
    "textures": Variant(transforms=[RandomConvolution()]),
    "distilled": Variant(callbacks=lambda folder: [Distilled(teacher(folder))]),
    "sam": Variant(callbacks=lambda folder: [Sam()]),
}


Pictures = tuple[list[Image.Image], np.ndarray]  # images, and which of them are positive


def pictures_of(groups: dict[str, pd.DataFrame]) -> dict[str, Pictures]:
    """Return the images of each group, decoded once for all fits, and "reframed"."""
    found = {
        name: ([open_image(path, COMMON["size"]) for path in table.path], table.label.eq("PNEUMONIA").to_numpy())
        for name, table in groups.items()
    }
    positive = found["random"][1]
    pairs = zip(groups["random"].path, positive, strict=True)
    return found | {
        "reframed": ([(narrowed if p else widened)(open_image(path, SIDE), FRAME) for path, p in pairs], positive)
    }


def figures_of(export: Path, groups: dict[str, Pictures]) -> dict[str, dict[str, float]]:
    """Return AUC, balanced accuracy, sensitivity and specificity by group."""
    model = open_model(export, COMMON["device"])
    return {name: measure(model, *pictures) for name, pictures in groups.items()}


def fits_of(variant: str, seed: int, folder: Path, groups: dict[str, Pictures]) -> list[dict]:
    """Fit a variant, and return its figures, and those of the averages of its weights, as lines of fits.jsonl."""
    special, start = VARIANTS[variant], time.process_time()
    callbacks = special.callbacks(folder)
    settings = COMMON | special.settings | {"seed": seed, "exports": folder / "exports"}
    with patch.object(loaders, "build_augmentation", lambda name: [*special.transforms, *build_augmentation(name)]):
        export = fit(folder / "data", **settings, callbacks=callbacks, name=f"{variant}-{seed}").path
    row = {"variant": variant, "seed": seed, "seconds": time.process_time() - start}
    rows = [row | {"figures": figures_of(export, groups)}]
    for averages in (callback for callback in callbacks if isinstance(callback, Averages)):
        for name in ("ema", "mean"):
            learn = open_learner(export)
            learn.model.load_state_dict(learn.model.state_dict() | getattr(averages, name))
            learn.dls = dataloaders(folder / "data", learn, seed=seed)
            with contextlib.redirect_stdout(io.StringIO()):
                averaged = save_export(learn, folder / "exports" / f"{name}-{seed}")
            rows.append(row | {"variant": name, "figures": figures_of(averaged, groups)})
            shutil.rmtree(averaged)
    shutil.rmtree(export)
    return rows


def as_table(rows: Sequence[dict]) -> str:
    """Return means and standard deviations over the seeds, and the difference to the default with the same seeds."""
    cells = {
        (row["variant"], row["seed"]): {
            (group, key): part[key] for group, part in row["figures"].items() for key in ("AUC", "balanced")
        }
        | {("fit", "CPU s"): row["seconds"]}
        for row in rows
    }
    table = pd.DataFrame(cells).T.rename_axis(["variant", "seed"])
    variants = table.groupby("variant", sort=False)
    less = {
        name: (part.droplevel(0) - table.loc["default"]).dropna().agg(["mean", "std"]).unstack()
        for name, part in variants
        if name != "default"
    }
    text = [f"seeds\n{variants.size().to_string()}"]
    for title, frame in (
        ("mean", variants.mean()),
        ("standard deviation", variants.std()),
        ("less the default of the same seeds: mean, standard deviation", pd.DataFrame(less).T),
    ):
        text.append(f"{title}\n{frame.T.to_string(float_format='{:.4f}'.format)}")
    return "\n\n".join(text)


def main(folder: Path, names: Sequence[str]) -> None:
    names = chosen("variant", names, VARIANTS)
    table = read_split(find_root(os.environ["XRAY_DATA"]), "train")
    folder.mkdir(parents=True, exist_ok=True)
    groups, runs = groups_of(folder, table), Runs(folder / "fits.jsonl", "variant")
    if not (folder / "data").exists():
        rest = by_patient(table[~table.patient.isin(pd.concat(groups.values()).patient)], 0).head(IMAGES)
        link(folder / "data", rest, np.zeros(len(rest), bool))
    pictures = pictures_of(groups)
    for seed, variant in runs.left(names, SEEDS):
        new = fits_of(variant, seed, folder, pictures)
        runs.add(*new)
        for row in new:
            aucs = ", ".join(f"{group} {part['AUC']:.4f}" for group, part in row["figures"].items())
            print(f"{row['variant']}, seed {seed}: {aucs}; {row['seconds']:.0f} s of CPU time", flush=True)
    print(as_table(runs.rows))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
