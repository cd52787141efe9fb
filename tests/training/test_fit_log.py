"""The log of a fit: what it holds, where it stays, and what a closed terminal leaves in it."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.conftest import QUICK, settings_of, wait_for
from tests.forked import with_tests
from xray_fastai import fit, verify
from xray_fastai.export.run_folder import LOG

pytestmark = pytest.mark.slow

SCRATCH = [*QUICK, "--weights", "none"]


def text_of(export):
    """The lines of a log without their times."""
    lines = (export / LOG).read_text(encoding="utf-8").splitlines()
    return "\n".join(line[21:] for line in lines)


def test_a_quiet_fit_shows_nothing_and_its_log_has_all(collection, run):
    result = run("fit", collection, *SCRATCH, "--epochs", 1, "--name", "quiet", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    export = Path("exports/quiet")
    text = text_of(export)
    for words in (
        "versions      xray-fastai ",
        f"folder        {Path.cwd()}",
        f"images        {collection}",
        "36 images: 14 NORMAL, 22 PNEUMONIA",
        "unfrozen       1/1",
        "export: exports/quiet",
    ):
        assert words in text, text
    assert re.search(r"^command +\S+", text, re.M) and re.search(r"SHA-256 of names.*: [0-9a-f]{64}$", text, re.M)
    settings = json.loads(re.search(r"^settings +(.*)$", text, re.M)[1])
    assert settings["epochs"] == 1 and settings["quiet"] is True
    checked = verify(export)
    assert checked.ok and "not written by a fit" not in str(checked)


def test_a_fit_that_fails_before_an_epoch_leaves_nothing(collection, run, refused):
    refused(run("fit", collection, *SCRATCH, "--lr", 9, "--min-delta", 0, "--name", "gone", "--device", "cuda"), "cuda")
    assert not list(Path("exports").glob("*gone*"))


def test_ctrl_c_then_the_same_command_and_resume(collection, run, monkeypatch):
    """The same command names --resume; the resumed run has the whole log."""
    from fastai.vision.all import Callback

    class Interrupt(Callback):
        def before_validate(self):
            if self.epoch == 1:
                os.kill(os.getpid(), signal.SIGINT)

    settings = {"weights": "none", "arch": QUICK[1], "size": 32, "batch_size": 8, "workers": 0, "device": "cpu"}
    settings |= {"data": str(collection), "epochs": 3}
    with pytest.raises(KeyboardInterrupt):
        fit(**settings, name="first", callbacks=[Interrupt()])
    args = ["fit", collection, *SCRATCH, "--epochs", 3]
    again = run(*args, "--name", "first")
    assert (
        again.exit_code == 1 and "resume it by 'xray-fastai fit --resume first', or give another name" in again.stderr
    )
    again = run(*args, "--name", "second")
    assert "exports/first of " in again.stdout and "to continue it, xray-fastai fit --resume first" in again.stdout
    another = run(*args, "--name", "third", "--seed", 1)
    assert "to continue it" not in another.stdout
    resumed = run("fit", "--resume", "first")
    assert resumed.exit_code == 0, resumed.output
    text = text_of(Path("exports/first-2"))
    assert text.count("command  ") == 2 and "Stopping after this batch" in text
    assert "resuming      first" in text and "export: exports/first-2" in text


@pytest.mark.skipif(sys.platform != "linux", reason="how a closed terminal answers is Linux's")
def test_a_closed_terminal_exports_and_says_so_in_the_log(collection):
    import pty

    args = ["fit", collection, *SCRATCH, "--epochs", 500, "--patience", 500, "--name", "closed"]
    command = [sys.executable, "-m", "tests.small_network", *map(str, args)]
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that nohup started would hand on that it is ignored
        os.execve(sys.executable, command, with_tests())
    shown = b""
    while b"the rest takes at most" not in shown:
        shown += os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    export = wait_for(lambda: next(Path("exports").glob("closed"), None))
    model = settings_of(export)
    assert model["status"] == "interrupted" and model["training"]["phases"][0]["end"] == "a closed terminal"
    text = text_of(export)
    assert "The terminal was closed (SIGHUP): stopping after this batch" in text
    assert "resume: xray-fastai fit --resume closed" in text
    assert "\x1b" not in text and "training" not in text.split("an epoch takes")[1].split("The terminal")[0]
