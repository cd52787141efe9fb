"""A fit from split folders to an export: frozen phase, unfrozen phase, early stopping, best weights, checkpoints."""

import gc
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from xray_fastai.config import FitConfig
from xray_fastai.data.audit.check import fit_notes
from xray_fastai.data.dataset import fingerprint, read_collection
from xray_fastai.data.sources.phantom import cached
from xray_fastai.export.run_folder import SETTINGS, Reservation, Unfinished, reopen, reserve
from xray_fastai.model.learner import parameter_counts
from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError
from xray_fastai.system.signals import sigterm_raises
from xray_fastai.training.callbacks import StopOnSignal
from xray_fastai.training.checkpoint import Checkpoints, Saved, check_space, kept_settings
from xray_fastai.training.finish import Result, export_learner
from xray_fastai.training.loop import first_progress, train
from xray_fastai.training.messages import announce, name_leftovers, say_where
from xray_fastai.training.plan import make_plan

CHANGEABLE = ("data", "device", "workers", "cache", "exports")
"""Settings that may differ when a fit is gone on with. `data` is checked to hold the same images."""


def fit(config: FitConfig | None = None, *, resume: bool | str | Path = False, **settings: Any) -> Result:
    """Train a classifier and export it; what is done is printed as it goes.

    Args:
        config: the settings; or give them by name, as in `fit(data="chest_xray", epochs=5)`.
        resume: go on with the unfinished run of this name (True: the newest) and its settings; of others, only
            `CHANGEABLE` may be given.
        **settings: fields of `FitConfig`.

    Raises:
        UserError: bad input, by name; nothing is left behind but a checkpoint that `resume` takes.

    Where torchrun has started several processes, each calls this alike and gets the same result (`distributed`).
    """
    started = time.perf_counter()

    distributed.check_installed()
    try:
        with distributed.session() as first, sigterm_raises():
            if not first:
                return _follow(started)
            if resume is False:
                config = FitConfig(**settings) if config is None else config
                with reserve(config.exports, config.name) as run:
                    return _fit(config, run, None, started)
            if config is not None:
                defaults = FitConfig()
                given = {f.name: getattr(config, f.name) for f in fields(config)}
                settings = {k: v for k, v in given.items() if v != getattr(defaults, k)} | settings
            name = None if resume is True else str(resume)
            with reopen(settings.get("exports", FitConfig.exports), name) as (run, found):
                return _fit(_settings(found, run, settings), run, found, started)
    finally:
        gc.collect()  # a learner and its callbacks hold each other: ResNet18 and its optimiser are 220 MB a fit


def _settings(found: Unfinished, run: Reservation, given: dict) -> FitConfig:
    """The settings that an unfinished fit began with, and of those given the ones that may change."""

    try:
        config = FitConfig(**kept_settings(found.checkpoint)["settings"])
    except (KeyError, TypeError) as error:
        path = found.checkpoint / SETTINGS
        raise UserError(f"{path}: not of this version ({error}); start anew, and delete {found.path}") from None
    given = given | {"exports": str(run.exports)}
    if changed := [k for k, v in given.items() if k not in CHANGEABLE and v != getattr(config, k)]:
        told = ", ".join(f"--{option.replace('_', '-')}" for option in changed)
        raise UserError(
            f"{told}: can't change when --resume goes on with {found.name}; leave it out, or start a new fit"
        )
    return replace(config, **{k: v for k, v in given.items() if k in CHANGEABLE})


def _fit(config: FitConfig, run: Reservation, found: Unfinished | None, started: float) -> Result:

    checkpoints = Checkpoints(run)
    saved = origin = None
    if found is None:
        name_leftovers(run)
        checkpoints.keep({"settings": config.to_dict()})
    config, data = read_collection(config.with_recipe())
    data.notes.extend(fit_notes(data))
    images = fingerprint(data)
    if found is not None:
        saved, origin = _read_checkpoint(found, checkpoints, images, config)
    plan = make_plan(config, data, origin)
    progress = first_progress(plan, saved, started)
    learn = plan.learner(progress.batches)
    plan = replace(plan, parameters=parameter_counts(learn))
    announce(plan)
    if found is not None:
        checkpoints.take_over(found.checkpoint)
        say_where(found, run, plan, saved)
    checkpoints.keep({"settings": config.to_dict(), "data": images, "origin": plan.origin})
    check_space(run.partial, learn.model)
    chosen = replace(plan.config, device=plan.device.type, precision=plan.precision)
    distributed.share((chosen, data, plan.origin, saved))
    with checkpoints, StopOnSignal() as stop:
        learn, progress, best, error = train(plan, learn, progress, checkpoints, stop, saved)
        checkpoints.wait()
    return distributed.share(export_learner(plan, run, learn, progress, best, stop, error))


def _follow(started: float) -> Result:
    """`_fit` in a process that trains with others and is not the first of them: it reads and writes no more than it
    must. The first one's weights come as training starts."""

    config, data, origin, saved = distributed.share()
    if data.rehearsal:
        cached()  # this machine may not have it yet
    plan = make_plan(config, data, origin)
    progress = first_progress(plan, saved, started)
    learn = plan.learner(progress.batches)
    with StopOnSignal() as stop:
        train(plan, learn, progress, None, stop, saved)
    return distributed.share()


def _read_checkpoint(
    found: Unfinished, checkpoints: Checkpoints, images: dict, config: FitConfig
) -> tuple[Saved | None, str | None]:
    """The newest checkpoint of an unfinished fit, where it has one, and the origin of its weights.

    Raises:
        UserError: the images are not the same any more, or the checkpoints are damaged.
    """

    kept = kept_settings(found.checkpoint)
    then = kept.get("data", images)
    if then != images:
        counts = [f"{told['train']} to train on and {told['valid']} to validate on" for told in (then, images)]
        how = f"{counts[0]} then, {counts[1]} now" if counts[0] != counts[1] else "a name, label or content changed"
        raise UserError(
            f"not the images that {found.name} was trained on ({how}); bring them back, or give "
            "their folder by --data, or start a new fit",
            option="data",
            value=config.data,
        )
    saved, faults = checkpoints.load(found.checkpoint)
    for fault in faults:
        print(f"{fault}; going on from the checkpoint before it")
    return saved, kept["origin"] if saved else None
