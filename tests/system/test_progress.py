"""Bars on a terminal, in a notebook, and nowhere else; a notebook gets no codes of a terminal."""

import io
import sys
from types import ModuleType, SimpleNamespace

import pytest

from xray_fastai.system import progress
from xray_fastai.system.progress import NotebookBar, TerminalBar, epoch_bar, in_notebook, on_terminal, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def page(monkeypatch):
    """The displays of a notebook's page, each the list of what it showed; a stand-in for IPython in a kernel."""
    page = []

    def display(shown, display_id=None, **_):
        updates = [shown]
        page.append(updates)
        return SimpleNamespace(update=updates.append)

    ipython, shows = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    shows.display, shows.HTML = display, str
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", shows)
    return page


def test_ipython_is_not_imported_to_look_for_a_notebook(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook() and "IPython" not in sys.modules


def test_ipython_on_a_terminal_is_no_notebook(page, monkeypatch):
    assert in_notebook()
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace())
    assert not in_notebook()
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)
    assert not in_notebook()


def test_a_command_in_a_cell_is_not_on_a_terminal(monkeypatch):
    """`!xray-fastai fit` runs on a pseudo-terminal, but its output goes onto the page."""
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    assert on_terminal(Terminal()) and not on_terminal(io.StringIO())
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert not on_terminal(Terminal())


def test_a_fits_bar_by_place(page, monkeypatch):
    assert isinstance(epoch_bar(3), NotebookBar)
    monkeypatch.setattr(progress, "in_notebook", lambda: False)
    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    bar = epoch_bar(3)
    assert isinstance(bar, TerminalBar)
    bar.begin(1, "training", 8)
    bar.advance()
    print("row 1")
    bar.close()
    assert "row 1\n" in sys.stdout.getvalue() and "epoch 2 training" in sys.stdout.getvalue()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert epoch_bar(3) is None


def test_a_notebook_has_one_place_for_all_bars_of_a_fit_and_plain_rows(page, capsys):
    bar = epoch_bar(2)
    for epoch in range(2):
        for part, batches in (("training", 3), ("validation", 1)):
            bar.begin(epoch, part, batches)
            for _ in range(batches):
                bar.advance()
        print(f"row {epoch}")
    bar.close()
    bars = [updates for updates in page if "<style>" not in str(updates[0])]
    assert len(bars) == 1
    texts = list(map(str, bars[0]))
    assert any("... training" in text for text in texts) and any("... validation" in text for text in texts)
    assert "progress" in texts[-2] and "progress" not in texts[-1]
    said = capsys.readouterr()
    assert said.out == "row 0\nrow 1\n" and said.err == ""


def test_steps_in_a_notebook_and_elsewhere(page, capsys, monkeypatch):
    assert list(track(iter("abc"), "reading", 3)) == ["a", "b", "c"]
    assert any("3/3" in str(update) and "... reading" in str(update) for updates in page for update in updates)
    assert list(track(iter(""), "reading", 0)) == []
    monkeypatch.setattr(progress, "in_notebook", lambda: False)
    shown = len(page)
    assert list(track(iter("abc"), "reading", 3)) == ["a", "b", "c"] and len(page) == shown
    assert capsys.readouterr() == ("", "")
