"""What a training loop has in mind between two epochs: taken from a learner, and put into another.

A fit that goes on from it gives the same history and weights as one that was never interrupted: on a CPU bit for bit.
"""

import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fastai.vision.all import Callback, CancelEpochException, CancelFitException, Learner, TrackerCallback

from xray_fastai.training.callbacks import BestWeights, copied
from xray_fastai.training.checkpoint import UNCHANGING, Best, Checkpoints, Parts, Saved, Tensors

COUNTERS = {"early_stopping": ("best", "wait"), "schedule": ("best", "wait", "cut")}
"""By callback, the attributes that change from epoch to epoch."""


@dataclass
class Progress:
    """How far a fit is."""

    batches: dict[str, int]  # images at once in "train" and in "valid"
    history: list[dict] = field(default_factory=list)  # a row an epoch
    ends: list[str] = field(default_factory=list)  # what ended each phase
    seconds: float = 0.0  # that earlier processes took, up to the checkpoint
    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.started


class SaveCheckpoint(Callback):
    """A checkpoint after each epoch but a phase's last: after that comes `save_between_phases`."""

    order = TrackerCallback.order + 4  # after early stopping, which ends the phase before this is reached

    def __init__(
        self,
        checkpoints: Checkpoints,
        progress: Progress,
        best: BestWeights,
        frozen: bool,  # whether only the head trains
    ):
        self.checkpoints, self.progress, self.best, self.frozen = checkpoints, progress, best, frozen

    def after_batch(self):
        if self.checkpoints.failed:
            raise CancelFitException

    def after_epoch(self):
        if self.epoch + 1 == self.n_epoch:
            return
        self.checkpoints.join()
        if self.checkpoints.failed:
            raise CancelFitException
        state, optimizer = capture_optimizer(self.learn)
        state |= {
            "epoch": self.epoch + 1,
            "counters": {
                name: {attr: getattr(getattr(self.learn, name), attr) for attr in attrs}
                for name, attrs in COUNTERS.items()
                if hasattr(self.learn, name)  # a constant rate has no schedule
            },
            "smooth_loss": [self.recorder.smooth_loss.count, self.recorder.smooth_loss.val.item()],
            "scaler": self.learn.scaler.state_dict() if hasattr(self.learn, "scaler") else {},
        }
        parts = None
        if not self.best.kept:
            skip = self.frozen and self.checkpoints.has_backbone()
            weights = copied({k: t for k, t in self.model.state_dict().items() if not (skip and k.startswith("0."))})
            parts = in_parts(weights, self.frozen)
        _save(self.checkpoints, self.learn, self.progress, self.best, state, parts, optimizer)


def save_between_phases(checkpoints: Checkpoints, learn: Learner, progress: Progress, best: BestWeights) -> None:
    """A checkpoint at the end of a phase, when the model has the best weights so far."""
    _save(checkpoints, learn, progress, best, {"epoch": 0}, None, {})


def _save(
    checkpoints: Checkpoints,
    learn: Learner,
    progress: Progress,
    best: BestWeights,
    state: dict[str, Any],
    parts: Parts | None,
    optimizer: Tensors,
) -> None:
    state |= {
        "phase": len(progress.ends),  # its place in the order of the phases
        "ends": [*progress.ends],  # copies: they go on changing while this is written
        "history": [*progress.history],
        "best": [best.best, best.margin],
        "gradients": [name for name, p in learn.model.named_parameters() if p.grad is not None],
        "random": random_states(learn),
        "batches": {**progress.batches},
        "seconds": progress.elapsed,
    }
    known = None
    if best.row is not None:
        row = next(i for i, row in enumerate(progress.history) if row is best.row)
        outputs = {"logits": best.logits.cpu(), "targets": best.targets.cpu()}
        known = Best(row, in_parts(best.state, best.row["phase"] == "frozen"), outputs)
    checkpoints.save(state, parts, optimizer, known)


class RestoreCheckpoint(Callback):
    """Go on within a phase: skip the epochs that are done, and begin the next as if they had just been trained.

    fastai's `SkipToEpoch` has the other callbacks take part in the epochs that it skips, which those that watch a
    metric don't survive; here they rest.
    """

    order = -100  # before all others

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
        for name, values in state["counters"].items():
            for attr, value in values.items():
                setattr(getattr(self.learn, name), attr, value)
        loss = self.recorder.smooth_loss
        loss.count, loss.val = state["smooth_loss"][0], torch.tensor(state["smooth_loss"][1])
        self.learn.train_iter = self.start * len(self.dls.train)
        if state["scaler"]:
            self.learn.scaler.load_state_dict(state["scaler"])
        restore_model(self.learn, self.saved)


def restore_best(best: BestWeights, saved: Saved) -> None:
    """Have `best`, whose history is in place, know the best epoch."""
    best.best, best.margin = saved.state["best"]
    if saved.best_row is not None:
        best.row = best.history[saved.best_row]
        best.state, best.logits, best.targets = saved.best, saved.outputs["logits"], saved.outputs["targets"]


def restore_model(learn: Learner, saved: Saved) -> None:
    """Weights, and last of all the random states."""
    learn.model.load_state_dict(saved.weights)
    # a gradient that was zeroed and one that was never there differ in the sign of zero
    for name, parameter in learn.model.named_parameters():
        parameter.grad = torch.zeros_like(parameter) if name in saved.state["gradients"] else None
    set_random_states(learn, saved.state["random"])


def in_parts(weights: Tensors, frozen: bool) -> Parts:
    """Weights by the file they go into: in the frozen phase the backbone, which doesn't change, has its own."""
    if not frozen:
        return {"model": weights}
    parts: Parts = {UNCHANGING: {}, "head": {}}
    for name, tensor in weights.items():
        parts[UNCHANGING if name.startswith("0.") else "head"][name] = tensor
    return parts


def capture_optimizer(learn: Learner) -> tuple[dict[str, Any], Tensors]:
    """The optimizer's rates and counters, and its tensors as `<parameter's number>.<name>`."""
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
    """The reverse of `capture_optimizer`, into an optimizer of the same parameters."""
    for hyper, saved in zip(learn.opt.hypers, state["optimizer"]["hypers"], strict=True):
        hyper.update(saved)
    parameters = [parameter for parameter, *_ in learn.opt.all_params()]
    for parameter, saved in zip(parameters, state["optimizer"]["states"], strict=True):
        learn.opt.state[parameter] = dict(saved)
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]  # its memory layout decides in which order sums are rounded
        learn.opt.state[parameter][name] = torch.empty_like(parameter, requires_grad=False).copy_(tensor)


def random_states(learn: Learner) -> dict[str, Any]:
    """All that is drawn from: Python, numpy, torch and its GPUs, and each loader's own, as JSON takes it."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "loaders": [loader.rng.getstate() for loader in learn.dls.loaders],
    }


def set_random_states(learn: Learner, states: dict[str, Any]) -> None:
    """The reverse of `random_states`; a GPU's only where there are as many GPUs."""
    random.setstate(_pythons(states["python"]))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(states["torch"]))
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes(state) for state in states["cuda"]])
    for loader, state in zip(learn.dls.loaders, states["loaders"], strict=True):
        loader.rng.setstate(_pythons(state))


def _text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _pythons(state: list) -> tuple:
    version, numbers, gauss = state
    return version, tuple(numbers), gauss
