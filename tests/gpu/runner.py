"""Runs checks, each in a process of its own with a time limit, and prints one table with a verdict a line.

A check is a function that takes a `Place` and returns an `Outcome`. An exception, a crash or a hang of one is its
verdict; the others go on. Nothing here imports torch.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

PASS, FAIL, NOT_RUN, BELOW, MEASURED = "pass", "FAIL", "not run", "below the goal", "measured"
ROOT = Path(__file__).resolve().parents[2]
TABLE_TEXT = 300
"""Characters of a detail in the table; the log has all of it."""


@dataclass(frozen=True)
class Outcome:
    """Says how a check ended."""

    verdict: str  # PASS, FAIL, NOT_RUN, BELOW or MEASURED
    detail: str


@dataclass(frozen=True)
class Place:
    """Tells a check where it runs."""

    folder: Path  # shared by all checks of a run; has `data`, the drawn X-rays
    device: str  # cuda or cpu
    quick: bool  # tiny sizes: they show that the script works, and no speed


@dataclass(frozen=True)
class Check:
    """Describes one line of the table."""

    name: str  # also of its log and its export
    title: str
    function: str  # module:function
    seconds: float = 150  # time limit; not in a quick run, whose machine may be slow
    needs: tuple[str, ...] = ()  # checks that must have passed before
    alone: bool = False  # whether nothing else may run at the same time
    arguments: dict[str, object] = field(default_factory=dict)  # of the function, besides the place
    settings: dict[str, str] = field(default_factory=dict)  # environment variables, such as those of the benchmarks


class Run:
    """Runs checks in their order: those that are not `alone` side by side, each as soon as what it needs has passed."""

    def __init__(self, place: Place, jobs: int, minutes: float, tell: Callable[[str], None]):
        self.place, self.jobs, self.tell = place, jobs, tell
        self.end = time.monotonic() + 60 * minutes
        self.running: set[int] = set()  # sessions
        self.outcomes: dict[str, Outcome] = {}
        self.seconds: dict[str, float] = {}
        self.changed = threading.Condition()

    def all(self, checks: Sequence[Check]) -> None:
        """Run the checks; `outcomes` then has one for each."""
        names = [check.name for check in checks]
        for i, check in enumerate(checks):
            missing = [name for name in check.needs if name not in names[:i]]
            assert not missing, f"{check.name} needs {missing}, which do not run before it"
        together = [check for check in checks if not check.alone]
        pool = ThreadPoolExecutor(self.jobs)
        try:
            list(pool.map(self._one, together))
            for check in checks:
                if check.alone:
                    self._one(check)
        finally:  # after Ctrl-C some are running
            pool.shutdown(wait=False, cancel_futures=True)
            for leader in list(self.running):
                end_session(leader)

    def _one(self, check: Check) -> None:
        start = time.monotonic()
        with self.changed:
            self.changed.wait_for(lambda: all(name in self.outcomes for name in check.needs))
        failed = [name for name in check.needs if self.outcomes[name].verdict != PASS]
        if failed:
            outcome = Outcome(FAIL, f"not begun: it needs {', '.join(failed)}")
        else:
            start = time.monotonic()
            outcome = self._run(check, self.end - start)
        with self.changed:
            self.outcomes[check.name], self.seconds[check.name] = outcome, time.monotonic() - start
            self.changed.notify_all()
        self.tell(f"{check.name:<18}{outcome.verdict:<16}{self.seconds[check.name]:>4.0f} s  {outcome.detail}")

    def _run(self, check: Check, left: float) -> Outcome:
        """Run one check in a process of its own, and end all that it started.

        Args:
            check: its output goes to <name>.log in the place's folder.
            left: seconds until the whole run has to end.
        """
        limit = left if self.place.quick else min(check.seconds, left)
        if limit <= 0:
            return Outcome(FAIL, "not begun: the time of the whole run is up")
        folder = self.place.folder
        log, answer = folder / f"{check.name}.log", folder / f"{check.name}.json"
        task = json.dumps({"place": asdict(self.place) | {"folder": str(folder)}, **asdict(check)})
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.child", task, str(answer)],
                cwd=ROOT, env=os.environ | check.settings, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self.running.add(process.pid)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return Outcome(FAIL, f"ended after {limit:.0f} s; it last printed: {last_line(log)}")
        finally:
            end_session(process.pid)
            self.running.discard(process.pid)
            process.wait()
        if answer.exists():
            return Outcome(**json.loads(answer.read_text()))
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Outcome(FAIL, f"{how}; it last printed: {last_line(log)}")


def end_session(leader: int) -> None:
    """Kill all processes of a session and all that descend from its leader: torchrun gives its own to each rank."""
    found = processes() if os.path.isdir("/proc") else {}
    doomed = {leader} | {pid for pid, (_, session) in found.items() if session == leader}
    while more := {pid for pid, (parent, _) in found.items() if parent in doomed} - doomed:
        doomed |= more
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for pid in doomed - {leader}:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def processes() -> dict[int, tuple[int, int]]:
    """Return the parent and the session of each process (Linux)."""
    found = {}
    for name in os.listdir("/proc"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if name.isdigit():
                fields = Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")[2].split()
                found[int(name)] = int(fields[1]), int(fields[3])
    return found


def last_line(log: Path) -> str:
    """Return the last line of an output that says something."""
    lines = [line.strip() for line in log.read_text(errors="backslashreplace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """Return 1 if a check failed, 3 if only a speed is below its goal, else 0."""
    verdicts = {outcome.verdict for outcome in outcomes}
    return 1 if FAIL in verdicts else 3 if BELOW in verdicts else 0


def markdown(run: Run, checks: Sequence[Check]) -> str:
    """Return the table for tests/benchmarks/README.md."""
    lines = ["| check | verdict | seconds | detail |", "| --- | --- | --- | --- |"]
    for check in checks:
        outcome = run.outcomes[check.name]
        detail = " ".join(outcome.detail.split()).replace("|", "\\|")
        if len(detail) > TABLE_TEXT:
            detail = detail[: TABLE_TEXT - 3] + "..."
        lines.append(f"| {check.title} | {outcome.verdict} | {run.seconds[check.name]:.0f} | {detail} |")
    return "\n".join(lines)
