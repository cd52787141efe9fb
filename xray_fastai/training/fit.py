"""A fit from split folders to an export: frozen phase, unfrozen phase, early stopping, best weights, checkpoints."""

import contextlib
import gc
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from xray_fastai.config import FitConfig
from xray_fastai.data.audit.check import fit_notes
from xray_fastai.data.dataset import fingerprint, read_collection
from xray_fastai.export.reader import write
from xray_fastai.export.run_folder import SETTINGS, Reservation, Unfinished, reopen, reserve
from xray_fastai.system import distributed
from xray_fastai.system.errors import ImageError, UserError
from xray_fastai.training.finish import model_record
from xray_fastai.training.messages import announce, conclude, name_leftovers, place, say_where
from xray_fastai.training.plan import Plan, make_plan

if TYPE_CHECKING:
    from fastai.vision.all import Learner

    from xray_fastai.training.callbacks import BestWeights, EpochLog, StopOnSignal
    from xray_fastai.training.checkpoint import Checkpoints, Saved
    from xray_fastai.training.state import Progress

CHANGEABLE = ("data", "device", "workers", "cache", "exports")
"""Settings that may differ when a fit is gone on with. `data` is checked to hold the same images."""


@dataclass
class Result:
    """What a fit ended with."""

    path: Path  # the export
    status: str  # complete, interrupted or diverged
    history: list[dict] = field(repr=False)
    config: FitConfig = field(repr=False)
    signal: int | None = None  # the one that interrupted it
    error: str | None = None  # why it diverged


def fit(config: FitConfig | None = None, *, resume: bool | str | Path = False, **settings) -> Result:
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
    from xray_fastai.system.signals import sigterm_raises

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
    from xray_fastai.training.checkpoint import kept_settings

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
    from xray_fastai.model.learner import parameter_counts
    from xray_fastai.training.callbacks import StopOnSignal
    from xray_fastai.training.checkpoint import Checkpoints, check_space

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
    progress = _progress(plan, saved, started)
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
        learn, progress, best, error = _train_within_memory(plan, learn, progress, checkpoints, stop, saved)
        checkpoints.wait()
    return distributed.share(_export(plan, run, learn, progress, best, stop, error))


def _follow(started: float) -> Result:
    """`_fit` in a process that trains with others and is not the first of them: it reads and writes no more than it
    must. The first one's weights come as training starts."""
    from xray_fastai.data.sources.phantom import cached
    from xray_fastai.training.callbacks import StopOnSignal

    config, data, origin, saved = distributed.share()
    if data.rehearsal:
        cached()  # this machine may not have it yet
    plan = make_plan(config, data, origin)
    progress = _progress(plan, saved, started)
    learn = plan.learner(progress.batches)
    with StopOnSignal() as stop:
        _train_within_memory(plan, learn, progress, None, stop, saved)
    return distributed.share()


def _train_within_memory(
    plan: Plan,
    learn: "Learner",
    progress: "Progress",
    checkpoints: "Checkpoints | None",
    stop: "StopOnSignal",
    saved: "Saved | None",
) -> tuple["Learner", "Progress", "BestWeights", str | None]:
    """`_train`; where memory is short, again from the last checkpoint with smaller batches.

    Several processes could not all go back: what one was short of, the others have done.
    """
    import torch

    from xray_fastai.training.out_of_memory import is_out_of_memory, smaller

    while True:
        try:
            return learn, progress, *_train(plan, learn, progress, checkpoints, stop, saved)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if (processes := distributed.world_size()) > 1:
                raise UserError(
                    f"--batch-size {plan.config.batch_size}: out of memory on {plan.device}, with "
                    f"{plan.batch_size // processes} images at once in each of {processes} processes; give a smaller "
                    "one, or more processes"
                ) from None
            part = "train" if learn.training else "valid"
        # out of the `except`, whose error holds the frames that hold the tensors
        checkpoints.wait()
        at_once = progress.batches[part]
        batches = progress.batches | {part: smaller(plan.batch_size if part == "train" else at_once, at_once)}
        if not batches[part]:
            raise UserError(
                f"--device {plan.config.device}: out of memory on {plan.device_name} even with one image at once; "
                f"try a --size below {plan.config.size} or a smaller --arch than {plan.config.arch}"
            )
        learn.model.cpu()  # what calls this still holds the learner
        learn.opt = None
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
        saved, _ = checkpoints.load()
        progress = replace(_progress(plan, saved, progress.started), batches=batches)
        learn = plan.learner(batches)
        told = f"{batches[part]} images at once instead of {at_once}"
        if part == "train":
            told += f", the gradients of {plan.batch_size} summed up for a step"
        where = f"after {place(plan, saved)}" if saved else "from the beginning"
        print(
            f"\nout of memory in {'training' if part == 'train' else 'validation'}: {told}; going on {where}",
            flush=True,
        )


