"""Chooses the device, the threads of a CPU, and the precision."""

import torch

from xray_fastai.system.distributed import own_device
from xray_fastai.system.errors import UserError
from xray_fastai.system.threads import Threads, advise

_threads: Threads | None = None  # what `choose_threads` chose


def choose_device(wanted: str) -> torch.device:
    """Return the device of this name; `auto` is a GPU if there is one. With several processes each gets its own GPU.

    On a CPU it also chooses how many threads torch computes with (`threads.advise`).

    Raises:
        UserError: the machine, or this build of torch, has no such device, or fewer than processes.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[wanted]:
        names = ", ".join(name for name, is_there in available.items() if is_there)
        raise UserError(
            f"torch finds no such device on this machine (it finds {names}); give one of these, or auto",
            option="device",
            value=wanted,
        )
    device = own_device(torch.device(wanted))
    if device.type == "cpu":
        _choose_threads()
    return device


def _choose_threads() -> None:
    """Let torch compute with as many threads as are advisable now, never with more than it would use by itself."""
    global _threads
    count = torch.get_num_threads()  # differs from the last choice where the caller has set it since
    _threads = advise(_threads.most if _threads is not None and count == _threads.count else count)
    if _threads.count != count:
        torch.set_num_threads(_threads.count)


def cpu_has_bf16() -> bool:
    """Return whether this CPU computes in bfloat16 (avx512_bf16 or amx)."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_tile"))


def choose_precision(wanted: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16; `auto` is the fastest that the device supports without loss of quality.

    Raises:
        UserError: fp16 without CUDA, where nothing scales the loss and gradients would vanish; or bf16 on a GPU
            without it.
    """
    cuda_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        if cuda_bf16 or (device.type == "cpu" and cpu_has_bf16()):
            return "bf16"
        return "fp16" if device.type == "cuda" else "fp32"
    if wanted == "fp16" and device.type != "cuda":
        raise UserError(
            f"needs a CUDA GPU, and this fit runs on {device.type}; choose fp32 or bf16",
            option="precision",
            value=wanted,
        )
    if wanted == "bf16" and device.type == "cuda" and not cuda_bf16:
        raise UserError("this GPU does not compute in bf16; choose fp16", option="precision", value=wanted)
    return wanted


def describe(device: torch.device) -> str:
    """Return the device's name for people: the GPU's name, or the CPU with its threads, and why there are not more."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type != "cpu":
        return device.type
    count = torch.get_num_threads()
    return f"cpu ({_threads if _threads is not None and count == _threads.count else Threads(count, count)})"
