"""SIGTERM, where there is no training under way, is as Ctrl-C: it stops at once and leaves nothing half done."""

import contextlib
import signal
from collections.abc import Iterator


class Terminated(KeyboardInterrupt):
    """SIGTERM, where Ctrl-C would raise a `KeyboardInterrupt`."""


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Have SIGTERM raise `Terminated`, so that what is half done is cleaned up."""

    def terminate(_number, _frame):
        raise Terminated

    before = None
    with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch
        before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
