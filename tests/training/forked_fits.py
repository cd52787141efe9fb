"""Runs fits, each in a forked child of one process that has imported everything, which saves seconds for each.

Reads one job a line from standard input, and writes one result a line. A job has the keywords of `fit` and a fault:

    {"fit": {...}, "do": "kill", "at": "module:function@n"}

The fault happens when the child enters the function (or `module:Class.method`) for the n-th time: `kill` and
`terminate` send SIGKILL and SIGTERM to the child, `vanish` renames the folder of exports. `starve` runs out of memory
from the n-th time on, when the function, a method that gets a batch, gets more than "max_images" images. "limit" is the
maximum size of a file in bytes. Each epoch gets a checkpoint, or the first after so many "seconds". A checkpoint that
is being written is completed first, unless its thread enters the function.
"""

import importlib
import json
import os
import resource
import signal
import sys
import threading
import traceback

MODULES = ("evaluation.report", "training.fit", "training.loop", "training.write_export")


def arrange(what: str, where: str, max_images: int = 0) -> None:
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
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}[what])
        return original(*args, **kwargs)

    setattr(owner, name, arranged)


def child(job: dict) -> None:
    from xray_fastai import fit
    from xray_fastai.training import state

    try:
        if "do" in job:
            arrange(job["do"], job["at"], job.get("max_images", 0))
        state.SECONDS = job.get("seconds", 0)
        if "limit" in job:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        fit(**job["fit"])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    import matplotlib.pyplot  # noqa: F401
    from fastai.callback.channelslast import ChannelsLast  # noqa: F401

    for name in MODULES:
        importlib.import_module(f"xray_fastai.{name}")
    importlib.import_module("xray_fastai.evaluation.learning_curves")._draw_curves = lambda *_: None  # see `conftest`
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
        print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "output": output}), flush=True)


if __name__ == "__main__":
    main()
