"""Builds a fastai `Learner` from an export, without pickle: the public function `load_learner`."""

import os
from pathlib import Path

from xray_fastai.config.choices import members_of
from xray_fastai.export.network import load_weights
from xray_fastai.export.reader import find_export, path_of, read
from xray_fastai.model.architectures import on_start
from xray_fastai.model.learner import build_learner, set_scaling
from xray_fastai.model.loaders import empty_loaders
from xray_fastai.model.xray_learner import About, XrayLearner


def load_learner(path: str | Path) -> XrayLearner:
    """Build a fastai `Learner` from an export's `model.safetensors` and `model.json`; nothing is unpickled.

    Args:
        path: the export's folder, or one of the files in it.

    Returns:
        A learner on the CPU, in evaluation mode. `learn.predict(image)` takes a path, a PIL image or an array. It
        returns the label, its index and the probabilities (classes,) of the export, in the order of `learn.dls.vocab`.
        `predict`, `evaluate`, `interpret` and `verify` of this package take it as they take the folder. `learn.xray`
        has the content of `model.json`. It has no images: `learn.dls = xray_fastai.dataloaders(folder, learn)` gives it
        some, to train it further or for fastai's interpretation.

    Raises:
        UserError: the folder is no export, was written by a newer version, or is damaged.

    Examples:
        >>> learn = open_learner("exports/rehearsal")
        >>> label, index, probabilities = learn.predict("image.jpeg")
        >>> label == learn.dls.vocab[index]
        True
        >>> learn.xray.settings["positive"]
        'PNEUMONIA'
    """
    folder = find_export(path_of(path))
    model = read(folder)
    preprocessing = model["preprocessing"]
    dls = empty_loaders(model["classes"], preprocessing["size"], preprocessing.get("contrast", "none"))
    with on_start(model["architecture"]):
        learn = build_learner(
            dls,
            model["architecture"],
            dropout=model["dropout"],
            class_weights=model["class_weights"],
            size=preprocessing["size"],
            members=members_of(model),
        )
    load_weights(learn.model, folder, model)
    set_scaling(learn, model["temperature"], model.get("intercepts"))
    learn.model.eval()
    learn.xray = About(model, os.fspath(folder))
    return learn


open_learner = load_learner
"""The same under a name that `from fastai.vision.all import *` does not replace."""
