"""Lets torch's threads share the cores of a CPU with other programs: how they wait, and how many there are.

torch's builds for Linux compute with GNU OpenMP. Its threads meet after each operation. A thread that comes early spins
(by default 300,000 rounds, about a millisecond) before it sleeps. Where another program holds the core of the late
thread, the spinning takes away the very time that it needs. Two processes of two threads on two cores lose more than
half of their speed to it. `tests/benchmarks/busy.py` measures this.
"""

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SPINS = 3_000
"""Rounds that a thread spins before it sleeps.

Training steps a second (ResNet18, 32 images of 64 px, fp32, 2 cores with AVX2, 2 threads) of a process that is alone,
and of each of two at the same time. (At a high priority on a machine in use; the first row is good to a tenth.)

    rounds          300,000     10,000     3,000     1,000     0 (asleep at once)     one thread
    one process        2.11       2.00      1.89      1.91                   1.81           1.09
    two processes      0.58       0.85      1.00      1.18                   1.03           1.38
"""
OWN_CHOICE = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
"""The user's (and torchrun's) variables for the number of threads; where one is set, this module changes nothing."""
RECENT = 60.0
"""Seconds; where the last look at the cores is older, another one is taken."""


@dataclass(frozen=True)
class Use:
    """Says how long the cores and this process have computed until a moment, in seconds."""

    moment: float
    all: float  # summed over the cores that this process may use
    own: float


@dataclass(frozen=True)
class Threads:
    """Says how many threads torch computes with on a CPU."""

    count: int
    most: int  # as many as torch would use
    why: str | None = None  # there are fewer than `most`

    def __str__(self) -> str:
        threads = "thread" if self.most == 1 else "threads"
        return f"{self.count} {threads}" if self.why is None else f"{self.count} of {self.most} {threads}: {self.why}"


_last: Use | None = None


def sleep_soon() -> None:
    """Let OpenMP's threads sleep after a short spin, unless the user's variables say how they wait.

    The library reads the variable when it is loaded. So this must come before torch is imported; afterwards it has no
    effect.
    """
    global _last
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    if _last is None:
        _last = look()


def look() -> Use | None:
    """Return how long the cores were in use until now; None where the system does not say (it is Linux that does).

    Time of programs at a lower priority (`nice`) is left out: they give way.
    """
    try:
        cores = os.sched_getaffinity(0)
        lines = Path("/proc/stat").read_text().splitlines()
        tick = os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError):
        return None
    ticks = 0
    for line in lines:
        name, *columns = line.split()
        if name.startswith("cpu") and name[3:].isdecimal() and int(name[3:]) in cores:
            # user, nice, system, idle, iowait, irq, softirq, steal: proc_stat(5)
            user, _, system, _, _, *others = map(int, columns[:8])
            ticks += user + system + sum(others)
    return Use(time.monotonic(), ticks / tick, sum(os.times()[:4]))  # own: with child processes that have ended


def others_use() -> float | None:
    """Return how many cores other programs have used on average since the last call, or since the start.

    None where the system does not say. If the last call was long ago, this takes a quarter of a second.
    """
    global _last
    before, now = _last, look()
    if now is None:
        return None
    if before is None or now.moment - before.moment > RECENT:
        before = now
    if now.moment - before.moment < 0.25:
        time.sleep(0.25)
        now = look()
    _last = now
    return max(0.0, (now.all - before.all - now.own + before.own) / (now.moment - before.moment))


def quota() -> float | None:
    """Return how many cores' time a container (cgroup) lets this process use; None without a limit.

    torch does not know this limit, and starts a thread for each core of the machine.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", controllers)
        for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
            limits.append(_limit(folder))
            if folder == root:
                break
    return min((limit for limit in limits if limit), default=None)


def _limit(folder: Path) -> float | None:
    """Return the cores' time that one cgroup may use: cpu.max in version 2, two files in version 1."""
    try:
        if (folder / "cpu.max").is_file():
            most, period = (folder / "cpu.max").read_text().split()
        else:
            most, period = ((folder / name).read_text() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        return None if most == "max" or int(most) <= 0 else int(most) / int(period)
    except (OSError, ValueError):
        return None


def advise(most: int) -> Threads:
    """Return how many of `most` threads to compute with.

    They are as many as other programs leave cores free, but at least half: whoever comes second gets a share, too.
    """
    if any(name in os.environ for name in OWN_CHOICE):
        return Threads(most, most)
    limit, others = quota(), others_use()
    allowed = most if limit is None else min(most, math.ceil(limit))
    free = allowed if others is None else round(len(os.sched_getaffinity(0)) - others)
    count = min(allowed, max(math.ceil(allowed / 2), free))
    if count < allowed:
        return Threads(count, most, "the machine is busy")
    return Threads(count, most, "the container allows no more" if count < most else None)
