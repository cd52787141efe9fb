"""Trains the networks of an ensemble one after the other: `fit --members K`.

Each is one `Trainer` with a seed and images of its own. Its checkpoints have a folder of their own, so a resumed fit
finds the networks that are done, and the one that was training.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from fastai.vision.all import Learner
from safetensors import SafetensorError
from safetensors.torch import load_file

from xray_fastai.model.learner import parameter_counts
from xray_fastai.training.checked_files import checksum
from xray_fastai.training.checkpoint import Checkpoints, Saved, Tensors
from xray_fastai.training.loop import Added, Trainer, Turn
from xray_fastai.training.messages import announce_member
from xray_fastai.training.pace import EXPORT_SHARE
from xray_fastai.training.plan import Plan
from xray_fastai.training.stopping import StopOnSignal

START = "start.safetensors"
"""The file of the weights that all networks start from, which may be gone elsewhere when a fit is resumed."""
PRETRAINED = "pretrained"
"""The first part of its names; of an export's networks it is their number."""
LEAST_SECONDS = 1.0
"""The time that a network gets where a time limit is used up: it trains one epoch."""


@dataclass(frozen=True)
class Trained:
    """Holds a network of an ensemble that has trained for an epoch or more."""

    history: list[dict]  # one row an epoch
    ends: list[str]  # what ended each phase
    searches: list[dict]  # of the learning rate, as in `state.Progress`
    seconds: float
    best: dict  # the row of the epoch whose weights these are
    weights: Tensors
    logits: torch.Tensor  # (images, classes), of the images that it validated on
    targets: torch.Tensor  # (images,)

    @classmethod
    def by(cls, trainer: Trainer) -> "Trained":
        """Return the network of a trainer that has completed an epoch."""
        progress, best = trainer.progress, trainer.best
        return cls(
            progress.history, progress.ends, progress.searches, progress.elapsed, best.row, best.state,
            best.logits.cpu(), best.targets.cpu(),
        )  # fmt: skip

    @classmethod
    def of(cls, saved: Saved) -> "Trained":
        """Return the network of the last checkpoint of one that is done."""
        state, outputs = saved.state, saved.outputs
        return cls(
            state["history"], state["ends"], state["searches"], state["seconds"], state["history"][saved.best_row],
            saved.best, outputs["logits"], outputs["targets"],
        )  # fmt: skip


