"""Saves and restores the training state between epochs: optimizer, schedule, counters, random states.

A resumed fit gives the same history and weights as one that was never interrupted: on a CPU, with the same number of
threads, bit for bit.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fastai.vision.all import Callback, CancelEpochException, CancelFitException, Learner, TrackerCallback
from torch import nn

from xray_fastai.training.callbacks import BACKBONE, BestWeights, Schedule, copied
from xray_fastai.training.checkpoint import UNCHANGING, Best, Checkpoints, Parts, Saved, Tensors
from xray_fastai.training.pace import Pace
from xray_fastai.training.stopping import EarlyStopping

COUNTERS = {EarlyStopping: ("best", "wait"), Schedule: ("best", "wait", "cut"), Pace: ("measured", "planned")}
"""The attributes of each callback that change from epoch to epoch."""


def counting_callbacks(learn: Learner) -> dict[str, Callback]:
    """Return the callbacks that have counters, by their names in a checkpoint; a user's of the same name is another."""
    return {callback.name: callback for callback in learn.cbs if type(callback) in COUNTERS}


@dataclass
class Progress:
    """Records what a fit has done so far."""

    batches: dict[str, int]  # images in a batch of "train" and of "valid"
    started: float  # `time.perf_counter()` when this process began the fit
    history: list[dict] = field(default_factory=list)  # one row an epoch
    ends: list[str] = field(default_factory=list)  # what ended each phase
    searches: list[dict] = field(default_factory=list)  # of rates: `phase`, and what `lr_find.search` returns
    seconds: float = 0.0  # that earlier processes took, up to the checkpoint

    @property
    def elapsed(self) -> float:
        """Seconds of training, in this process and in the earlier ones."""
        return self.seconds + time.perf_counter() - self.started


SECONDS = 1.0
"""An epoch that ends sooner after the previous checkpoint gets none. A small head trains for milliseconds an epoch, and
would wait for the disk: a checkpoint is four files that are synchronised."""


class SaveCheckpoint(Callback):
    """Save a checkpoint after each epoch, but not more often than every `SECONDS`.

    The last epoch of a phase gets none: `save_between_phases` saves one after it.
    """

    order = (
        TrackerCallback.order + 5
    )  # after early stopping and a time limit, which end the phase before this is reached

    def __init__(
        self,
        checkpoints: Checkpoints,
        progress: Progress,
        best: BestWeights,
        frozen: bool,  # whether only the head trains
    ):
        self.checkpoints, self.progress, self.best, self.frozen = checkpoints, progress, best, frozen
        self.saved = -math.inf  # when the last checkpoint began, in seconds

    def after_batch(self):
        if self.checkpoints.failed:
            raise CancelFitException

    def after_epoch(self):
        if self.epoch + 1 == self.n_epoch or time.monotonic() - self.saved < SECONDS:
            return
        self.saved = time.monotonic()
        self.checkpoints.join()
        if self.checkpoints.failed:
            raise CancelFitException
        state, optimizer = capture_optimizer(self.learn)
        state |= training_state(self.learn, self.progress, self.best)
        state |= {
            "epoch": self.epoch + 1,
            "counters": {
                name: {attr: getattr(callback, attr) for attr in COUNTERS[type(callback)]}
                for name, callback in counting_callbacks(self.learn).items()
            },
            "smooth_loss": [self.recorder.smooth_loss.count, self.recorder.smooth_loss.val.item()],
            "scaler": self.learn.scaler.state_dict() if hasattr(self.learn, "scaler") else {},
        }
        parts = None
        if not self.best.is_best:
            skip = self.frozen and self.checkpoints.has_backbone()
            weights = copied(
                {k: t for k, t in self.model.state_dict().items() if not (skip and k.startswith(BACKBONE))}
            )
            parts = in_parts(weights, self.frozen)
        self.checkpoints.save(state, parts, optimizer, best_epoch(self.best))


def save_between_phases(checkpoints: Checkpoints, learn: Learner, progress: Progress, best: BestWeights) -> None:
    """Save a checkpoint at the end of a phase, when the model has the best weights so far."""
    checkpoints.save({"epoch": 0} | training_state(learn, progress, best), None, {}, best_epoch(best))


def training_state(learn: Learner, progress: Progress, best: BestWeights) -> dict[str, Any]:
    """Return what every checkpoint holds besides tensors."""
    return {
        "phase": len(progress.ends),  # its place in the order of the phases
        "ends": [*progress.ends],  # copies: training extends the lists while a thread writes the checkpoint
        "history": [*progress.history],
        "searches": [*progress.searches],
        "best": [best.best, best.margin],
        "gradients": gradients_of(learn.model),
        "random": random_states(learn),
        "batches": {**progress.batches},
        "seconds": progress.elapsed,
    }


def best_epoch(best: BestWeights) -> Best | None:
    """Return the best epoch so far as a checkpoint holds it, or None before the first epoch."""
    if best.row is None:
        return None
    row = next(i for i, row in enumerate(best.history) if row is best.row)
    outputs = {"logits": best.logits.cpu(), "targets": best.targets.cpu()}
    return Best(row, in_parts(best.state, best.row["phase"] == "frozen"), outputs)


