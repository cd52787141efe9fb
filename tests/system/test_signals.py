"""SIGTERM ends a block like Ctrl-C, and a closed pipe ends a command without a traceback."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from xray_fastai.system.signals import Terminated, output_is_closed, sigterm_raises

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


def test_sigterm_raises_in_the_block_and_the_old_handler_comes_back():
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        with pytest.raises(KeyboardInterrupt) as error, sigterm_raises():
            os.kill(os.getpid(), signal.SIGTERM)
        assert error.type is Terminated
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [1]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_another_thread_than_the_main_one_changes_no_handler():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def block():
        with sigterm_raises():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert inside == [before]


@pytest.mark.parametrize(
    ("error", "platform", "closed"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "linux", True),
        (OSError(errno.EINVAL, "Invalid argument"), "win32", True),
        (OSError(errno.EINVAL, "Invalid argument"), "linux", False),
        (OSError(errno.EINVAL, "Invalid argument", "a?.jpeg"), "win32", False),
        (OSError(errno.ENOSPC, "No space left on device"), "win32", False),
    ],
)
def test_a_closed_pipe_is_an_invalid_argument_on_windows(error, platform, closed, monkeypatch):
    monkeypatch.setattr("sys.platform", platform)
    assert output_is_closed(error) == closed


def test_a_closed_pipe_gives_the_exit_code_of_sigpipe_and_no_message():
    program = (
        "from xray_fastai.system.signals import ignore_closed_output\n"
        "try:\n    while True: print('x' * 1000)\n"
        "except BrokenPipeError: raise SystemExit(ignore_closed_output())"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141
    process.stderr.close()
