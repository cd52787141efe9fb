"""A command's log has what was shown, with times, and the command goes on when its terminal is closed."""

import errno
import io
import os
import re
import sys

import pytest

from xray_fastai.system import progress, run_log
from xray_fastai.system.errors import UserError
from xray_fastai.system.run_log import Shown, logging_to, say_at_once

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def lines_of(path):
    """The lines of a log without their times, each of which must be there."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(re.match(TIME, line) for line in lines), lines
    return [line[21:] for line in lines]


def test_what_is_shown_is_logged_in_whole_lines(tmp_path, capsys):
    with logging_to(lambda: tmp_path / "log"):
        print("one", end=" ")
        print("line\n\n  indented")
        print("warned", file=sys.stderr)
        sys.stderr.write("\r 10%\r100%\n")
    print("afterwards")
    assert lines_of(tmp_path / "log") == ["one line", "", "  indented", "warned", "100%"]
    shown = capsys.readouterr()
    assert shown.out == "one line\n\n  indented\nafterwards\n" and shown.err == "warned\n\r 10%\r100%\n"


def test_a_quiet_command_shows_its_errors_only(tmp_path, capsys):
    with logging_to(lambda: tmp_path / "log", quiet=True):
        print("logged")
        print("warned", file=sys.stderr)
        assert progress.epoch_bar(3) is None and list(progress.track([1, 2], "steps", 2)) == [1, 2]
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "warned\n")
    assert lines_of(tmp_path / "log") == ["logged", "warned"]


def test_the_folder_of_the_log_may_move(tmp_path):
    folder = tmp_path / "before"
    folder.mkdir()
    with logging_to(lambda: folder / "log"):
        print("first")
        folder = folder.rename(tmp_path / "after")
        print("second")
    assert lines_of(tmp_path / "after" / "log") == ["first", "second"]


@pytest.mark.parametrize(
    ("error", "words"),
    [(UserError("no such folder"), "Error: no such folder"), (KeyboardInterrupt(), "Stopped: KeyboardInterrupt")],
)
def test_the_error_that_ends_a_command_is_logged(tmp_path, error, words):
    with pytest.raises(type(error)), logging_to(lambda: tmp_path / "log"):
        raise error
    assert lines_of(tmp_path / "log") == [words]


def test_a_bug_leaves_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError), logging_to(lambda: tmp_path / "log"):
        print(1 / 0)
    lines = lines_of(tmp_path / "log")
    assert lines[0].startswith("Traceback") and lines[-1] == "ZeroDivisionError: division by zero"


def test_a_log_that_cannot_be_written_is_named(tmp_path, capsys):
    with logging_to(lambda: tmp_path / "missing" / "log"):
        print("shown")
    shown = capsys.readouterr()
    assert shown.out == "shown\n"
    assert shown.err == f"WARNING: {tmp_path / 'missing' / 'log'}: lines are missing (No such file or directory)\n"


class Closed(io.StringIO):
    """A terminal that was closed, or a pipe."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


def test_a_closed_terminal_ends_nothing_and_a_closed_pipe_does(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run_log, "discard_closed_terminal", lambda: asked.append(1))
    log = run_log.RunLog(lambda: tmp_path / "log")
    print("logged", file=Shown(Closed(errno.EIO), log))
    assert lines_of(tmp_path / "log") == ["logged"] and asked
    with pytest.raises(BrokenPipeError):
        print("logged", file=Shown(Closed(errno.EPIPE), log))


def test_rows_above_a_bar_are_logged_and_the_bar_is_not(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with logging_to(lambda: tmp_path / "log"):
        inside = sys.stdout
        bar = progress.TerminalBar()
        bar.begin(0, "training", 3)
        bar.advance()
        print("a row")
        print("of a user's callback", file=sys.stderr)
        bar.close()
        assert sys.stdout is inside
        print("the end")
    assert lines_of(tmp_path / "log") == ["a row", "of a user's callback", "the end"]
    shown = terminal.getvalue()
    assert "epoch 1 training" in shown and shown.index("a row") < shown.index("the end")


def test_a_signals_handler_shows_and_logs_at_once(tmp_path, capfd):
    with logging_to(lambda: tmp_path / "log"):
        say_at_once("\nStopping.\n")
    assert lines_of(tmp_path / "log") == ["Stopping."]
    assert capfd.readouterr().err == "\nStopping.\n"
