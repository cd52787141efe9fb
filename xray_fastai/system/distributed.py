"""One command in several processes, as torchrun starts them: who they are, how they agree, and which of them speaks.

    torchrun --nproc-per-node 4 -m xray_fastai fit ...

The first process (rank 0) alone reads the data set, writes files and prints; what the others need it `share`s. What
they agree on goes over gloo, on CPUs and beside NCCL on GPUs alike. One that fails says so, if no other was faster, and
ends; torchrun ends the others, and a wait for one that is gone fails at once. Where torchrun is not at work nothing
here imports torch or changes anything.
"""

import atexit
import contextlib
import importlib.util
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from xray_fastai.system.errors import UserError, reason
from xray_fastai.system.text import shown

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

T = TypeVar("T")

COMMANDS = ("fit", "predict")
"""Those that run in several processes."""
PATIENCE = timedelta(hours=3)
"""How long a process waits for another that lives but doesn't answer; the first may be reading a large data set."""
GRACE = 1.0
"""Seconds that the others leave to the first to tell an error that all of them have."""

_store: "Store | None" = None


def world_size() -> int:
    """How many processes there are; 1 where torchrun, or what sets its variables, is not at work."""
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if _launched() else 0


def local_rank() -> int:
    """The number of this process among those on this machine, from 0: that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if _launched() else 0


def local_world_size() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _launched() else 1


def _launched() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def check_command(name: str) -> None:
    """Raises:
    UserError: the command runs in one process, and there are several.
    """
    if world_size() > 1 and name not in COMMANDS:
        raise UserError(f"{name}: runs in one process; start it without torchrun (for {' and '.join(COMMANDS)} alone)")


def check_installed() -> None:
    """Raises:
    UserError: there are several processes to train in, and what that needs is not installed.
    """
    if world_size() > 1 and importlib.util.find_spec("accelerate") is None:
        raise UserError('training in several processes needs accelerate: pip install "xray-fastai[distributed]"')


def batch_size(wanted: int, images: int) -> int:
    """The images a step, of all processes together, that are divided evenly among them.

    Raises:
        UserError: `wanted` can't be divided evenly, or there are fewer images than processes.
    """
    size, world = min(wanted, images), world_size()
    if wanted % world:
        near = [n for n in (wanted // world * world, (wanted // world + 1) * world) if n]
        told = " or ".join(map(str, near))
        raise UserError(f"can't be shared evenly by {world} processes; give {told}", option="batch_size", value=wanted)
    if images < world:
        raise UserError(f"{images} images to train on are too few for {world} processes; start fewer")
    return size // world * world


def own_device(device: "torch.device") -> "torch.device":
    """The part of the machine that this process has to itself: of its GPUs the one that has its number.

    Raises:
        UserError: there are fewer GPUs than processes on this machine, or it is a device that can't be shared.
    """
    import torch

    if world_size() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(
            "one process alone can use it; give --device cpu, or leave torchrun out", option="device", value=device.type
        )
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"{local_world_size()} processes on {socket.gethostname()}, where torch finds {torch.cuda.device_count()} "
            "GPUs; give torchrun at most so many by --nproc-per-node, or give --device cpu"
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


@contextlib.contextmanager
def session() -> Iterator[bool]:
    """Take part in what all processes do; the others than the first print nothing within.

    Yields:
        Whether this is the first process, or the only one.

    Raises:
        UserError: the processes do not find each other, or one of them ended meanwhile.
    """
    if world_size() == 1:
        yield True
        return
    try:
        _join()
        with contextlib.ExitStack() as stack:
            if rank():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield rank() == 0
    except SystemExit:
        finish()
        _claim()  # it was said why
        raise
    except BaseException as error:
        finish()
        if not _is_of_another(error):
            raise
        if rank() and not _store_answers():  # the torchrun of the first process has ended as well, and tells
            raise SystemExit(1) from None
        why = re.sub(r"^.*\.cc:\d+\] ", "", str(error), flags=re.DOTALL)  # where in gloo's source it was seen
        silent = f", or was silent for {PATIENCE.seconds // 3600} hours" if "Timed out" in why else ""
        lost = UserError(
            f"another of the {world_size()} processes ended{silent}, or can't be reached any more; see what torchrun "
            f"says of it ({shown(why, 100)})"
        )
        for note in getattr(error, "__notes__", []):
            lost.add_note(note)
        raise lost from None


def share(value: T | None = None) -> T:
    """The first process's value, in all; each waits for it there. Itself, where there is one process."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed as dist

    values = [value if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def any_of(number: int | None) -> int | None:
    """The largest number that any process has here, in all; None where all have None."""
    if world_size() == 1:
        return number
    import torch
    import torch.distributed as dist

    largest = torch.tensor(number or 0)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest) or None


def hush() -> None:
    """Have this process, where it is not the first, print nothing from now on but by `tell`."""
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def tell(text: str) -> None:
    """Print why a process ends on standard error: once, by the first that has something to tell."""
    if world_size() == 1:
        print(text, file=sys.stderr)
        return
    finish()
    give_way()
    if rank():
        text += f" [process {rank() + 1} of {world_size()}, on {socket.gethostname()}]"
    if _claim() is not False:  # where nobody can say, better told twice than not
        print(text, file=sys.__stderr__ if rank() else sys.stderr, flush=True)


def give_way() -> None:
    """Leave it to the first process to tell what all have found, before the end of this one ends that."""
    if rank():
        time.sleep(GRACE)


def finish() -> None:
    """Let this process end by itself: torchrun sends all a SIGTERM when one has ended."""
    if world_size() > 1:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _claim() -> bool | None:
    """Whether this process is the first that ends early; None where there is nobody to ask any more."""
    try:
        attempt = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT")]
        return (_store or _open_store()).add("/".join(["xray-fastai", *attempt]), 1) == 1
    except (ImportError, OSError, RuntimeError):
        return None


def _store_answers() -> bool:
    time.sleep(GRACE)
    try:
        return _store is not None and _store.num_keys() > 0
    except RuntimeError:
        return False


def _open_store() -> "Store":
    """torchrun's own, which on a machine outlives the processes."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)


def _join() -> None:
    import torch
    import torch.distributed as dist

    global _store
    if dist.is_initialized():
        return
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
        _store = _open_store()
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the {world_size()} processes do not find each other at {where} ({reason(error)})") from None
    atexit.register(_leave)


def _leave() -> None:
    """Part from the others, as NCCL wants it; not where one may be gone, for which this would wait."""
    import torch.distributed as dist

    if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:  # `finish`
        dist.destroy_process_group()


def _is_of_another(error: BaseException) -> bool:
    """Whether an error here only says that another process is not there any more."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))
