"""The training loop: two phases by fastai, early stopping, best weights, checkpoints, and smaller batches when memory
runs out."""

import contextlib
import gc
from dataclasses import replace
from pathlib import Path

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.vision.all import CancelFitException, Learner

from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError
from xray_fastai.training import frozen_features
from xray_fastai.training.callbacks import (
    BestWeights,
    EarlyStopping,
    EpochLog,
    FrozenBody,
    Schedule,
    StopOnNonFiniteLoss,
    StopOnSignal,
    precision_callbacks,
)
from xray_fastai.training.checkpoint import Checkpoints, Saved
from xray_fastai.training.messages import place
from xray_fastai.training.out_of_memory import AccumulateGradients, is_out_of_memory, smaller
from xray_fastai.training.plan import Plan
from xray_fastai.training.state import (
    Progress,
    RestoreCheckpoint,
    SaveCheckpoint,
    restore_best,
    restore_model,
    save_between_phases,
)


def train(
    plan: Plan,
    learn: Learner,
    progress: Progress,
    checkpoints: Checkpoints | None,
    stop: StopOnSignal,
    saved: Saved | None,
) -> tuple[Learner, Progress, BestWeights, str | None]:
    """`_train`; where memory is short, again from the last checkpoint with smaller batches.

    Several processes could not all go back: what one was short of, the others have done.
    """

    while True:
        try:
            return learn, progress, *_train(plan, learn, progress, checkpoints, stop, saved)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if (processes := distributed.world_size()) > 1:
                raise UserError(
                    f"out of memory on {plan.device}, with "
                    f"{plan.batch_size // processes} images at once in each of {processes} processes; give a smaller "
                    "one, or more processes",
                    option="batch_size",
                    value=plan.config.batch_size,
                ) from None
            part = "train" if learn.training else "valid"
        # out of the `except`, whose error holds the frames that hold the tensors
        checkpoints.wait()
        at_once = progress.batches[part]
        batches = progress.batches | {part: smaller(plan.batch_size if part == "train" else at_once, at_once)}
        if not batches[part]:
            raise UserError(
                f"out of memory on {plan.device_name} even with one image at once; "
                f"try a --size below {plan.config.size} or a smaller --arch than {plan.config.arch}",
                option="device",
                value=plan.config.device,
            )
        learn.model.cpu()  # what calls this still holds the learner
        learn.opt = None
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
        saved, _ = checkpoints.load()
        progress = replace(first_progress(plan, saved, progress.started), batches=batches)
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
    learn: Learner,
    progress: Progress,
    checkpoints: Checkpoints | None,  # None where another process writes them
    stop: StopOnSignal,
    saved: Saved | None,
) -> tuple[BestWeights, str | None]:
    """Train the phases that are not done yet; the best weights, which the model has then, and why the fit diverged."""

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
    learn: Learner,
    plan: Plan,
    name: str,
    epochs: int,
    callbacks: list,
    log: EpochLog,
    stop: StopOnSignal,
    folder: Path | None,
) -> None:

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


def first_progress(plan: Plan, saved: Saved | None, started: float) -> Progress:

    batches = {"train": plan.batch_size, "valid": plan.batch_size}
    if saved is None:
        return Progress(batches, started=started)
    state = saved.state
    if distributed.world_size() == 1:  # what one process had no memory for, several may
        batches = state["batches"]
    return Progress(batches, [*state["history"]], [*state["ends"]], state["seconds"], started)
