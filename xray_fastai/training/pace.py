"""Measures what an epoch takes, and plans the epochs that a time limit allows."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from fastai.vision.all import Callback, CancelFitException, TrackerCallback

from xray_fastai.system import distributed
from xray_fastai.system.text import count_of
from xray_fastai.training.callbacks import Schedule

FROZEN_SHARE = 0.25
"""The part of a time limit after which the frozen phase ends, with the features that it computes first."""
HEAD_SHARE = 0.05
"""The part of a time limit that the epochs of the frozen phase may take at least, whatever the features took."""
EXPORT_SHARE = 0.05
"""The part of a time limit that is kept for the export: gate, calibration, pictures, and writing the files."""
SLACK = 0.1
"""An epoch is planned if at most this part of it is beyond the limit: times vary a little from epoch to epoch."""
TRAINING = 3.6
"""Training all layers takes as long for an image as computing this many of its features in the frozen phase.

Measured in CPU seconds of one core, with all else of an epoch: at 224 px 3.5 (ResNet18) and 3.6 (ResNet50), with 36
images in a batch. At 64 px and with batches of 16, where the optimizer counts for more, 4.9 (ResNet18).
"""


def short_duration(seconds: float) -> str:
    """Return a duration as minutes and seconds, or, from an hour on, as hours and minutes.

    >>> [short_duration(s) for s in (0.4, 75, 3599.4, 3599.6, 90000)]
    ['0:00', '1:15', '59:59', '1h00', '25h00']
    """
    seconds = round(seconds)
    return f"{seconds // 60}:{seconds % 60:02}" if seconds < 3600 else f"{seconds // 3600}h{seconds // 60 % 60:02}"


def phase_end(limit: float, phase: str, elapsed: float) -> float:
    """Return the second of a fit with a time limit at which a phase should end.

    Args:
        limit: seconds that the whole fit may take.
        phase: "frozen" or "unfrozen".
        elapsed: seconds that the fit has taken when the epochs of the phase begin.
    """
    if phase == "frozen":
        return max(FROZEN_SHARE * limit, elapsed + HEAD_SHARE * limit)
    return (1 - EXPORT_SHARE) * limit


@dataclass(frozen=True)
class Following:
    """Describes the phase that comes after one."""

    epochs: int  # at most
    seconds: Callable[[float], float]  # estimates what an epoch of it takes, given the seconds of one of this phase
    search: float = 0.0  # epochs that take as long as the search of its learning rate


class Pace(Callback):
    """Measure what an epoch takes; with a time limit, plan the epochs that it allows, and end the phase after them.

    The plan is made after the first epoch, and again after each. `schedule` falls to the planned end. Once it falls,
    the plan gets no longer, because the rate would rise again. Several processes use the plan of the first.
    """

    members_left = 0  # networks of the ensemble to train after this one
    order = TrackerCallback.order + 4  # after early stopping, before the checkpoint, which the last epoch does not need

    def __init__(
        self,
        clock: Callable[[], float],  # seconds that the fit has taken, also in the processes before
        phase: str = "unfrozen",  # or "frozen"
        limit: float | None = None,  # seconds that the whole fit may take
        schedule: Schedule | None = None,  # None is a constant rate
        following: Following | None = None,  # the next phase
    ):
        self.clock, self.phase, self.limit, self.schedule, self.following = clock, phase, limit, schedule, following
        self.end: float | None = None  # of the phase, by the clock; None is no time limit
        self.measured: list[float] = []  # seconds of the last epochs
        self.count = 0  # epochs that this process trained
        self.last: float | None = None  # when an epoch ended
        self.planned: int | None = None  # epochs of the phase
        self.stopped = False  # whether the time limit ended the phase

    @property
    def seconds(self) -> float:
        """Seconds of an epoch: of the last five, since other programs come and go."""
        return fmean(self.measured)

    @property
    def epochs(self) -> int:
        """The epochs that the phase has at most."""
        return self.planned or self.n_epoch

    def before_fit(self):
        if self.limit is not None:
            self.end = phase_end(self.limit, self.phase, self.clock())

    def before_epoch(self):
        if self.last is None:
            self.last = self.clock()
        if self.schedule is not None:
            self.schedule.epochs = self.planned  # also after a checkpoint was restored

    def after_validate(self):
        now = self.clock()
        seconds, self.last, self.count = now - self.last, now, self.count + 1
        if self.count == 1:  # which also fills caches: it says little about the others
            self.measured = self.measured or [seconds]  # a checkpoint has better ones
        else:
            self.measured = [*self.measured[-4:], seconds] if self.count > 2 else [seconds]
        if self.end is not None:
            self.planned = distributed.share(self._plan())

    def _plan(self) -> int:
        done = self.epoch + 1
        more = int(max(0.0, self.end - self.last) / self.seconds + SLACK)
        falls = self.planned and self.schedule and done >= self.schedule.falls_from(self.planned)
        return min(done + more, self.planned if falls else self.n_epoch)

    def after_epoch(self):
        if self.epoch + 1 >= self.epochs and self.epochs < self.n_epoch:
            self.stopped = True
            raise CancelFitException

    def forecast(self) -> str:
        """Return in words what an epoch takes, and the longest that the rest of the fit can take, if any is left."""
        left, seconds = self.epochs - (self.epoch + 1), self.seconds
        text, rest = f"an epoch takes {in_words(seconds)}", left * seconds
        parts = [count_of(left, "epoch")] if left else []
        if self.following is not None:
            of_one = self.following.seconds(seconds)
            rest += (self.following.epochs + self.following.search) * of_one
            about = "about " if of_one >= 1 else ""
            searched = " and a search of their learning rate" if self.following.search else ""
            parts.append(f"at most {self.following.epochs} unfrozen of {about}{in_words(of_one)} each{searched}")
        if self.limit is not None:
            text += f"; {self.epochs} of {count_of(self.n_epoch, 'epoch')} fit into the time limit"
            rest = min(rest, max(0.0, self.limit - self.clock()))
        if self.members_left:
            rest += self.members_left * (self.clock() + rest)
            parts.append(f"{count_of(self.members_left, 'network')} more")
        if not parts:
            return text
        most = in_words(rest) if rest < 1 else f"at most {in_words(rest)}"
        return f"{text}; the rest takes {most} ({', then '.join(parts)})"


def in_words(seconds: float) -> str:
    """Return a duration for a sentence.

    >>> [in_words(s) for s in (0.4, 12, 75, 5400)]
    ['less than 1 s', '12 s', '1:15 min', '1h30']
    """
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    return short_duration(seconds) + (" min" if round(seconds) < 3600 else "")
