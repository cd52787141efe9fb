"""Fits, each in a forked child of one process that has imported everything and computed nothing: seconds less each.

Reads a job a line on standard input, and writes a result a line. A job is the keywords of `fit`, and what goes wrong:

    {"fit": {...}, "do": "kill", "at": "module:function@n"}

does that as the child enters the function (or `module:Class.method`) for the n-th time: `kill` and `terminate` send
itself SIGKILL and SIGTERM, `vanish` takes the folder of exports away. `starve` runs out of memory, from the n-th time
on, wherever the function, a method that gets a batch, sees more than "most" images. "limit" is the size in bytes that
no file can pass. A checkpoint that is being written gets to its end first, unless the function is called for it.
"""

import importlib
import json
import os
import resource
import signal
import sys
import threading
import traceback

MODULES = ("evaluation.report", "training.fit", "training.loop", "training.finish")


def arrange(what: str, where: str, most: int = 0) -> None:
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
            if calls >= int(n) and len(args[1]) > most:
                raise torch.OutOfMemoryError("no memory, for a test")
        elif calls == int(n):
            if threading.current_thread() is threading.main_thread():
                for thread in threading.enumerate():  # the checkpoint before it is on the disk
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

    try:
        if "do" in job:
            arrange(job["do"], job["at"], job.get("most", 0))
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
            told = stream.read()
        print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "output": told}), flush=True)


if __name__ == "__main__":
    main()
