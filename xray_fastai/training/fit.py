"""Trains a classifier from split folders and exports it: `fit`, and how an interrupted fit is resumed."""

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from fastai.vision.all import Callback, Metric

from xray_fastai.config.fit_config import FitConfig
from xray_fastai.data.audit.check import fit_notes
from xray_fastai.data.dataset import fingerprint, read_collection
from xray_fastai.data.sources.phantom import cached
from xray_fastai.data.table import FRAME, Data
from xray_fastai.export.run_folder import SETTINGS_FILE, Reservation, Unfinished, reopen, reserve
from xray_fastai.model.timm_networks import check_name
from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError
from xray_fastai.system.options import takes_options
from xray_fastai.system.run_log import RunLog, logging_to
from xray_fastai.system.signals import sigterm_raises
from xray_fastai.training.checkpoint import Checkpoints, Saved, kept_settings
from xray_fastai.training.disk_space import check_space
from xray_fastai.training.ensemble_export import export_members
from xray_fastai.training.loop import Added, Trainer
from xray_fastai.training.members import START, Members, read_checkpoints, start_tensors, with_start, without_done
from xray_fastai.training.messages import announce, name_leftovers, name_same, report_resume
from xray_fastai.training.origin import origin_of, with_parents_choices
from xray_fastai.training.plan import Plan, make_plan
from xray_fastai.training.provenance import folder_of, log_images, log_path, log_start, take_over_log
from xray_fastai.training.trackers import check_trackers, figures_of, tracking
from xray_fastai.training.write_export import FitInterrupted, Result, export_learner

CHANGEABLE = ("data", "images", "device", "workers", "cache", "exports", "quiet", "log")
"""Settings that may change when a fit is resumed. `data` must hold the same images."""


OTHER_NAMES = {
    "config": "a FitConfig is the first argument",
    "cbs": "callbacks= takes fastai's callbacks",
    "bs": "it is batch_size=",
    "dls": "fit makes the loaders, of the folder in data=",
    "item_tfms": "size= resizes images",
    "batch_tfms": "augment= and contrast= choose the transforms",
    "n_epoch": "it is epochs=",
    "base_lr": "it is lr=",
    "lr_max": "it is lr=",
    "lr_find": 'it is lr="find"',
    "pretrained": "it is weights=",
}
"""What `fit` answers to names of fastai, and to one of its own before."""


@takes_options(FitConfig, OTHER_NAMES)
def fit(
    data: Data | FitConfig | None = None,
    *,
    resume: bool | str | Path = False,
    callbacks: Sequence[Callback] = (),
    metrics: Sequence[Metric | Callable[..., Any]] = (),
    **settings: Any,
) -> Result:
    """Train a classifier and export it; progress is printed.

    An option that is None is chosen by `recipe`, by the data or by the machine. `fit` prints its choices, and the
    export records them.

    A fit has two phases, frozen and unfrozen. Each is one `learn.fit`, which gets `callbacks` as `cbs` besides the
    fit's own. The same objects are used in both phases, and again after a restart with smaller batches (out of memory):
    `before_fit` marks each start. CancelFitException ends the phase. In the frozen phase a batch holds the backbone's
    features instead of images, unless `frozen_views` is 0. Checkpoints do not store a callback's attributes.

    With `members`, several networks are trained one after the other, each in these phases and with the same objects
    (`training.members`).

    If torchrun started several processes, each must call this with the same arguments, and gets the same result.

    Args:
        data: the folder with train/CLASS/* and val/CLASS/*, or a table of images, a .csv file or a data frame
            (`data.table`); None takes ./chest_xray if it exists, else X-rays that the package draws. Or a `FitConfig`,
            which holds all options.
        resume: the name of an unfinished run to resume with its settings; True resumes the newest. Of `settings`, only
            those in `CHANGEABLE` may then differ.
        callbacks: fastai callbacks, added to both phases.
        metrics: fastai metrics, or functions of outputs (B, classes) and classes (B,), besides accuracy and ROC AUC;
            the history has a column of each.
        **settings: fields of `FitConfig`.

    Raises:
        UserError: wrong input. Nothing is written, except a checkpoint that can be resumed.
        FitInterrupted: Ctrl-C, SIGTERM, a closed terminal (SIGHUP), or an interrupt of the notebook's kernel, after the
            export was written; a `KeyboardInterrupt`, whose `result` is what `fit` would have returned.

    Examples:
        >>> result = fit("chest_xray", arch="resnet18", size=32, weights="none", epochs=1, batch_size=8, name="quick")
        >>> result.status
        'complete'
        >>> result.path.name
        'quick'
    """
    started = time.perf_counter()
    added = Added(callbacks, metrics, data if isinstance(data, pd.DataFrame) else None)
    data = FRAME if added.frame is not None else data
    distributed.check_installed()
    try:
        with distributed.session() as first, sigterm_raises():
            if not first:
                result = _follow(started, added)
            elif resume is False:
                config = _config(data, settings)
                with reserve(config.exports, config.name) as run:
                    result = _logged(config, run, None, started, added)
            else:
                given = _given(data, settings)
                name = None if resume is True else str(resume)
                with reopen(given.get("exports", FitConfig.exports), name) as (run, found):
                    result = _logged(_settings(found, run, given), run, found, started, added)
    finally:
        gc.collect()  # a learner and its callbacks refer to each other: with ResNet18, 220 MB would stay in memory
    if result.signal is not None:
        raise FitInterrupted(result)
    return result


