"""Run a function on many items in threads, so that Ctrl-C and SIGTERM end it at once.

Python raises `KeyboardInterrupt` in the main thread between any two steps of its code, those of the standard library
included. If this happens just after `threading.Condition` took its lock, nobody releases the lock again. A
`ThreadPoolExecutor` that is stopped in `submit` or `result` then waits for its threads, which wait for the lock: of 400
readings of 2,000 items, each stopped by SIGINT at a random moment, 33 hung (Python 3.11, 2 busy cores).

Here the main thread and the others meet only in `queue.SimpleQueue`. It is written in C, and no signal handler runs
halfway through its calls. `threading.Thread.start` takes such a lock, too, so `_thread` starts the threads, Python's
documented interface below it. Python does not wait for these threads when it ends.
"""

import ast
import inspect
import multiprocessing
import os
import time
import traceback
from _thread import start_new_thread
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from xray_fastai.system.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = min(8, os.cpu_count() or 1)
MAX_WAIT = 0.5
"""Seconds that the end waits for threads at work. A picture that takes long to decode, or a file of a stalled network
drive, is not waited for any longer."""


def check_main_guard() -> None:
    """Check that processes may be started, where each imports the user's script (macOS, Windows, Python 3.14).

    A script that calls `fit` outside of `if __name__ == "__main__":` would start another fit in each of them.

    Raises:
        UserError: the script that is running does so.
    """
    if multiprocessing.get_start_method() == "fork":
        return
    for frame, line in traceback.walk_stack(inspect.currentframe()):
        if frame.f_code.co_name != "<module>" or frame.f_globals.get("__name__") not in ("__main__", "__mp_main__"):
            continue
        try:
            tree = ast.parse(Path(frame.f_code.co_filename).read_bytes())
        except (OSError, SyntaxError, ValueError):  # an interactive session or `python -c`: nothing is imported again
            return
        for part in tree.body:
            guarded = isinstance(part, ast.If) and "__name__" in ast.unparse(part.test)
            if part.lineno <= line <= (part.end_lineno or line) and not guarded:
                raise UserError(
                    f"{frame.f_code.co_filename}, line {line}: loading processes run this script again; put the call "
                    "below a line 'if __name__ == \"__main__\":', or give 0",
                    option="workers",
                )


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS, ahead: int = 4 * THREADS
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order, while threads compute the next results.

    Args:
        function: is called in the threads.
        items: is read in the caller's thread, never more than `ahead` items beyond the last result yielded.
        threads: the number of threads.
        ahead: the largest number of results that are computed, or wait to be yielded.

    Raises:
        Exception: what `function` raises, at that item's turn.
    """
    tasks: SimpleQueue[tuple[int, Item] | None] = SimpleQueue()
    finished: SimpleQueue[tuple[int, Any, BaseException | None] | None] = SimpleQueue()
    ended = False

    def call(number: int, item: Item) -> None:
        try:
            finished.put((number, function(item), None))
        except BaseException as error:
            finished.put((number, None, error))

    def work() -> None:
        while (task := tasks.get()) is not None and not ended:
            call(*task)
            del task  # an image, which may be large
        finished.put(None)

    running, submitted = 0, 0
    waiting: dict[int, list[Any]] = {}  # results and errors by the number of the item
    numbered = enumerate(items)
    try:
        for _ in range(threads):
            start_new_thread(work, ())
            running += 1
        for task in islice(numbered, ahead):
            tasks.put(task)
            submitted += 1
        turn = 0
        while turn < submitted:
            while turn not in waiting:
                number, *outcome = finished.get()
                waiting[number] = outcome
            value, error = waiting.pop(turn)
            turn += 1
            if error is not None:
                raise error
            for task in islice(numbered, 1):
                tasks.put(task)
                submitted += 1
            yield value
            del value
    finally:
        ended = True
        for _ in range(threads):
            tasks.put(None)
        end = time.monotonic() + MAX_WAIT
        with suppress(Empty):
            while running:
                running -= finished.get(timeout=max(0.0, end - time.monotonic())) is None
