"""Runs fits and commands, each in a forked child of one process that has imported everything, which saves seconds.

Reads one job a line from standard input, and writes one result a line. A job has the folder, variables of the
environment, the keywords of `fit` or the arguments of a command, and a fault:

    {"cwd": "...", "env": {...}, "fit": {...}, "do": "kill", "at": "module:function@n"}
    {"cwd": "...", "env": {...}, "args": ["fit", ...], "do": "terminate", "at": "module:function@n", "everyone": true}

The fault happens when the child enters the function (or `module:Class.method`) for the n-th time: `kill`, `terminate`
and `interrupt` send SIGKILL, SIGTERM and SIGINT to the child, or to "everyone": its loading processes, too. `vanish`
renames the folder of exports. `starve` runs out of memory from the n-th time on, when the function, a method that gets
a batch, gets more than "max_images" images. "limit" is the maximum size of a file in bytes. Each epoch gets a
checkpoint, or the first after so many "seconds". A checkpoint that is being written is completed first, unless its
thread enters the function.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

from tests import small_network

MODULES = ("evaluation.report", "training.fit", "training.loop", "training.write_export")
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
ROOT = Path(__file__).parents[1]


def with_tests() -> dict[str, str]:
    """Return the environment of a process that imports modules of the tests."""
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


class Forked:
    """Starts the process of a module like this one, and gives it jobs."""

    def __init__(self, module: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", module], text=True, env=with_tests(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __call__(self, **job) -> dict:
        """Return the result of a job, which starts in the current folder unless it names another."""
        variables = {name: os.environ[name] for name in ("TORCH_HOME", "XDG_CACHE_HOME") if name in os.environ}
        job = {"cwd": os.getcwd()} | job | {"env": variables | job.get("env", {})}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(60) == 0


def arrange(what: str, where: str, max_images: int = 0, everyone: bool = False) -> None:
    import torch

    path, _, n = where.partition("@")
    module, _, name = path.partition(":")
    owner = importlib.import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def arranged(*args, **kwargs):
        nonlocal calls
        calls += 1
        if what == "starve":
            if calls >= int(n) and len(args[1]) > max_images:
                raise torch.OutOfMemoryError("no memory, for a test")
        elif calls == int(n):
            if threading.current_thread() is threading.main_thread():
                for thread in threading.enumerate():  # the previous checkpoint is written
                    if thread.name == "checkpoint":
                        thread.join(20)
            if what == "vanish":
                os.rename("exports", "vanished")
            else:
                print("processes:", *members(os.getsid(0)))
                (os.killpg if everyone else os.kill)(os.getpid(), SIGNALS[what])
        return original(*args, **kwargs)

    setattr(owner, name, arranged)


def enter(job: dict) -> None:
    """Prepare a child for its job."""
    os.chdir(job["cwd"])
    os.environ |= job["env"]
    if "do" in job:
        arrange(job["do"], job["at"], job.get("max_images", 0), job.get("everyone", False))


def members(session: int) -> list[int]:
    """Return the running processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()  # state, parent, group, session, ...
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def import_everything() -> None:
    import matplotlib.pyplot  # noqa: F401
    import PIL.Image
    import sklearn.ensemble  # noqa: F401
    from fastai.callback.channelslast import ChannelsLast  # noqa: F401

    small_network.allow()
    for name in MODULES:
        importlib.import_module(f"xray_fastai.{name}")
    small_network.register()
    PIL.Image.init()
    importlib.import_module("xray_fastai.evaluation.report")._template()
    curves = importlib.import_module("xray_fastai.evaluation.learning_curves")
    curves._draw_curves = lambda axes, *_: axes.remove()  # see `conftest`


def child(job: dict) -> None:
    from xray_fastai import fit
    from xray_fastai.cli import app
    from xray_fastai.training import state
    from xray_fastai.training.write_export import FitInterrupted

    code = 1
    try:
        os.setsid()
        enter(job)
        state.SECONDS = job.get("seconds", 0)
        if "limit" in job:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        if "args" in job:
            app(job["args"], prog_name="xray-fastai")
        with contextlib.suppress(FitInterrupted):
            fit(**job["fit"])
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    import_everything()
    for line in sys.stdin:
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            sys.stdout.reconfigure(line_buffering=True)
            child(json.loads(line))
        os.close(writer)
        with os.fdopen(reader) as stream:
            output = stream.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"code": code, "output": output, "pid": pid}), flush=True)


if __name__ == "__main__":
    main()
