"""What happens if an export cannot be written: a full disk is named, and a bug stays a bug."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import QUICK
from tests.small_network import NAME as SMALL
from xray_fastai.export.run_folder import reserve
from xray_fastai.model.learner import build_learner
from xray_fastai.model.loaders import empty_loaders
from xray_fastai.system.errors import UserError
from xray_fastai.training.calibration import Calibration
from xray_fastai.training.judgement import Judgement
from xray_fastai.training.write_export import Outcome, write_export

MODULE = "xray_fastai.training.write_export"
ROW = {
    "phase": "unfrozen",
    "epoch": 1,
    "train_loss": 1.0,
    "valid_loss": 1.0,
    "accuracy": 1.0,
    "roc_auc": 1.0,
    "lr": 1.0,
}


JUDGEMENT = Judgement(Calibration())
OUTCOME = Outcome("complete", [ROW], ROW, [], 0.0, (0, 0))
FACTS = {"architecture": SMALL, "classes": ["NORMAL", "PNEUMONIA"], "preprocessing": {"size": 32}, "training": {}}


@pytest.fixture
def write(monkeypatch):
    """Write an export in which the function of this name raises an error."""

    def write(name, error):
        def fails(*_, **__):
            raise error

        monkeypatch.setattr(name, fails)
        learn = build_learner(empty_loaders(["NORMAL", "PNEUMONIA"], 32), SMALL)
        learn.dls.one_batch = lambda: (np.zeros((0, 1, 32, 32)), [])
        with reserve("exports", "run") as run:
            run.resumable = True  # keeps the folder after an error
            write_export(run, learn, FACTS | {"status": "complete", "best": ROW}, OUTCOME, JUDGEMENT)

    return write


def left() -> list[str]:
    return [path.name for path in Path("exports/.run.partial").iterdir() if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "error", "text"),
    [
        ("plot_curves", OSError(28, "No space left on device"), "No space left on device"),
        ("plot_curves", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "completely"),
    ],
)
def test_an_error_of_writing_says_what_to_do(step, error, text, write):
    with pytest.raises(UserError, match=rf"exports/run: the export could not be written \(.*{text}\); free space"):
        write(f"{MODULE}.{step}", error)
    assert left() == []


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("tensors of two devices"), KeyError("best"), TypeError("no JSON")])
def test_a_bug_stays_a_bug(error, write):
    with pytest.raises(type(error)) as caught:
        write(f"{MODULE}.plot_curves", error)
    assert caught.value is error and left() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (OSError(28, "No space left on device"), UserError, "exports/run: the export could not be written"),
        (KeyError("best"), KeyError, "best"),
    ],
)
def test_an_error_in_the_report_of_an_export_that_is_being_written(error, expected, text, write, monkeypatch):
    """`write_report` words its errors for an export that was given to it."""
    monkeypatch.setattr(f"{MODULE}.plot_batch", lambda *_: None)
    monkeypatch.setattr(f"{MODULE}.plot_curves", lambda *_: None)
    name = "atomic_write" if isinstance(error, OSError) else "_context"
    monkeypatch.setattr("xray_fastai.evaluation.report._context", lambda *_: {})
    monkeypatch.setattr("xray_fastai.evaluation.report._render", lambda _: "")
    with pytest.raises(expected, match=text):
        write(f"xray_fastai.evaluation.report.{name}", error)
    assert left() == []


@pytest.mark.slow
def test_the_command_line_reports_a_bug_as_a_bug(collection, run, monkeypatch):
    def fails(*_):
        raise RuntimeError("tensors of two devices")

    monkeypatch.setattr(f"{MODULE}.plot_curves", fails)
    result = run("fit", "--data", collection, *QUICK, "--weights", "none", "--epochs", 1, "--name", "bug")
    assert result.exit_code == 1
    assert "unexpected RuntimeError: tensors of two devices. This is a bug" in result.stderr
    assert "free space" not in result.output
