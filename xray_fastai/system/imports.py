"""Imports fastai without a warning that is none of the user's: about a function of torch that fastai calls then."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_fastais_warning() -> Iterator[None]:
    """Hide one warning inside the context: fastai 2.8 compiles an activation by `torch.jit.script` when it is imported.

    torch 2.14 warns that this function is deprecated. The user's own calls of it, outside of the context, still warn.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning, r"torch\.jit\.")
        yield
