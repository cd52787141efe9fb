"""Errors that say that memory ran out are told from others by their type, or by their text alone."""

import pytest
import torch

from xray_fastai.system.errors import UserError
from xray_fastai.system.memory import is_out_of_memory, out_of_memory_means

NO_MEMORY = [  # as torch words them
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB)"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Expected all tensors to be on the same device"),
    ValueError("CUDA error: out of memory"),
]


@pytest.mark.parametrize("error", NO_MEMORY + OTHERS, ids=lambda error: str(error)[:30])
def test_an_error_that_says_that_memory_ran_out_becomes_one_for_the_user(error):
    assert is_out_of_memory(error) == (error in NO_MEMORY)
    with pytest.raises(UserError if error in NO_MEMORY else type(error)) as caught, out_of_memory_means("give less"):
        raise error
    assert str(caught.value) == ("give less" if error in NO_MEMORY else str(error))
