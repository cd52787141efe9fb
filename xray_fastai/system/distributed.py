"""Runs one command in several processes that torchrun started: numbers them, shares values, prints errors once.

    torchrun --nproc-per-node 4 -m xray_fastai fit ...

Only the first process (rank 0) reads the data set, writes files and prints; it sends the others what they need by
`share`. Shared values go over gloo, also on GPUs, where NCCL carries the tensors. A process that fails prints its error
if no other has done so, and ends. Then torchrun ends the others, and whoever waits for the missing process fails at
once. Which process prints is decided with torchrun's store: the first to increase a counter there. Without torchrun
this module does nothing and does not import torch.
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
from typing import TYPE_CHECKING, Any, TextIO

from xray_fastai.system.errors import UserError, reason
from xray_fastai.system.text import shown

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store


COMMANDS = ("fit", "predict")
"""The commands that run in several processes."""
MAX_SILENCE = timedelta(hours=3)
"""How long a process waits for another that does not answer; the first may be reading a large data set."""
MAX_WAIT = 5.0
"""Seconds that the other processes wait for the first to print an error that all of them have."""

_store: "Store | None" = None


def world_size() -> int:
    """Return the number of processes; 1 without torchrun, or another program that sets its variables."""
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ["RANK"]) if _launched() else 0


def local_rank() -> int:
    """Return the number of this process on this machine, from 0; its GPU has the same number."""
    return int(os.environ["LOCAL_RANK"]) if _launched() else 0


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _launched() else 1


def _launched() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def check_command(name: str) -> None:
    """Check that a command runs in as many processes as there are.

    Raises:
        UserError: it runs in one process only.
    """
    if world_size() > 1 and name not in COMMANDS:
        raise UserError(
            f"{name}: runs in one process; start it without torchrun (which is for {' and '.join(COMMANDS)})"
        )


def check_installed() -> None:
    """Check that the package is installed that training in several processes needs.

    Raises:
        UserError: it is not.
    """
    if world_size() > 1 and importlib.util.find_spec("accelerate") is None:
        raise UserError('training in several processes needs accelerate: pip install "xray-fastai[distributed]"')


def batch_size(wanted: int, images: int) -> int:
    """Return the images in one step of all processes together, a multiple of their number.

    Args:
        wanted: the batch size that the user asks for.
        images: the number of training images, which is the maximum.

    Raises:
        UserError: `wanted` is not a multiple, or there are fewer images than processes.
    """
    size, world = min(wanted, images), world_size()
    if wanted % world:
        near = [str(n) for n in (wanted // world * world, (wanted // world + 1) * world) if n]
        raise UserError(
            f"cannot be shared evenly by {world} processes; give {' or '.join(near)}", option="batch_size", value=wanted
        )
    if images < world:
        raise UserError(f"{images} images to train on are too few for {world} processes; start fewer processes")
    return size // world * world


def own_device(device: "torch.device") -> "torch.device":
    """Return the device of this process: with several processes on GPUs, the GPU with its local number.

    Raises:
        UserError: this machine has fewer GPUs than processes, or the device cannot be shared.
    """
    import torch

    if world_size() == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(
            'only one process can use it; give device="cpu", or start without torchrun',
            option="device",
            value=device.type,
        )
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"{local_world_size()} processes on {socket.gethostname()}, where torch finds {torch.cuda.device_count()} "
            'GPUs; give torchrun at most that number by --nproc-per-node, or give device="cpu"'
        )
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


@contextlib.contextmanager
def session() -> Iterator[bool]:
    """Connect the processes; inside the context only the first one prints.

    Yields:
        Whether this is the first process, or the only one.

    Raises:
        UserError: the processes cannot connect, or one of them ended.
    """
    if world_size() == 1:
        yield True
        return
    try:
        _join()
        with contextlib.ExitStack() as stack:
            if rank():
                nowhere = stack.enter_context(_nowhere())
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield rank() == 0
    except SystemExit:
        finish()
        _claim()  # the reason was printed already
        raise
    except BaseException as error:
        finish()
        lost = _lost_process(error)
        if lost is None:
            raise
        if rank() and _is_claimed() is None:  # the first process's torchrun has ended too, and prints the reason
            raise SystemExit(1) from None
        for note in getattr(error, "__notes__", []):
            lost.add_note(note)
        raise lost from None


def share(value: Any = None) -> Any:
    """Return the first process's value in all processes; the others wait for it. With one process, return `value`."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed as dist

    values = [value if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def any_of(number: int | None) -> int | None:
    """Return the largest number of all processes in all of them; None if none has a number."""
    if world_size() == 1:
        return number
    import torch
    import torch.distributed as dist

    largest = torch.tensor(number or 0)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest) or None


