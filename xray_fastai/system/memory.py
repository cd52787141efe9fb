"""Recognises errors that say that memory ran out."""

from collections.abc import Iterator
from contextlib import contextmanager

from xray_fastai.system.errors import UserError

TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # on Windows
    "bad_alloc",  # C++
    "MPS backend out of memory",
    "CUDA error: out of memory",  # outside of torch's allocator: a context, pinned memory
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",  # cuDNN, where no engine's workspace fits
)
"""Parts of the messages of plain RuntimeErrors, which only their text identifies. torch's allocator for GPUs raises
`torch.OutOfMemoryError`."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, so that a smaller batch may help."""
    if isinstance(error, MemoryError):
        return True
    import torch  # a light folder: whoever has such an error has imported it

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)


@contextmanager
def out_of_memory_means(message: str) -> Iterator[None]:
    """Raise a UserError with this message if memory runs out inside the context."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from None
