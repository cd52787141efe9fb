"""Makes fastai's `DataLoaders` and `Learner` as a fit has them, for those who train by fastai's own methods.

The public functions `dataloaders` and `learner`. `fit` makes its own by the same methods of `training.plan.Plan`.
"""

from dataclasses import replace
from typing import Any

import pandas as pd
from fastai.vision.all import DataLoaders, Learner

from xray_fastai.config.choices import FIND, members_of
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.audit.check import fit_notes
from xray_fastai.data.dataset import default_data, read_collection, with_data_defaults
from xray_fastai.data.folders import find_root, list_split, split_folder
from xray_fastai.data.sources.phantom import cached
from xray_fastai.data.table import Data, is_table, name_of
from xray_fastai.export.model_json import read_settings
from xray_fastai.export.reader import export_in_weights
from xray_fastai.model.loaders import XrayDataLoaders
from xray_fastai.model.xray_learner import About, XrayLearner
from xray_fastai.system.errors import UserError
from xray_fastai.system.options import takes_options
from xray_fastai.training.origin import Origin, with_parents_choices
from xray_fastai.training.plan import make_plan

OF_LOADERS = (
    "images", "column", "valid", "batch_size", "positive", "size", "recipe", "contrast", "augment", "class_weights",
    "patient_pattern", "patients", "skip_bad", "exclude", "seed", "device", "workers", "cache",
)  # fmt: skip
"""The options of `fit` that loaders need."""
OF_THE_LEARNER = ("size", "contrast")
"""Those of them that a learner has settled."""
OF_NETWORKS = ("weights", "dropout", "class_weights", "lr", "calibration", "target_sensitivity")
"""The options of `fit` that a learner needs, besides those of its loaders; the last two are for `save_export`."""
LOADERS_NAMES = {
    "bs": "it is batch_size=",
    "valid_pct": "it is valid=, a fraction of train/",
    "item_tfms": "size= resizes images",
    "batch_tfms": "augment= and contrast= choose the transforms",
    "arch": "give it to xray_fastai.learner",
    "weights": "give it to xray_fastai.learner",
}
LEARNER_NAMES = {
    "pretrained": "it is weights=",
    "ps": "it is dropout=",
    "cbs": "add callbacks by learn.add_cbs, or give them to its fit methods",
    "metrics": "add them by learn.metrics += [...]",
    "loss_func": "set learn.loss_func; class_weights= weighs the cross-entropy",
}


@takes_options(FitConfig, LOADERS_NAMES, OF_LOADERS)
def dataloaders(data: Data | None = None, learn: Learner | None = None, **settings: Any) -> XrayDataLoaders:
    """Make fastai `DataLoaders` of a folder of images, as `fit` does: no patient is in both parts.

    With a learner, the images get its preprocessing and augmentation, so that all of fastai works on an export:

        learn = xray_fastai.open_learner("exports/rehearsal")
        learn.dls = xray_fastai.dataloaders("second_hospital", learn)
        learn.fine_tune(3)

    Without one, `xray_fastai.learner(dls)` makes the learner that `fit` trains. `dls.class_weights` are the weights of
    the classes in its loss. The images' table, with patients, is `dls.train.items` and `dls.valid.items`. The seeds of
    Python, NumPy and torch are set, as in a fit.

    Args:
        data: the folder with train/CLASS/* and val/CLASS/*, or a table of images, a .csv file or a data frame
            (`data.table`); None takes ./chest_xray if it exists, else X-rays that the package draws.
        learn: a learner of `open_learner` or `learner`. Its classes must be those of the folder; `size` and `contrast`
            are its own. Where they are not given, so are `augment`, `positive`, `class_weights` and `patient_pattern`.
        **settings: see `OF_LOADERS`.

    Raises:
        UserError: the folder is no such collection, or an image cannot be read; or the learner has other classes, or
            was not made by this package.

    Examples:
        >>> learn = open_learner("exports/rehearsal")
        >>> learn.dls = dataloaders("chest_xray", learn, valid="0.25", batch_size=8)
        >>> predicted, targets = learn.get_preds()
        >>> predicted.shape == (len(targets), 2)
        True
    """
    frame = data if isinstance(data, pd.DataFrame) else None
    config = FitConfig(**settings | {"data": data if data is None else name_of(data)})
    classes = None
    if learn is not None:
        config = _as_learner(config.with_choices(data=default_data()), learn)
        classes = list(learn.dls.vocab)
    config, images = read_collection(config.with_recipe(), frame, classes)
    if learn is not None:
        _check_classes(images.classes, learn, config.data)
    images.notes.extend(fit_notes(images))
    return make_plan(config, images, Origin("none: loaders alone", pretrained=False)).dataloaders()