def hush() -> None:
    """Silence this process from now on, except for `tell`, unless it is the first."""
    if rank():
        sys.stdout = sys.stderr = _nowhere()


def _nowhere() -> TextIO:
    """Open a stream that discards all text, also names that the system's encoding lacks."""
    return open(os.devnull, "w", encoding="utf-8", errors="replace")


def tell(text: str) -> None:
    """Print on standard error why a process ends: once for all processes, by the first of them if it fails too."""
    if world_size() == 1:
        print(text, file=sys.stderr)
        return
    finish()
    if rank():
        if _is_claimed():
            return
        text += f" [process {rank() + 1} of {world_size()}, on {socket.gethostname()}]"
    if _claim() is not False:  # without a store several processes may print
        print(text, file=sys.__stderr__ if rank() else sys.stderr, flush=True)


def give_way() -> None:
    """Let the first process print an error that all have. The others wait: torchrun ends all once one has ended."""
    if world_size() == 1:
        return
    if rank():
        _is_claimed()
    else:
        _claim()


def finish() -> None:
    """Ignore SIGTERM from now on: torchrun sends it to all once one has ended, and this process is about to end."""
    if world_size() > 1:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _claim() -> bool | None:
    """Claim to print why the processes end. Return whether this is the first claim; None if the store is gone."""
    try:
        return _open_store().add(_key(), 1) == 1
    except (ImportError, OSError, RuntimeError):
        return None


def _is_claimed() -> bool | None:
    """Return whether a process claims within `MAX_WAIT` to print why they end; None if the store is gone."""
    try:
        store, end = _open_store(), time.monotonic() + MAX_WAIT
        while not store.check([_key()]):  # `store.wait` prints lines of its own when the time is up
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
    except (ImportError, OSError, RuntimeError):
        return None
    return True


def _key() -> str:
    """Return the store's key of the claims, which is another one after each restart by torchrun."""
    return "/".join(
        ["xray-fastai", *(os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))]
    )


def _open_store() -> "Store":
    """Connect to torchrun's store, which outlives the processes on its machine."""
    global _store
    if _store is not None:
        return _store
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
    return _store


def _join() -> None:
    """Connect this process with the others.

    Raises:
        UserError: they cannot connect.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=MAX_SILENCE)
        _open_store()
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the {world_size()} processes cannot connect at {where} ({reason(error)})") from None
    atexit.register(_leave)


def _leave() -> None:
    """Disconnect from the others, as NCCL demands; not after an error, when this could wait for an ended process."""
    import torch.distributed as dist

    if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:  # `finish`
        dist.destroy_process_group()


def _lost_process(error: BaseException) -> UserError | None:
    """Return the error for the user if `error` says that another process ended or does not answer; else None.

    NCCL and the store raise `DistError`. gloo raises plain RuntimeErrors, which only their text tells from others
    (torch 2.14). It begins with a line of gloo's source: "[/.../gloo/transport/tcp/pair.cc:561] Connection closed by
    peer" if a process ended, "[/.../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting" if it does not answer.
    fastai puts the name of the callback before it.
    """
    from torch.distributed import DistError

    gloo = re.search(r"\[\S*/gloo/\S+:\d+\] (.*)", str(error), re.DOTALL) if isinstance(error, RuntimeError) else None
    if gloo is None and not isinstance(error, DistError):
        return None
    text = gloo[1] if gloo else str(error)
    silent = f", or was silent for {MAX_SILENCE.seconds // 3600} hours" if text.startswith("Timed out") else ""
    return UserError(
        f"another of the {world_size()} processes ended{silent}, or cannot be reached; see what torchrun printed about "
        f"it ({shown(text, 100)})"
    )
