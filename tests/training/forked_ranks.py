"""Runs commands in two processes each, as torchrun does, forked from one process that has imported everything.

Reads one job a line from standard input, and writes one result a line. A job is a command line, and a fault in one of
the processes (see `tests.forked`):

    {"cwd": "...", "env": {...}, "args": ["fit", ...], "rank": 1, "do": "kill", "at": "module:function@n"}

When one fails, the others get SIGTERM, and SIGKILL half a minute later, as with torchrun.
"""

import importlib
import json
import os
import signal
import socket
import sys
import threading

from tests.forked import enter, import_everything

SIZE = 2


def child(job: dict, rank: int, port: int) -> None:
    from xray_fastai.cli.main import app

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    code = 70
    try:
        enter(job if rank == job.get("rank") else {"cwd": job["cwd"], "env": job["env"]})
        app(job["args"], prog_name="xray-fastai")
    except SystemExit as stop:
        code = stop.code or 0
    sys.__stdout__.flush()
    os._exit(code)


def main() -> None:
    import torch.distributed as dist

    import_everything()
    importlib.import_module("xray_fastai.training.data_parallel")
    for line in sys.stdin:
        reader, writer = os.pipe()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = {}
        for rank in range(SIZE):
            if (pid := os.fork()) == 0:
                os.close(reader)
                os.dup2(writer, 1)
                os.dup2(writer, 2)
                sys.stdout.reconfigure(line_buffering=True)
                child(json.loads(line), rank, port)
            ranks[pid] = rank
        os.close(writer)
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # like torchrun's
        outputs = []
        listener = threading.Thread(target=lambda end=reader, outputs=outputs: outputs.append(os.fdopen(end).read()))
        listener.start()
        codes, timers = {}, []
        while ranks.keys() - codes:
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid]:
                for other in ranks.keys() - codes:
                    os.kill(other, signal.SIGTERM)
                    timers.append(threading.Timer(30, os.kill, (other, signal.SIGKILL)))
                    timers[-1].start()
        for timer in timers:
            timer.cancel()
        listener.join()
        del store
        print(json.dumps({"codes": [codes[pid] for pid in ranks], "output": outputs[0]}), flush=True)


if __name__ == "__main__":
    main()