def _as_learner(config: FitConfig, learn: Learner) -> FitConfig:
    """Return the settings, completed by those of a learner.

    Raises:
        UserError: the learner has none, or other ones were given, or the folder has other classes.
    """
    about = about_of(learn)
    if not is_table(config.data):
        root = cached() if config.data is None else find_root(config.data)
        folder = split_folder(root, "train")
        assert folder is not None, "find_root looks for it"
        _check_classes(sorted(list_split(folder)), learn, config.data)
    model, settings, preprocessing = about.settings, about.settings["settings"], about.settings["preprocessing"]
    own = {"size": preprocessing["size"], "contrast": preprocessing.get("contrast", "none")}
    for name, value in own.items():
        if getattr(config, name) not in (None, value):
            raise UserError(f"the learner's is {value}; leave it out", option=name, value=getattr(config, name))
    config = config.with_choices(**own, arch=model["architecture"], positive=model["positive"])
    if config.recipe != FitConfig.recipe:  # given
        config = config.with_recipe()
    kept = {name: settings.get(name) for name in ("augment", "class_weights", "patient_pattern", "target_sensitivity")}
    config = config.with_choices(**kept, weights=about.path or settings["weights"])
    return replace(config, dropout=model["dropout"], calibration=settings.get("calibration") or FitConfig.calibration)


def _check_classes(classes: list[str], learn: Learner, data: str | None) -> None:
    """Check that images have the classes of a learner.

    Raises:
        UserError: they have others.
    """
    if list(learn.dls.vocab) != classes:
        raise UserError(
            f"its classes are {', '.join(classes)}, those of the learner are {', '.join(learn.dls.vocab)}; rename the "
            "folders, or start a new learner by xray_fastai.learner(dls, weights=EXPORT)",
            option="data",
            value=data,
        )


def about_of(learn: Learner) -> About:
    """Return what a learner is.

    Raises:
        UserError: it does not know it.
    """
    about: About | None = getattr(learn, "xray", None)
    if about is None:
        raise UserError(
            "this learner has no settings of this package; open the export's folder by xray_fastai.open_learner, or "
            "make one by xray_fastai.learner(dls)",
            option="learn",
        )
    return about


@takes_options(FitConfig, LEARNER_NAMES, OF_NETWORKS)
def learner(dls: DataLoaders, arch: str | None = None, **settings: Any) -> XrayLearner:
    """Make the learner that `fit` trains, for a training of one's own.

        dls = xray_fastai.dataloaders("chest_xray")
        learn = xray_fastai.learner(dls, "resnet18")
        learn.fine_tune(3)
        xray_fastai.save_export(learn, "exports/mine")

    Its backbone is frozen, which `fine_tune` and `unfreeze` change.

    Args:
        dls: loaders that `dataloaders` made.
        arch: a backbone of `fit`; None takes that of an export in `weights`, else ResNet50.
        **settings: see `OF_NETWORKS`.

    Raises:
        UserError: the loaders are others, or the weights are not available or not those of `arch`.

    Examples:
        >>> dls = dataloaders("chest_xray", size=32, valid="0.25", batch_size=8)
        >>> learn = learner(dls, "resnet18", weights="none")
        >>> learn.xray.settings["architecture"]
        'resnet18'
    """
    plan = getattr(dls, "plan", None)
    if plan is None:
        raise UserError(
            "the images of these loaders are not prepared as the network needs them; make loaders by "
            "xray_fastai.dataloaders(folder)",
            option="dls",
        )
    config = replace(plan.config, arch=arch, **settings)
    if (parent := export_in_weights(config.weights)) is not None and members_of(read_settings(parent)) > 1:
        raise UserError(
            f"{parent} is an ensemble; open it by xray_fastai.open_learner, to train all of its networks at once",
            option="weights",
        )
    config = with_parents_choices(config)
    config = with_data_defaults(config).with_weights_of(plan.data.classes, plan.data.positive)
    if config.lr == FIND:
        raise UserError("search it by learn.lr_find(), and give the rate to a fit method", option="lr", value=FIND)
    plan = make_plan(config, plan.data)
    learn = plan.learner(dls)
    learn.lr = config.lr
    learn.xray = About(plan.record() | {"training": {"weights": plan.origin.name}})
    return learn
