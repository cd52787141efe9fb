"""Searches the learning rate of a phase before it begins, as fastai's `lr_find` does: `fit --lr find`.

A mock training raises the rate from 1e-7 to 10 in 100 batches, and ends where the smoothed loss is four times its
lowest. fastai's `valley` suggests a rate from the losses. Then weights, statistics of batch norm, gradients and random
states are again what they were before: a fit with the rate that was found trains the same, bit for bit on a CPU.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np
from fastai.callback.schedule import LRFinder, ParamScheduler, valley
from fastai.vision.all import Callback, Learner

from xray_fastai.system.progress import track
from xray_fastai.training.callbacks import copied
from xray_fastai.training.state import gradients_of, random_states, set_gradients, set_random_states

LOWEST, HIGHEST, STEPS = 1e-7, 10.0, 100
"""The rates that the search goes through, and its number of steps: fastai's defaults."""


class Finder(LRFinder):
    "fastai's `LRFinder` without the temporary file that it keeps the weights in: `unchanged` restores them."

    def before_fit(self):
        ParamScheduler.before_fit(self)
        self.best_loss = math.inf

    def after_fit(self):
        "Leave the weights to `unchanged`, which restores them after an error, too."


def search(learn: Learner, usual: float | slice, callbacks: Sequence[Callback], parts: int = 1) -> dict:
    """Search the learning rate of a phase, and leave the learner as it was.

    Args:
        learn: frozen or unfrozen as the phase trains it.
        usual: the rates of the phase by default: one, or from the first layers to the head. The earlier layers keep
            their share of the head's rate during the search.
        callbacks: what makes a step of the phase what it is.
        parts: the number of batches in a step, whose gradients are summed.

    Returns:
        `rates`, of the head in each batch; `losses`, smoothed, up to the first that is not finite; `fault`, why they
        suggest no rate, or None; `peak`, the rate that the head should get, by default that of `usual`.
    """
    learn.create_opt()
    learn.opt.set_hypers(lr=usual)
    rates = np.array([hyper["lr"] for hyper in learn.opt.hypers])
    shares, batches = rates / rates[-1], STEPS * parts
    finder = Finder(start_lr=LOWEST * shares, end_lr=HIGHEST * shares, num_it=batches)
    with unchanged(learn), closing(track(range(batches), "learning rate", batches)) as bar:
        advance = Callback(before_batch=lambda _: next(bar, None))
        learn.fit(batches // len(learn.dls.train) + 1, cbs=[finder, advance, *callbacks])
        losses = [float(loss) for loss in learn.recorder.losses]
        tried = [float(rate) for rate in learn.recorder.lrs]
    finite = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    found, fault = suggestion(tried, losses[:finite], batches)
    peak = float(rates[-1]) if found is None else found
    return {"rates": tried[:finite], "losses": losses[:finite], "fault": fault, "peak": peak}


def suggestion(rates: list[float], losses: list[float], batches: int) -> tuple[float | None, str | None]:
    """Return the rate that `valley` suggests, with two digits as it is printed; or None, and why there is none.

    As in fastai, the first tenth of the batches and the last five do not count. Where the loss never falls, `valley`
    would suggest the last rate.

    >>> suggestion([1e-4, 1e-3, 1e-2], [3.0, 2.0, 1.0], 3)
    (None, 'the loss diverged at once')
    """
    first, end = batches // 10, len(rates) - 5
    rates, losses = rates[first:end], losses[first:end]
    if not losses:
        return None, "the loss diverged at once"
    if min(losses) == losses[0]:
        return None, "the loss did not fall"
    return float(f"{valley(rates[: len(losses)], losses, batches)[0]:.2g}"), None


@contextmanager
def unchanged(learn: Learner) -> Iterator[None]:
    """Restore weights, buffers, gradients, random states and the number of epochs of a learner, also after an error."""
    weights, gradients = copied(learn.model.state_dict()), gradients_of(learn.model)
    random, rows = random_states(learn), len(learn.recorder.history)
    try:
        yield
    finally:
        learn.model.load_state_dict(weights)
        set_gradients(learn.model, gradients)
        set_random_states(learn, random)
        del learn.recorder.history[rows:]


def scaled(usual: float | slice, peak: float) -> float | slice:
    """Return rates of which the head has this one; the earlier layers keep their share of it."""
    return slice(usual.start * peak / usual.stop, peak) if isinstance(usual, slice) else peak