def _train(
    plan: Plan,
    learn: "Learner",
    progress: "Progress",
    checkpoints: "Checkpoints | None",  # None where another process writes them
    stop: "StopOnSignal",
    saved: "Saved | None",
) -> tuple["BestWeights", str | None]:
    """Train the phases that are not done yet; the best weights, which the model has then, and why the fit diverged."""
    from fastai.vision.all import CancelFitException

    from xray_fastai.training.callbacks import (
        BestWeights,
        EarlyStopping,
        EpochLog,
        StopOnNonFiniteLoss,
        precision_callbacks,
    )
    from xray_fastai.training.out_of_memory import AccumulateGradients
    from xray_fastai.training.state import (
        RestoreCheckpoint,
        SaveCheckpoint,
        restore_best,
        restore_model,
        save_between_phases,
    )

    best = BestWeights(progress.history, later=plan.config.schedule == "adaptive")
    within = saved is not None and saved.state["epoch"] > 0
    if saved is not None:
        restore_best(best, saved)
        restore_model(learn, saved)
    for name, epochs in plan.phases[len(progress.ends) :]:
        log, early = EpochLog(progress.history, name), EarlyStopping(patience=plan.config.patience)
        finite = StopOnNonFiniteLoss()
        callbacks = [log, best, early, finite, stop, *precision_callbacks(plan.precision, plan.device)]
        if checkpoints is not None:
            callbacks.append(SaveCheckpoint(checkpoints, progress, best, frozen=name == "frozen"))
        if distributed.world_size() > 1:
            from xray_fastai.training.data_parallel import TrainTogether

            callbacks.append(TrainTogether(plan.device, (plan.config.seed, len(progress.ends))))
        if within:
            callbacks.append(RestoreCheckpoint(saved))
            within = False
        if progress.batches["train"] < plan.batch_size:
            callbacks.append(AccumulateGradients(plan.batch_size))
        try:
            folder = None if checkpoints is None else checkpoints.run.partial
            _train_phase(learn, plan, name, epochs, callbacks, log, stop, folder)
        except (RuntimeError, CancelFitException):  # a SIGTERM to the whole job ends torch's loading processes at once
            if stop.received is None or distributed.world_size() > 1:
                raise
            best.restore(learn.model)
        if checkpoints is not None and checkpoints.failed:
            checkpoints.wait()
        if stop.due():
            progress.ends.append("an interruption")
            break
        if finite.where:
            progress.ends.append(f"the loss was not finite at {finite.where}")
            return best, f"{name} phase: {progress.ends[-1]}"
        progress.ends.append("early stopping" if early.stopped else "reaching its last epoch")
        if checkpoints is not None:
            save_between_phases(checkpoints, learn, progress, best)
    return best, None