class RestoreCheckpoint(Callback):
    """Resume within a phase: skip the epochs that are done, and restore the training state before the next one.

    fastai's `SkipToEpoch` runs the other callbacks in the epochs that it skips. Callbacks that watch a metric fail
    there, so this one disables them.
    """

    order = -100  # before all other callbacks

    def __init__(
        self,
        saved: Saved,  # `epoch` of its state is the first to train, counted from 0
    ):
        self.saved, self.start = saved, saved.state["epoch"]

    def before_epoch(self):
        if self.epoch < self.start:
            for callback in self.learn.cbs:
                callback.run = callback is self
            raise CancelEpochException
        if self.epoch == self.start:
            for callback in self.learn.cbs:
                callback.run = True
            self.restore()

    def restore(self):
        state = self.saved.state
        restore_optimizer(self.learn, state, self.saved.optimizer)
        callbacks = counting_callbacks(self.learn)
        for name, values in state["counters"].items():
            for attr, value in values.items():
                setattr(callbacks[name], attr, value)
        loss = self.recorder.smooth_loss
        loss.count, loss.val = state["smooth_loss"][0], torch.tensor(state["smooth_loss"][1])
        self.learn.train_iter = self.start * len(self.dls.train)
        # a fit in fp16 may be resumed on a device without it, where nothing is scaled
        if state["scaler"] and getattr(self.learn, "scaler", None) is not None:
            self.learn.scaler.load_state_dict(state["scaler"])
        restore_model(self.learn, self.saved)


def restore_best(best: BestWeights, saved: Saved) -> None:
    """Restore the best epoch into `best`, whose history is restored already."""
    best.best, best.margin = saved.state["best"]
    if saved.best_row is not None:
        best.row = best.history[saved.best_row]
        best.state, best.logits, best.targets = saved.best, saved.outputs["logits"], saved.outputs["targets"]


def restore_model(learn: Learner, saved: Saved) -> None:
    """Restore the weights, the gradients that exist, and last the random states."""
    learn.model.load_state_dict(saved.weights)
    set_gradients(learn.model, saved.state["gradients"])
    set_random_states(learn, saved.state["random"])


def gradients_of(model: nn.Module) -> list[str]:
    """Return the names of the parameters that have a gradient."""
    return [name for name, parameter in model.named_parameters() if parameter.grad is not None]


def set_gradients(model: nn.Module, names: Sequence[str]) -> None:
    """Make the gradients of these parameters zero, and remove the others.

    A zero gradient and a missing one differ: with the first, the optimizer may change the sign of a zero.
    """
    for name, parameter in model.named_parameters():
        parameter.grad = torch.zeros_like(parameter) if name in names else None


def in_parts(weights: Tensors, frozen: bool) -> Parts:
    """Return weights by the file they go into; in the frozen phase the unchanging backbone has its own file."""
    if not frozen:
        return {"model": weights}
    parts: Parts = {UNCHANGING: {}, "head": {}}
    for name, tensor in weights.items():
        parts[UNCHANGING if name.startswith(BACKBONE) else "head"][name] = tensor
    return parts


def capture_optimizer(learn: Learner) -> tuple[dict[str, Any], Tensors]:
    """Return the optimizer's rates and counters, and its tensors under the names `<parameter's number>.<name>`."""
    states = [state for _, _, state, _ in learn.opt.all_params()]
    tensors = {
        f"{i}.{name}": value
        for i, state in enumerate(states)
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    plain = [{name: v for name, v in state.items() if not isinstance(v, torch.Tensor)} for state in states]
    return {"optimizer": {"hypers": [dict(hyper) for hyper in learn.opt.hypers], "states": plain}}, copied(tensors)


def restore_optimizer(learn: Learner, state: dict[str, Any], tensors: Tensors) -> None:
    """Restore what `capture_optimizer` returned into an optimizer of the same parameters."""
    for hyper, saved in zip(learn.opt.hypers, state["optimizer"]["hypers"], strict=True):
        hyper.update(saved)
    parameters = [parameter for parameter, *_ in learn.opt.all_params()]
    for parameter, saved in zip(parameters, state["optimizer"]["states"], strict=True):
        learn.opt.state[parameter] = dict(saved)
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]  # its memory layout decides the order of sums, and so their rounding
        learn.opt.state[parameter][name] = torch.empty_like(parameter, requires_grad=False).copy_(tensor)


def random_states(learn: Learner) -> dict[str, Any]:
    """Return the state of every random generator as JSON: Python, numpy, torch, its GPUs, and each loader's own."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "mps": [_hex(torch.mps.get_rng_state())] if torch.backends.mps.is_available() else [],
        "loaders": [loader.rng.getstate() for loader in learn.dls.loaders],
    }


def set_random_states(learn: Learner, states: dict[str, Any]) -> None:
    """Restore what `random_states` returned; the states of GPUs as far as both machines have them.

    A fit in one process computes on the first GPU, so its state is restored on any machine with GPUs.
    """
    random.setstate(_python_state(states["python"]))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(states["torch"]))
    for number, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
        torch.cuda.set_rng_state(_from_hex(state), number)
    if torch.backends.mps.is_available():
        for state in states.get("mps", []):  # missing in checkpoints of version 0.1.0
            torch.mps.set_rng_state(_from_hex(state))
    for loader, state in zip(learn.dls.loaders, states["loaders"], strict=True):
        loader.rng.setstate(_python_state(state))


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _python_state(state: list) -> tuple:
    version, numbers, gauss = state
    return version, tuple(numbers), gauss
