"""Fits in forked children of one process that has imported everything and computed nothing: half a second less each.

Reads a JSON list of jobs on standard input, `{"fit": {keywords of fit}, "kill": "module:function@n"}`, and writes one
of results. With "kill", the child sends itself SIGKILL as it enters that function for the n-th time; `module:Class.method`
goes too. A thread's kill ends the whole child.
"""

import contextlib
import importlib
import io
import json
import os
import signal
import sys
import traceback

MODULES = (
    "bundle callbacks calibration checkpoint curves device learner loaders memory report runs signals trainingstate"
)


def kill_at(where: str) -> None:
    path, _, nth = where.partition("@")
    module, _, name = path.partition(":")
    owner = importlib.import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == int(nth):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def child(job: dict, output: int) -> None:
    from xray_fastai import fit

    told, code = io.StringIO(), 0
    with contextlib.redirect_stdout(told):
        try:
            if "kill" in job:
                kill_at(job["kill"])
            fit(**job["fit"])
        except BaseException:
            traceback.print_exc(file=told)
            code = 1
    os.write(output, told.getvalue().encode())
    os._exit(code)


def main() -> None:
    import matplotlib.pyplot  # noqa: F401
    from fastai.callback.channelslast import ChannelsLast  # noqa: F401

    for name in MODULES.split():
        importlib.import_module(f"xray_fastai.{name}")
    results = []
    for job in json.load(sys.stdin):
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(reader)
            child(job, writer)
        os.close(writer)
        with os.fdopen(reader) as stream:
            told = stream.read()
        results.append({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "output": told})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