def _train_phase(
    learn: "Learner",
    plan: Plan,
    name: str,
    epochs: int,
    callbacks: list,
    log: "EpochLog",
    stop: "StopOnSignal",
    folder: Path | None,
) -> None:
    from fastai.callback.channelslast import ChannelsLast

    from xray_fastai.training import frozen_features
    from xray_fastai.training.callbacks import FrozenBody, Schedule

    config = plan.config
    callbacks = [*callbacks, ChannelsLast()]
    if config.schedule == "adaptive":
        callbacks.append(Schedule(patience=max(1, config.patience // 2)))
    computed = contextlib.nullcontext([])
    if name == "frozen":
        learn.freeze()
        callbacks.append(FrozenBody())
        if views := frozen_features.views(plan, epochs):
            computed = frozen_features.instead_of_images(learn, plan, views, folder, stop)
    else:
        learn.unfreeze()
    lr = config.lr
    if plan.fine_tunes and name == "unfrozen" and config.schedule == "adaptive":
        # as fastai's fine_tune: half the peak rate, a hundredth of it for the first layers
        lr = slice(lr / 200, lr / 2)
    try:
        with computed as more, learn.no_logging():  # `log` prints the rows
            learn.fit(epochs, lr=lr, cbs=[*callbacks, *more], reset_opt=True)
    finally:
        log.close()


def _export(
    plan: Plan,
    run: Reservation,
    learn: "Learner",
    progress: "Progress",
    best: "BestWeights",
    stop: "StopOnSignal",
    error: str | None,
) -> Result:
    from scipy.special import softmax

    from xray_fastai.evaluation.subgroups import appearance, worst_group
    from xray_fastai.model.learner import set_temperature
    from xray_fastai.training.calibration import Calibration, calibrate

    data, history = plan.data, progress.history
    if error and best.row is None:
        raise UserError(
            f"{error}; no epoch was completed, so nothing is exported; try a lower --lr than {plan.config.lr:g}"
        )
    # of more than two classes the most probable is called, so there is no threshold
    positive = data.classes.index(data.positive) if data.positive and len(data.classes) == 2 else None
    calibration = Calibration(threshold=None if positive is None else 0.5)
    if best.row is not None:
        outputs = best.logits.float().cpu().numpy(), best.targets.cpu().numpy()
        calibration = calibrate(*outputs, positive, plan.config.target_sensitivity)
    set_temperature(learn, calibration.temperature)
    status = "diverged" if error else "interrupted" if stop.received is not None else "complete"
    worst = None
    if best.row is not None and positive is not None:
        with contextlib.suppress(ImageError):  # the images may be gone by now; the export is not to be lost for that
            scores = softmax(outputs[0] / calibration.temperature, axis=1)[:, positive]
            looks = appearance(list(data.valid.path), list(data.valid.width / data.valid.height))
            positives = (data.valid.label == data.positive).to_numpy()
            worst = worst_group(looks, positives, data.valid.patient.to_numpy(), scores)
    model = model_record(plan, status, history, progress.ends, best.row, calibration, worst, progress.elapsed)
    path = write(run, learn, model, history)
    conclude(path, model, run)
    return Result(path, status, history, plan.config, stop.received, error)


def _progress(plan: Plan, saved: "Saved | None", started: float) -> "Progress":
    from xray_fastai.training.state import Progress

    batches = {"train": plan.batch_size, "valid": plan.batch_size}
    if saved is None:
        return Progress(batches, started=started)
    state = saved.state
    if distributed.world_size() == 1:  # what one process had no memory for, several may
        batches = state["batches"]
    return Progress(batches, [*state["history"]], [*state["ends"]], state["seconds"], started)


def _read_checkpoint(
    found: Unfinished, checkpoints: "Checkpoints", images: dict, config: FitConfig
) -> tuple["Saved | None", str | None]:
    """The newest checkpoint of an unfinished fit, where it has one, and the origin of its weights.

    Raises:
        UserError: the images are not the same any more, or the checkpoints are damaged.
    """
    from xray_fastai.training.checkpoint import kept_settings

    kept = kept_settings(found.checkpoint)
    then = kept.get("data", images)
    if then != images:
        counts = [f"{told['train']} to train on and {told['valid']} to validate on" for told in (then, images)]
        how = f"{counts[0]} then, {counts[1]} now" if counts[0] != counts[1] else "a name, label or content changed"
        raise UserError(
            f"--data {config.data}: not the images that {found.name} was trained on ({how}); bring them back, or give "
            "their folder by --data, or start a new fit"
        )
    saved, faults = checkpoints.load(found.checkpoint)
    for fault in faults:
        print(f"{fault}; going on from the checkpoint before it")
    return saved, kept["origin"] if saved else None
