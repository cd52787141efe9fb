"""Results come in order, a few at a time, and a signal at any moment ends the reading."""

import subprocess
import sys
import threading
import time

import pytest

from tests.forked import with_tests
from xray_fastai.system import parallel
from xray_fastai.system.parallel import map_in_threads


def threads_end(before: int) -> bool:
    end = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    return threading.active_count() <= before


def test_results_come_in_the_order_of_the_items_and_threads_end():
    before = threading.active_count()

    def slow_at_first(i):
        time.sleep(0.05 * (i == 0))
        return i * i

    assert list(map_in_threads(slow_at_first, range(100), threads=4)) == [i * i for i in range(100)]
    assert list(map_in_threads(slow_at_first, [])) == []
    assert threads_end(before)


def test_items_are_taken_only_so_far_ahead():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = map_in_threads(lambda i: i, items(), threads=2, ahead=5)
    assert not taken
    for i in range(10):
        assert next(results) == i
        assert len(taken) == i + 6
    results.close()
    assert len(taken) == 15


def test_an_error_is_raised_at_the_turn_of_its_item():
    before = threading.active_count()

    def divide(i):
        return 1 / (i - 3)

    results, values = map_in_threads(divide, range(100)), []
    with pytest.raises(ZeroDivisionError):
        for value in results:
            values.append(value)
    assert values == [1 / -3, 1 / -2, 1 / -1]
    assert threads_end(before)


def test_the_end_does_not_wait_for_a_file_that_never_comes(monkeypatch):
    monkeypatch.setattr(parallel, "MAX_WAIT", 0.1)
    stalled = threading.Event()
    results = map_in_threads(lambda i: i == 0 or stalled.wait(60), range(4), threads=2)
    next(results)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 30
    stalled.set()


@pytest.mark.skipif(sys.platform == "win32", reason="a timer's signal is POSIX's")
def test_a_signal_at_any_moment_ends_it():
    """With `ThreadPoolExecutor.map` this hangs after some ten of the 300 signals.

    A thread that is about to start when the signal comes may wait for ever; nobody waits for it.
    """
    program = (
        "import signal\n"
        "from xray_fastai.system.parallel import map_in_threads\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGALRM, stop)\n"
        "stopped = 0\n"
        "for n in range(300):\n"
        "    try:\n"
        "        signal.setitimer(signal.ITIMER_REAL, 1e-4 + 1e-5 * n)\n"
        "        for _ in map_in_threads(lambda i: sum(range(200)), range(100_000)): pass\n"
        "    except KeyboardInterrupt: stopped += 1\n"
        "print(stopped)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["300"] and not done.stderr, done.stderr


@pytest.mark.parametrize(("guard", "code"), [("if True:", 1), ('if __name__ == "__main__":', 0)])
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_script_that_its_loading_processes_would_run_again(guard, code, method, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import multiprocessing\n"
        "from xray_fastai.system.parallel import check_main_guard\n"
        f"{guard}\n"
        f"    multiprocessing.set_start_method({method!r})\n"
        "    check_main_guard()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=with_tests())
    assert done.returncode == (code if method == "spawn" else 0), done.stderr
    if done.returncode:
        assert done.stderr.splitlines()[-1].startswith("xray_fastai.system.errors.UserError: workers: ")
        assert "mine.py, line 5" in done.stderr and 'if __name__ == "__main__":' in done.stderr
