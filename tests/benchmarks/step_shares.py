"""Measures which share of a training step goes into loading, copying, each batch transform, the network, and the rest.

    clock = Clock()
    fit(..., callbacks=watchers(clock, skip=2, steps=10))     # raises `Enough` at the end
    print(clock.table())

A step is cut at marks; each part lasts from the mark before it to its own. On a CPU this is the time of the process. On
a GPU it is the time of the GPU (CUDA events): kernels run one after another there, so a part's share includes the time
that the GPU waited for the process to start it. The column "process" then says how long the process itself was in that
part: where it needs longer than the GPU, the GPU waits.

parts     loading        until the next batch is there, decoded and collated
          copy           to the device
          <transform>    each batch transform under the name of its class (fastai merges rotation, zoom and stretch into
                         Rotate, and changes of brightness and contrast into Brightness)
          forward        network and loss
          backward, optimizer
          callbacks      all callbacks of fastai and of the fit, at all events of a step
"""

import time
from collections import defaultdict
from contextlib import ExitStack
from unittest.mock import patch

import fastai.data.load
import torch
from fastai.vision.all import Callback, Learner, TfmdDL

from tests.benchmarks.measuring import DEVICE, Enough

COPY = fastai.data.load.to_device


class Clock:
    """Adds up seconds by part; marks before `start` are ignored."""

    def __init__(self):
        self.marks: list[tuple[str, float, torch.cuda.Event | None]] = []
        self.running, self.steps = False, 0

    def start(self) -> None:
        self.running, self.marks = True, []
        self.mark("start")

    def mark(self, part: str) -> None:
        """End a part that began at the mark before."""
        if not self.running:
            return
        event = None
        if DEVICE.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append((part, time.perf_counter(), event))

    def seconds(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the seconds of a step by part: on the device, and in this process (on a CPU the same)."""
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        on_device, in_process = defaultdict(float), defaultdict(float)
        for (_, before, earlier), (part, after, event) in zip(self.marks, self.marks[1:], strict=False):
            in_process[part] += (after - before) / self.steps
            on_device[part] += (after - before if event is None else earlier.elapsed_time(event) / 1e3) / self.steps
        return dict(on_device), dict(in_process)

    def table(self) -> str:
        """Return the parts with milliseconds and per cent of a step, the largest first."""
        on_device, in_process = self.seconds()
        total = sum(on_device.values())
        lines = [f"\nshares of a step, mean of {self.steps}\n{'':<20}{'ms':>10}{'share':>8}{'process, ms':>14}"]
        for part in sorted(on_device, key=on_device.get, reverse=True):
            value = on_device[part]
            lines.append(f"{part:<20}{1e3 * value:>10.2f}{value / total:>8.1%}{1e3 * in_process[part]:>14.2f}")
        lines.append(f"{'step':<20}{1e3 * total:>10.2f}{'':>8}{1e3 * sum(in_process.values()):>14.2f}")
        return "\n".join(lines)


class Before(Callback):
    "Marks what ended before the callbacks of an event run."

    order = -1000
    run_valid = False

    def __init__(self, clock: Clock):
        self.clock = clock

    def before_batch(self):
        self.clock.mark("loading")  # what lies between the last transform and the batch's first event

    def after_pred(self):
        self.clock.mark("forward")

    def after_loss(self):
        self.clock.mark("forward")

    def after_backward(self):
        self.clock.mark("backward")

    def after_step(self):
        self.clock.mark("optimizer")

    def after_batch(self):
        self.clock.mark("optimizer")  # its `zero_grad`


class After(Callback):
    "Marks the end of an event's callbacks; starts the clock after `skip` steps, and ends the fit after `steps` more."

    order = 1000
    run_valid = False

    def __init__(self, clock: Clock, skip: int, steps: int):
        self.clock, self.skip, self.steps = clock, skip, steps

    def before_fit(self):
        self.done = 0

    def before_train(self):
        self.watched = ExitStack()
        self.watched.enter_context(patch.object(fastai.data.load, "to_device", self._copy))
        mark_transforms(self.learn, self.clock, self.watched)
        if self.skip == 0:
            self.clock.start()

    def _copy(self, *args, **kwargs):
        self.clock.mark("loading")
        batch = COPY(*args, **kwargs)
        self.clock.mark("copy")
        return batch

    def before_batch(self):
        self.clock.mark("callbacks")

    after_pred = after_loss = before_backward = after_backward = before_step = after_step = before_batch

    def after_batch(self):
        self.clock.mark("callbacks")
        self.done += 1
        if self.done == self.skip:
            self.clock.start()
        if self.done == self.skip + self.steps:
            self.clock.running, self.clock.steps = False, self.steps
            self.watched.close()
            raise Enough("all steps were measured")  # fastai needs an exception with a message


def mark_transforms(learn: Learner, clock: Clock, until: ExitStack) -> None:
    """Put a mark behind each batch transform of the training loader, and one before the first."""
    loader: TfmdDL = learn.dls.train
    transforms = loader.after_batch.fs

    def marker(part: str):
        def mark(batch, split_idx=None):
            clock.mark(part)
            return batch

        return mark

    marked = [marker("loading")]
    for transform in transforms:
        marked += [transform, marker(type(transform).__name__)]
    until.enter_context(patch.object(loader.after_batch, "fs", type(transforms)(marked)))


def watchers(clock: Clock, skip: int, steps: int) -> list[Callback]:
    """Return the callbacks that measure `steps` steps after the first `skip`, then raise `Enough`."""
    return [Before(clock), After(clock, skip, steps)]
