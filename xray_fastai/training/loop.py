"""Trains the phases of a plan with fastai, saves checkpoints, and uses smaller batches when memory runs out."""

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.vision.all import Callback, CancelFitException, Metric, ProgressCallback

from xray_fastai.config.choices import FIND
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.model.learner import parameter_counts
from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError
from xray_fastai.system.memory import is_out_of_memory
from xray_fastai.system.signals import HANGUP
from xray_fastai.training import frozen_features, lr_find
from xray_fastai.training.callbacks import BestWeights, FixedStatistics, FrozenBody, Schedule, precision_callbacks
from xray_fastai.training.checkpoint import Checkpoints, Saved
from xray_fastai.training.epoch_log import EpochLog
from xray_fastai.training.messages import report_search, report_smaller_batch
from xray_fastai.training.out_of_memory import AccumulateGradients, smaller
from xray_fastai.training.pace import TRAINING, Following, Pace, phase_end
from xray_fastai.training.plan import Plan
from xray_fastai.training.state import (
    Progress,
    RestoreCheckpoint,
    SaveCheckpoint,
    restore_best,
    restore_model,
    save_between_phases,
)
from xray_fastai.training.stopping import EarlyStopping, StopOnNonFiniteLoss, StopOnSignal
from xray_fastai.training.trackers import Tracker


@dataclass(frozen=True)
class Added:
    """Holds what a user adds to the training of both phases."""

    callbacks: Sequence[Callback] = ()
    metrics: Sequence[Metric | Callable] = ()  # as fastai's `Learner` takes them
    frame: pd.DataFrame | None = None  # the table of images, where it is not a file
    trackers: Sequence[Tracker] = ()  # of the option `log`


@dataclass(frozen=True)
class Turn:
    """Says which of the networks of an ensemble a trainer trains; of another fit, the only one."""

    left: int = 0  # networks to train after this one
    batches: dict[str, int] | None = None  # images in a batch of "train" and "valid", where memory ran out before


class Phase:
    """Holds the callbacks that may end a phase, and with it the reason."""

    def __init__(self, name: str, epochs: int, config: FitConfig, pace: Pace):
        self.name, self.epochs, self.pace = name, epochs, pace
        self.early, self.finite = EarlyStopping(config.patience, config.min_delta), StopOnNonFiniteLoss()