def _config(data: str | Path | FitConfig | None, settings: dict[str, Any]) -> FitConfig:
    """Return the settings of a fit.

    Raises:
        UserError: `data` is neither a folder nor settings, or a setting is not allowed.
    """
    if isinstance(data, FitConfig):
        return replace(data, **settings)
    if data is not None and not isinstance(data, (str, os.PathLike)):
        raise UserError("give a folder, a table, or a FitConfig", option="data", value=f"of type {type(data).__name__}")
    return FitConfig(data=None if data is None else os.fspath(data), **settings)


def _given(data: str | Path | FitConfig | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the user gave; of a `FitConfig`, those that are not the defaults."""
    if data is None:
        return settings
    config = _config(data, settings)
    return {name: value for name, value in asdict(config).items() if value != getattr(FitConfig, name)} | settings


def _settings(found: Unfinished, run: Reservation, given: dict) -> FitConfig:
    """Return the settings that an unfinished fit began with, changed where `given` may change them.

    Raises:
        UserError: `given` changes others, or the settings are not readable.
    """
    kept = kept_settings(found.checkpoint)
    try:
        config = FitConfig(**kept["settings"])
    except (KeyError, TypeError) as error:
        path = found.checkpoint / SETTINGS_FILE
        raise UserError(
            f"{path}: written by another version ({error}); delete {found.path}, and start a new fit"
        ) from None
    if config.data is None and given.get("data") is not None:
        raise UserError(
            f"{found.name} trains on the X-rays that the package draws; leave it out",
            option="data",
            value=given["data"],
        )
    given = {"quiet": False} | given | {"exports": str(run.exports)}
    if changed := [k for k, v in given.items() if k not in CHANGEABLE and v != getattr(config, k)]:
        others = " and ".join(f"{option}=" for option in changed[1:])
        raise UserError(
            f"cannot change when {found.name} is resumed{f', nor can {others}' if others else ''}; leave it out, or "
            "start a new fit",
            option=changed[0],
        )
    config = replace(config, **{k: v for k, v in given.items() if k in CHANGEABLE})
    if "data" in given or config.data is None or os.path.exists(os.path.expanduser(config.data)):
        return config
    folder = kept.get("folder", config.data)  # earlier versions did not record where the fit ran
    if not os.path.exists(folder):
        raise UserError(
            f"the images of {found.name} were in {folder}, where there is nothing now; give their folder by data="
        )
    return replace(config, data=os.path.relpath(folder))


def _logged(
    config: FitConfig,
    run: Reservation,
    found: Unfinished | None,  # the run to resume
    started: float,
    added: Added,
) -> Result:
    """Run the fit, and write what it shows into its log, too."""
    check_trackers(config)
    if found is not None:
        take_over_log(found, run)
    with logging_to(lambda: log_path(run), config.quiet) as log:
        log_start(log, config)
        return _fit(config, run, found, Began(started, added, log))


@dataclass(frozen=True)
class Began:
    """Holds what a fit began with, besides settings and folder."""

    started: float  # `time.perf_counter()`
    added: Added
    log: RunLog


def _fit(config: FitConfig, run: Reservation, found: Unfinished | None, began: Began) -> Result:
    """Read the data, train and export: the whole fit in one process, or its part in the first of several."""
    checkpoints = Checkpoints(run)
    of_networks = [checkpoints]
    if config.members > 1:
        of_networks = [Checkpoints(run, member) for member in range(config.members)]
    kept, saved = {}, {}
    if found is None:
        name_leftovers(run)
        checkpoints.keep({"settings": config.to_dict(), "folder": folder_of(config)})
    if found is None or config.arch is None:
        config = with_parents_choices(config)
    check_name(config.arch)  # before the images are read, which takes minutes
    config, data = read_collection(config.with_recipe(), began.added.frame)
    data.notes.extend(fit_notes(data))
    images = fingerprint(data)
    log_images(began.log, config, images)
    if found is None:
        name_same(run, config)
    else:
        kept = kept_settings(found.checkpoint)
        _check_images(found, kept, images, config)
        saved = read_checkpoints(of_networks, found.checkpoint)
    origin = origin_of(kept, config) if saved else None
    plan, start = make_plan(config, data, origin), kept.get("start")
    if found is not None and saved and start is not None:
        plan, start = _with_start(plan, found, start)
    if data.has_folds and plan.start is not None:
        data.notes.append(
            "the networks start from an export: if it was trained on these images, the out-of-fold figures are too "
            "good, and calibration and threshold too sure"
        )
    trainer = _trainer(plan, of_networks, saved, began.started)
    announce(plan, trainer.parameters)
    if found is not None:
        checkpoints.take_over(found.checkpoint)
        report_resume(found, run, plan, saved)
    if plan.members > 1 and start is None:
        start = checkpoints.keep_tensors(START, start_tensors(plan))
    settings = {"data": images, "origin": plan.origin.name, "pretrained": plan.origin.pretrained}
    settings |= {"lineage": plan.origin.lineage, "folder": folder_of(config)} | ({"start": start} if start else {})
    checkpoints.keep({"settings": config.to_dict(), **settings})
    check_space(run.partial, trainer.learn.model, members=plan.members)
    chosen = replace(plan.config, device=plan.device.type, precision=plan.precision)
    distributed.share((chosen, data, plan.origin, without_done(saved, plan)))
    with tracking(config, run) as trackers:
        trainer.added = replace(began.added, trackers=trackers)
        trainer.train()
        result = export_members(trainer, run) if isinstance(trainer, Members) else export_learner(trainer, run)
        for tracker in trackers:
            tracker.finish(figures_of(result.path), result.path)
    return distributed.share(result)


def _follow(started: float, added: Added) -> Result:
    """Train in a process that is not the first of several.

    It neither prints nor writes. It gets settings and tables from the first process, whose weights are copied when
    training starts.
    """
    config, data, origin, saved = distributed.share()
    if data.rehearsal:
        cached()  # draws the images, if this machine does not have them
    trainer = _trainer(make_plan(config, data, origin), None, saved, started)
    trainer.added = added
    trainer.train()
    return distributed.share()


def _trainer(
    plan: Plan, checkpoints: Sequence[Checkpoints] | None, saved: dict[int, Saved], started: float
) -> Trainer | Members:
    """Make what trains the network or the networks of a plan.

    Args:
        plan: the fit.
        checkpoints: of each network; None where another process writes them.
        saved: the checkpoints to resume from, by the number of the network.
        started: when the fit was called.
    """
    if plan.members > 1:
        return Members(plan, checkpoints=checkpoints, saved=saved, started=started)
    own = None if checkpoints is None else checkpoints[0]
    return Trainer(plan, checkpoints=own, saved=saved.get(0), started=started)


def _check_images(found: Unfinished, kept: dict[str, Any], images: dict, config: FitConfig) -> None:
    """Check that the images are those that an unfinished fit began with.

    Raises:
        UserError: they have changed.
    """
    before = kept.get("data", images)
    if before != images:
        counts = [f"{n['train']} to train on and {n['valid']} to validate on" for n in (before, images)]
        how = f"{counts[0]} then, {counts[1]} now" if counts[0] != counts[1] else "a name, label or content changed"
        raise UserError(
            f"not the images that {found.name} was trained on ({how}); restore them, or give "
            "their folder by data=, or start a new fit",
            option="data",
            value=config.data,
        )


def _with_start(plan: Plan, found: Unfinished, known: dict[str, Any]) -> tuple[Plan, dict[str, Any] | None]:
    """Return a plan with the weights that the networks of an unfinished fit start from, and the facts of their file.

    If the file is damaged, they are read from where they came from, and the facts are None.
    """
    complete = with_start(plan, found.checkpoint, known)
    if complete is not None:
        return complete, known
    print(f"{found.checkpoint / START}: damaged; reading the weights again from {plan.config.weights}")
    return make_plan(plan.config, plan.data), None
