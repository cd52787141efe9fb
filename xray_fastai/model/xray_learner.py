"""fastai's `Learner` as this package makes it: it says what it is, and where it lacks images, how to get them.

All that fastai's tutorials do on a learner works on one of an export after
`learn.dls = xray_fastai.dataloaders(folder, learn)`.
"""

from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

from fastai.vision.all import Callback, DataLoader, Learner
from PIL import Image

from xray_fastai.config.choices import network_of
from xray_fastai.model.loaders import NO_IMAGES, EmptyLoader, XrayDataLoaders
from xray_fastai.system.errors import ImageError, UserError
from xray_fastai.system.text import count_of


@dataclass(frozen=True)
class About:
    """Says what a learner is besides its weights: `learn.xray`."""

    settings: dict[str, Any] = field(repr=False)  # model.json; that of a new learner has no results yet
    path: str | None = None  # the export that it is; no `Path`, which a pickle of another system may not hold
    changed: bool = False  # whether it was trained since it was opened or saved


class NeedsImages(Callback):
    "Say how to get images, where fastai would validate on none of them in silence."

    order = -200  # before all other callbacks

    def __call__(self, event_name):
        "Check before a validation, outside of the method for that event: fastai rewords the errors of those."
        if event_name == "before_validate" and isinstance(self.dl, EmptyLoader):
            raise UserError(NO_IMAGES)
        return super().__call__(event_name)


class XrayLearner(Learner):
    "fastai's `Learner`, with the export's settings in `xray`, and errors that say what to do."

    xray: About | None = None  # None after fastai's own `load_learner`

    def __repr__(self) -> str:
        classes = f"classes {', '.join(self.dls.vocab)}"
        if self.xray is None:
            return f"{type(self).__name__}: {self.arch}, {classes}"
        settings = self.xray.settings
        parts = [network_of(settings), f"{settings['preprocessing']['size']} px", classes]
        if settings.get("threshold") is not None:
            parts.append(f"{settings['positive']} from a probability of {settings['threshold']:.4g}")
        changed = ", trained since" if self.xray.changed else ""
        parts.append("not saved" if self.xray.path is None else f"export {self.xray.path}{changed}")
        return f"{type(self).__name__}: {', '.join(parts)}"

    @wraps(Learner.fit)
    def fit(self, *args, **kwargs):
        self._check_training_images()
        self._mark_changed()
        return super().fit(*args, **kwargs)

    @wraps(Learner.load)
    def load(self, *args, **kwargs):
        self._mark_changed()
        return super().load(*args, **kwargs)

    @wraps(Learner.lr_find)
    def lr_find(self, *args, **kwargs):
        self._check_training_images()
        before, rows = self.xray, [*self.recorder.history]
        try:
            return super().lr_find(*args, **kwargs)
        finally:  # it restores the weights
            self.xray, self.recorder.history = before, rows

    @wraps(Learner.predict)
    def predict(self, *args, **kwargs):
        try:
            with self.no_bar():
                return super().predict(*args, **kwargs)
        except ImageError as error:
            raise error.with_traceback(None) from None  # without the frames of fastai's loaders

    @wraps(Learner.summary)
    def summary(self):
        images = self.dls
        if isinstance(images.train, EmptyLoader):
            blank = images.test_dl([Image.new("L", (64, 64))])
            self.dls = XrayDataLoaders(blank, blank, path=images.path, device=images.device)
        try:
            return super().summary()
        finally:
            self.dls = images

    def _mark_changed(self) -> None:
        if self.xray is not None:
            self.xray = replace(self.xray, changed=True)

    def _check_training_images(self) -> None:
        loader: DataLoader = self.dls.train
        if isinstance(loader, EmptyLoader):
            raise UserError(NO_IMAGES)
        if not len(loader):
            images = count_of(loader.n, "training image")
            raise UserError(f"{images}, fewer than a batch of {loader.bs}; make loaders of smaller batches")