class Trainer:
    """Trains the phases of a plan, and holds the state of the fit: learner, progress, best weights, checkpoints.

    After `train`, `learn` has the best weights. `error` says why the loss diverged, if it did.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        checkpoints: Checkpoints | None = None,  # None where another process writes them
        saved: Saved | None = None,  # the checkpoint to resume from
        added: Added | None = None,  # what the user adds
        started: float | None = None,  # `time.perf_counter()` when the fit was called
        turn: Turn = Turn(),
    ):
        self.plan, self.checkpoints, self.added, self.turn = plan, checkpoints, added or Added(), turn
        self.started = time.perf_counter() if started is None else started
        self.stop = StopOnSignal()
        self.error: str | None = None
        self._set_up(saved)
        self.parameters = parameter_counts(self.learn)  # all, and those that train in the frozen phase

    def _set_up(self, saved: Saved | None, batches: dict[str, int] | None = None) -> None:
        """Make progress, best weights and a learner for training from a checkpoint, or from the start."""
        self.saved = saved
        self.progress = Progress(batches or self._batches(saved), started=self.started)
        if saved is not None:
            self.progress.history = [*saved.state["history"]]
            self.progress.ends = [*saved.state["ends"]]
            self.progress.searches = [*saved.state.get("searches", [])]  # missing in checkpoints of version 0.1.0
            self.progress.seconds = saved.state["seconds"]
        self.best = BestWeights(self.progress.history, later=self.plan.config.schedule == "adaptive")
        self.learn = self.plan.learner(self.plan.dataloaders(self.progress.batches))
        self.learn.remove_cb(ProgressCallback)  # `EpochLog` shows the progress

    def _batches(self, saved: Saved | None) -> dict[str, int]:
        # several processes may have enough memory where one had too little
        if saved is not None and distributed.world_size() == 1:
            return saved.state["batches"]
        return self.turn.batches or {"train": self.plan.batch_size, "valid": self.plan.batch_size}

    def train(self) -> None:
        """Train as `train_phases`, and stop at a signal."""
        with self.stop:
            self.train_phases()

    def train_phases(self) -> None:
        """Train the phases that are not done yet, in the context of `stop`.

        Where memory runs out, training restarts from the last checkpoint with smaller batches.

        Raises:
            UserError: out of memory with one image in a batch, or in one of several processes (those cannot restart
                together: one ran out of memory at a step that the others completed); a checkpoint cannot be written.
        """
        with self.checkpoints or contextlib.nullcontext():
            while (part := self._train_until_out_of_memory()) is not None:
                self._restart_smaller(part)
            if self.checkpoints is not None:
                self.checkpoints.wait()

    def _train_until_out_of_memory(self) -> str | None:
        """Train; return None at the end, or "train" or "valid" where a batch of these did not fit into memory.

        Returning from the `except` block drops the error, whose traceback keeps the tensors in memory.
        """
        try:
            self._train_phases()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if (processes := distributed.world_size()) > 1:
                raise UserError(
                    f"out of memory on {self.plan.device}, with {self.plan.batch_size // processes} images in a batch "
                    f"of each of {processes} processes; give a smaller batch size, or start more processes",
                    option="batch_size",
                    value=self.plan.config.batch_size,
                ) from None
            return "train" if self.learn.training else "valid"
        return None

    def _restart_smaller(self, part: str) -> None:
        """Restart from the last checkpoint with smaller batches in one part, "train" or "valid"."""
        plan, before = self.plan, self.progress.batches[part]
        self.checkpoints.wait()
        batches = self.progress.batches | {part: smaller(plan.batch_size if part == "train" else before, before)}
        if not batches[part]:
            raise UserError(
                f"out of memory on {plan.device_name} even with one image in a batch; "
                f"try a size= below {plan.config.size} or a smaller arch= than {plan.config.arch}",
                option="device",
                value=plan.config.device,
            )
        del self.learn, self.best
        if self.checkpoints.number:  # whose record of the seconds holds those of this process
            self.started = time.perf_counter()
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
        self._set_up(self.checkpoints.load()[0], batches)
        report_smaller_batch(plan, part, before, batches[part], self.saved)

    def _train_phases(self) -> None:
        if self.saved is not None:
            restore_best(self.best, self.saved)
            restore_model(self.learn, self.saved)
        for name, epochs in self.plan.phases[len(self.progress.ends) :]:
            if self._time_is_up(name):
                self.best.restore(self.learn.model)
                self.progress.ends.append("the time limit")
                self._save_between_phases()
                continue
            phase = self._phase(name, epochs)
            try:
                self._fit_phase(phase)
            except (RuntimeError, CancelFitException):
                # a SIGTERM to the whole job also ends torch's loading processes, which fails the batch
                if self.stop.received is None or distributed.world_size() > 1:
                    raise
                self.best.restore(self.learn.model)
            if not self._end_phase(phase):
                return

    def _time_is_up(self, name: str) -> bool:
        """Return whether a time limit leaves no time for the rest of a phase; the first epoch of all always runs."""
        limit = self.plan.config.seconds_allowed
        if limit is None:
            return False
        return distributed.share(self.best.row is not None and self.progress.elapsed >= phase_end(limit, name, 0.0))

    def _phase(self, name: str, epochs: int) -> Phase:
        config = self.plan.config
        schedule = Schedule(patience=max(1, config.patience // 2)) if config.schedule == "adaptive" else None
        following = None
        if name == "frozen":
            search = lr_find.STEPS * self.plan.batch_size / len(self.plan.data.train) if config.lr == FIND else 0.0
            following = Following(config.epochs, lambda seconds: self._unfrozen_epoch(epochs, seconds), search)
        pace = Pace(lambda: self.progress.elapsed, name, config.seconds_allowed, schedule, following)
        pace.members_left = self.turn.left
        return Phase(name, epochs, config, pace)

    def _unfrozen_epoch(self, epochs: int, seconds: float) -> float:
        """Estimate what an epoch of the unfrozen phase takes: from the features, or from an epoch of the frozen phase.

        Args:
            epochs: of the frozen phase.
            seconds: of an epoch of it, in which the backbone runs if there are no features.
        """
        train, valid = len(self.plan.data.train), len(self.plan.data.valid)
        views = frozen_features.views(self.plan, epochs)
        of_an_image = self.features_took / (views * train + valid) if views else seconds / (train + valid)
        return of_an_image * (TRAINING * train + valid)

    def _fit_phase(self, phase: Phase) -> None:
        """Run one phase: one `learn.fit`."""
        plan, learn, name, pace = self.plan, self.learn, phase.name, phase.pace
        log = EpochLog(self.progress.history, name, phase.early, pace)
        precision = precision_callbacks(plan.precision, plan.device)
        callbacks = [log, self.best, phase.early, phase.finite, pace, self.stop, *precision]
        callbacks += [*self._phase_callbacks(name), *self._step_callbacks(name)]
        if pace.schedule is not None:
            callbacks.append(pace.schedule)
        features, images, started = contextlib.nullcontext([]), contextlib.nullcontext(), self.progress.elapsed
        if name == "frozen":
            learn.freeze()
            if plan.frozen_plain:
                images = learn.dls.train.dataset.set_split_idx(1)  # as fastai's validation has them: not augmented
            if self.checkpoints is not None and (views := frozen_features.views(plan, phase.epochs)):
                folder = self.checkpoints.run.partial
                features = frozen_features.instead_of_images(learn, plan, views, folder, self.stop)
        else:
            learn.unfreeze()
        own_metrics = learn.metrics
        learn.metrics = [*own_metrics, *self.added.metrics]
        try:
            with images, features as more, learn.no_logging():  # `log` prints the rows
                self.features_took = self.progress.elapsed - started
                rate = self._rate(name)
                if plan.config.lr == FIND:
                    rate = self._found(name, rate, [self.stop, *precision, *more])
                    pace.stopped = self._time_is_up(name)
                callbacks += [*more, *self.added.callbacks, *(tracker.callback for tracker in self.added.trackers)]
                if self.stop.received is None and not pace.stopped:  # a signal may end the search
                    learn.fit(phase.epochs, lr=rate, cbs=callbacks, reset_opt=True)
                else:  # a checkpoint within the phase has the weights of its last epoch
                    self.best.restore(learn.model)
        finally:
            learn.metrics = own_metrics  # the export need not hold the user's
            log.close()
            for callback in precision:
                callback.close()

    def _phase_callbacks(self, name: str) -> list[Callback]:
        """Return the callbacks for checkpoints."""
        callbacks = []
        if self.checkpoints is not None:
            callbacks.append(SaveCheckpoint(self.checkpoints, self.progress, self.best, frozen=name == "frozen"))
        done = len(self.progress.ends)
        if self.saved is not None and self.saved.state["epoch"] > 0 and self.saved.state["phase"] == done:
            callbacks.append(RestoreCheckpoint(self.saved))
        return callbacks

    def _step_callbacks(self, name: str) -> list[Callback]:
        """Return the callbacks for the layout of memory, a frozen body, several processes, and batches in parts."""
        plan, callbacks = self.plan, [ChannelsLast()]
        if name == "frozen":
            callbacks.append(FrozenBody())
        elif self._fine_tunes(name):
            callbacks.append(FixedStatistics())
        if distributed.world_size() > 1:
            from xray_fastai.training.data_parallel import TrainTogether  # needs accelerate, an extra

            callbacks.append(TrainTogether(plan.device, (plan.config.seed, len(self.progress.ends))))
        if self.progress.batches["train"] < plan.batch_size:
            callbacks.append(AccumulateGradients(plan.batch_size))
        return callbacks

    def _rate(self, name: str) -> float | slice:
        """Return the peak learning rate of a phase: one, or a range from the first layers to the head.

        Fine-tuning takes the range of fastai's `fine_tune`: half the peak rate for the head, a hundredth of that for
        the first layers.
        """
        lr = self.plan.lr
        return slice(lr / 200, lr / 2) if self._fine_tunes(name) else lr

    def _fine_tunes(self, name: str) -> bool:
        """Return whether a phase trains all layers from pretrained weights, and may differ from the earlier work."""
        return self.plan.origin.pretrained and name == "unfrozen" and self.plan.config.schedule == "adaptive"

    @property
    def lr(self) -> float:
        """The peak learning rate of the head that was given, or that was found last."""
        searches = self.progress.searches
        return searches[-1]["peak"] if searches else self.plan.lr

    def _found(self, name: str, usual: float | slice, callbacks: Sequence[Callback]) -> float | slice:
        """Return the rate that a search finds for a phase, or found before the checkpoint was saved.

        Args:
            name: of the phase.
            usual: its rate by default, which it keeps if none is found, or a signal ends the search.
            callbacks: of the search, besides those of each step.
        """
        searches = self.progress.searches
        if not any(search["phase"] == name for search in searches):
            parts = self.plan.batch_size // self.progress.batches["train"]
            print(f"\nsearching the learning rate: {parts * lr_find.STEPS} batches", flush=True)
            search = lr_find.search(self.learn, usual, [*callbacks, *self._step_callbacks(name)], parts)
            if self.stop.received is not None:
                return usual
            searches.append(distributed.share({"phase": name, **search}))
            default = usual.stop if isinstance(usual, slice) else usual
            report_search(searches[-1], default, len(self.plan.data.train) / self.plan.batch_size)
        (search,) = (search for search in searches if search["phase"] == name)
        return lr_find.scaled(usual, search["peak"])

    def _end_phase(self, phase: Phase) -> bool:
        """Record what ended a phase, and return whether the next phase may begin."""
        ends = self.progress.ends
        if self.checkpoints is not None and self.checkpoints.failed:
            self.checkpoints.wait()
        if self.stop.due():
            ends.append("a closed terminal" if self.stop.received == HANGUP else "an interruption")
            return False
        if phase.finite.where:
            ends.append(f"the loss was not finite at {phase.finite.where}")
            self.error = f"{phase.name} phase: {ends[-1]}"
            return False
        if phase.early.stopped:
            ends.append("early stopping")
        elif phase.pace.stopped:
            ends.append("the time limit")
        elif sum(row["phase"] == phase.name for row in self.progress.history) < phase.epochs:
            ends.append("a callback")
        else:
            ends.append("reaching its last epoch")
        self._save_between_phases()
        return True

    def _save_between_phases(self) -> None:
        if self.checkpoints is not None and self.best.row is not None:  # a callback may end a phase before any epoch
            save_between_phases(self.checkpoints, self.learn, self.progress, self.best)