class Members:
    """Trains the networks of an ensemble, and holds those that have an epoch in `trained`, by number from 0 on.

    It has what `fit` asks of a `Trainer`. `error` says of which network the loss diverged, if it did.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        checkpoints: Sequence[Checkpoints] | None = None,  # of each network; None where another process writes them
        saved: dict[int, Saved] | None = None,  # the newest checkpoint of the networks that have one
        added: Added | None = None,  # what the user adds
        started: float | None = None,  # `time.perf_counter()` when the fit was called
    ):
        self.plan, self.checkpoints, self.added = plan, checkpoints, added or Added()
        self.saved, self.trained = {}, {}
        for member, of_member in (saved or {}).items():
            if of_member.is_done(plan.phases):
                self.trained[member] = Trained.of(of_member)
            else:
                self.saved[member] = of_member
        self.left = [member for member in range(plan.members) if member not in self.trained]  # that are not done
        self.stop, self.error = StopOnSignal(), None
        self.member = self.left[0] if self.left else 0
        self.trainer = self._trainer(started)
        self.parameters = parameter_counts(self.trainer.learn)  # of one network

    @property
    def learn(self) -> Learner:
        """The learner of the network that trains."""
        return self.trainer.learn

    @property
    def lr(self) -> float:
        """The peak learning rate of the head that was given, or that was found last; after an error, its network's."""
        found = [search for member in sorted(self.trained) for search in self.trained[member].searches]
        return found[-1]["peak"] if found and self.error is None else self.trainer.lr

    def with_epochs(self) -> dict[int, Trained]:
        """Return `trained`, and the networks whose checkpoint has an epoch, but whose turn did not come again."""
        kept = {member: Trained.of(saved) for member, saved in self.saved.items() if saved.best_row is not None}
        return kept | self.trained

    def train(self) -> None:
        """Train the networks that are not done, until a signal stops the fit, or a loss is not finite.

        Raises:
            UserError: as `Trainer.train_phases`.
        """
        with self.stop:
            for member in [*self.left]:
                if member != self.member:
                    self._begin(member)
                self._train()
                if self.stop.due() or self.error is not None:
                    return
                self.left.remove(member)

    def _begin(self, member: int) -> None:
        """Make the trainer of a network in place of the one before, whose memory is freed."""
        before, batches = self.trainer.plan.batch_size, self.trainer.progress.batches
        del self.trainer
        gc.collect()
        self.member = member
        self.trainer = self._trainer(perf_counter(), batches if min(batches.values()) < before else None)

    def _trainer(self, started: float | None, batches: dict[str, int] | None = None) -> Trainer:
        """Make the trainer of the present network.

        Args:
            started: `time.perf_counter()` when its training began.
            batches: images in a batch, where memory ran out before.
        """
        saved, checkpoints = self.saved.get(self.member), None
        if self.checkpoints is not None:
            checkpoints = self.checkpoints[self.member]
        trainer = Trainer(
            self.plan.of_member(self.member, self._seconds()), checkpoints=checkpoints, saved=saved, started=started,
            turn=Turn(max(0, len(self.left) - 1), batches),
        )  # fmt: skip
        trainer.stop = self.stop
        return trainer

    def _seconds(self) -> float | None:
        """Return the seconds that the present network may take: an equal share of what a time limit leaves."""
        limit = self.plan.config.seconds_allowed
        if limit is None or not self.left:
            return None
        # of its own limit, a trainer keeps this share for the export
        used = sum(trained.seconds for member, trained in self.trained.items() if member != self.member)
        return max(LEAST_SECONDS, (limit - used / (1 - EXPORT_SHARE)) / len(self.left))

    def _train(self) -> None:
        trainer, member = self.trainer, self.member
        trainer.added = self.added
        for tracker in self.added.trackers:
            tracker.begin(member)
        saved = self.saved.pop(member, None)
        announce_member(trainer.plan, member, self.plan.members, saved)
        if trainer.checkpoints is not None and saved is None:
            trainer.checkpoints.begin()
        trainer.train_phases()
        if trainer.best.row is not None:
            self.trained[member] = Trained.by(trainer)
        if trainer.error is not None:
            self.error = f"member {member + 1} of {self.plan.members}, {trainer.error}"
        elif trainer.checkpoints is not None and self.stop.received is None:
            trainer.checkpoints.keep_newest()


def without_done(saved: dict[int, Saved], plan: Plan) -> dict[int, Saved]:
    """Return checkpoints without the tensors of networks that are done, which other processes need not have."""
    return {
        member: replace(one, weights={}, best={}) if plan.members > 1 and one.is_done(plan.phases) else one
        for member, one in saved.items()
    }


def start_tensors(plan: Plan) -> Tensors:
    """Return the weights that the networks start from; none if they are random."""
    parts = {PRETRAINED: plan.pretrained} if plan.pretrained is not None else dict(enumerate(plan.start or []))
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def with_start(plan: Plan, folder: Path, known: dict[str, Any]) -> Plan | None:
    """Return a plan with the weights in `START`; None if the file is damaged.

    Args:
        plan: of the resumed fit.
        folder: of its checkpoints.
        known: the file's size and checksum.
    """
    try:
        if checksum(folder / START) != known:
            return None
        tensors = load_file(folder / START)
    except (OSError, SafetensorError):
        return None
    parts: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = tensor.clone()  # else it is mapped to the file
    if PRETRAINED in parts:
        return replace(plan, pretrained=parts[PRETRAINED])
    return replace(plan, start=[parts[number] for number in sorted(parts, key=int)])


def read_checkpoints(checkpoints: Sequence[Checkpoints], folder: Path) -> dict[int, Saved]:
    """Return the newest checkpoint of each network that has one, and print what is damaged.

    Args:
        checkpoints: of each network.
        folder: of the checkpoints of the fit to resume.

    Raises:
        UserError: all checkpoints of the only network are damaged.
    """
    found = {}
    for member, own in enumerate(checkpoints):
        saved, faults = own.load(folder) if len(checkpoints) == 1 else own.newest(folder / own.folder.name)
        after = "resuming from the previous checkpoint" if saved else f"member {member + 1} is trained again"
        for fault in faults:
            print(f"{fault}; {after}")
        if saved is not None:
            found[member] = saved
    return found
