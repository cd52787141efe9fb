"""`predict --append` adds what is new, whatever the order, and loses nothing when the job is killed."""

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import wait_for
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.inference import predict_files
from xray_fastai.inference.facts import options_of
from xray_fastai.inference.predict import predict
from xray_fastai.inference.row_file import RowFile
from xray_fastai.system.files import sha256

NEW = ["sha256", "model", "model_sha256", "options", "predicted_at"]


def read(path="night.csv"):
    return pd.read_csv(path) if Path(path).suffix == ".csv" else pd.read_json(path, lines=True)


@pytest.fixture
def inbox(files):
    """An inbox of three images, in folders of studies."""
    for number, name in enumerate(["2/b.jpeg", "2/c.jpeg", "3/a.jpeg"]):
        place(files[number], name)
    return Path("inbox")


def place(file, name):
    target = Path("inbox") / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, target)
    return target


@pytest.fixture
def night(says):
    """Run the nightly job."""
    return lambda *options, output="night.csv": says("inbox", "--recursive", "--output", output, "--append", *options)


@pytest.mark.parametrize("output", ["night.csv", "night.jsonl"])
def test_what_is_new_is_added_whatever_its_order(output, night, inbox, files, model, export):
    result = night(output=output)
    assert result.exit_code == 0, result.output
    first = read(output)
    before = Path(output).read_bytes()
    place(files[20], "1/before all others.jpeg")
    place(files[21], "2/bb.jpeg")
    result = night(output=output)
    assert result.exit_code == 0 and "known         3 files with a row" in result.stdout
    rows = read(output)
    assert Path(output).read_bytes().startswith(before)
    assert rows.path.tolist() == [*first.path, "inbox/1/before all others.jpeg", "inbox/2/bb.jpeg"]
    assert rows.columns.tolist()[-5:] == NEW
    assert rows.sha256.tolist() == [sha256(Path(path)) for path in rows.path]
    assert set(rows.model) == {export.resolve().name} and set(rows.model_sha256) == {sha256(export / "model.json")}
    assert rows.options.isna().all() and (pd.to_datetime(rows.predicted_at).dt.tz is not None)
    pd.testing.assert_frame_equal(
        rows[["path", "prediction", "p_NORMAL"]],
        predict(rows.path.tolist(), model)[["path", "prediction", "p_NORMAL"]],
        check_dtype=False, atol=1e-5,
    )  # fmt: skip


def test_nothing_new_and_an_empty_inbox_are_success(night, says, inbox):
    assert night().exit_code == 0
    before = Path("night.csv").read_bytes()
    result = night()
    assert result.exit_code == 0 and "0 files in" in result.stdout and Path("night.csv").read_bytes() == before
    shutil.rmtree(inbox)
    for folder in (inbox, inbox / "2"):
        folder.mkdir()
        assert night().exit_code == 0 and night(output="empty.csv").exit_code == 0
    assert Path("night.csv").read_bytes() == before and len(read("empty.csv")) == 0
    assert says("inbox", "--output", "other.csv").exit_code == 1  # without --append it is a mistake


def test_errors_are_tried_again_and_replaced(night, inbox, files):
    whole = Path(files[5]).read_bytes()
    being_written = inbox / "1.jpeg"
    being_written.write_bytes(whole[:500])
    (inbox / "never.jpeg").write_text("no image")
    result = night()
    assert result.exit_code == 3 and "Error: 2 of 5 files could not be read" in result.stderr
    assert read().error.notna().sum() == 2
    being_written.write_bytes(whole)
    result = night()
    assert result.exit_code == 3 and "Error: 1 of 2 files could not be read" in result.stderr
    rows = read()
    assert sorted(rows.path) == sorted(map(str, inbox.rglob("*.jpeg")))
    assert rows.path[rows.error.notna()].tolist() == ["inbox/never.jpeg"]
    os.remove(inbox / "never.jpeg")
    assert night().exit_code == 0 and len(read()) == 5  # the error of a file that is gone stays


def test_a_changed_file_gets_a_new_row(night, inbox, files):
    night()
    place(files[30], "2/b.jpeg")
    assert night().exit_code == 0
    rows = read()
    assert rows.path.tolist() == ["inbox/2/b.jpeg", "inbox/2/c.jpeg", "inbox/3/a.jpeg", "inbox/2/b.jpeg"]
    assert rows.sha256[3] == sha256(inbox / "2/b.jpeg") != rows.sha256[0]
    place(files[0], "2/b.jpeg")  # as it was
    assert night().exit_code == 0 and len(read()) == 4


def test_one_file_named_twice_has_one_row(says, files):
    assert says(files[0], files[1], files[0], "--output", "night.csv", "--append").exit_code == 0
    assert read().path.tolist() == files[:2]


def test_another_model_or_options_are_refused(night, inbox, refused, export, model, monkeypatch, tmp_path):
    night("--threshold", 0.4)
    before = Path("night.csv").read_bytes()
    refused(night(), "--append: night.csv was made with --threshold 0.4, and this is the defaults")
    refused(night("--threshold", 0.4, "--tta"), "this is --threshold 0.4 --tta; give the same options")
    assert night("--threshold", 0.4).exit_code == 0
    other = shutil.copytree(export, tmp_path / "other")
    text = (other / "model.json").read_text()
    (other / "model.json").write_text(text + "\n")
    monkeypatch.setattr(predict_files, "open_model", lambda *args: replace(model, path=other))
    refused(night("--threshold", 0.4), f"rows of the model {export.resolve().name} (sha256", "this is other (sha256")
    assert Path("night.csv").read_bytes() == before


def test_options_as_typed():
    assert options_of(PredictConfig()) == ""
    given = PredictConfig(threshold=0.25, gate=False, abstain=0.1, tta=True, batch_size=3)
    assert options_of(given) == "--threshold 0.25 --no-gate --abstain 0.1 --tta"
    assert options_of(PredictConfig(uncalibrated=True)) == "--uncalibrated"
    assert options_of(PredictConfig(prevalence=1e-5)) == "--prevalence 1e-05"


def test_a_file_without_these_columns_is_refused_in_one_line(night, inbox, says, refused):
    for output in ("night.csv", "night.jsonl"):
        assert says("inbox", "--recursive", "--output", output).exit_code == 0
        before = Path(output).read_bytes()
        refused(night(output=output), f"--append: {output} does not begin", "it lacks sha256, model, model_sha256")
        assert Path(output).read_bytes() == before
    header, _, rest = Path("night.csv").read_text().partition("\n")
    Path("old.csv").write_text(header.replace(",unlike", "") + "\n" + rest)
    refused(says("inbox", "--recursive", "--output", "old.csv", "--resume"), "it lacks unlike, so an earlier version")


def test_two_jobs_at_once(night, inbox, refused):
    night()
    before = Path("night.csv").read_bytes()
    with RowFile("night.csv", {"path": str}, resume=True):
        refused(night(), "--output night.csv: another predict is writing it")
    assert Path("night.csv").read_bytes() == before and night().exit_code == 0


def test_a_half_row_is_deleted(night, inbox, files):
    night()
    whole = Path("night.csv").read_bytes()
    place(files[9], "9.jpeg")
    for end in (len(whole) - 1, len(whole) - 30, 7):
        Path("night.csv").write_bytes(whole[:end])
        assert night().exit_code == 0
        rows = read()
        assert sorted(rows.path) == ["inbox/2/b.jpeg", "inbox/2/c.jpeg", "inbox/3/a.jpeg", "inbox/9.jpeg"]


def test_a_run_that_ends_before_errors_are_deleted(night, inbox, files, monkeypatch):
    (inbox / "1.jpeg").write_text("no image")
    night()
    place(files[9], "1.jpeg")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "delete", stopped)
        assert night().exit_code == 130
    rows = read()
    assert rows.path.tolist().count("inbox/1.jpeg") == 2  # both are there
    os.remove(inbox / "1.jpeg")
    assert night().exit_code == 0
    rows = read()
    assert rows.path.tolist().count("inbox/1.jpeg") == 1 and rows.error.isna().all()


@pytest.mark.slow
def test_a_job_that_is_killed_loses_nothing(start, night, inbox, export, files, says):
    place(files[0], "0.jpeg").write_text("no image")
    night()
    for number, file in enumerate(files):
        place(file, f"4/{number}.jpeg")
    place(files[0], "0.jpeg")
    before = len(read())
    process = start(
        "predict", "-", "--output", "night.csv", "--append", "--model", export, "--device", "cpu", "--precision",
        "fp32", "--batch-size", 2, stdin=-1,
    )  # fmt: skip
    process.stdin.write("\n".join(["inbox/0.jpeg", *(f"inbox/4/{n}.jpeg" for n in range(40))]) + "\n")
    process.stdin.flush()  # and it waits for more
    wait_for(lambda: len(Path("night.csv").read_bytes().splitlines()) > before + 4, process)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    process.stdin.detach()
    kept = read()
    assert before + 3 < len(kept) < before + 42 and kept.predicted_at.notna().all()
    result = night()
    assert result.exit_code == 0, result.output
    rows = read()
    assert len(rows) == 44 and rows.path.is_unique and rows.error.isna().all()
    kept = kept[kept.error.isna()]
    assert len(rows.merge(kept, on=["path", "sha256", "p_NORMAL", "predicted_at"])) == len(kept)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_no_success(night, inbox):
    (inbox / "2").chmod(0)
    assert night().exit_code == 3
    (inbox / "2").chmod(0o700)


def test_python_gives_the_columns_on_request(model, files):
    table = predict(files[:3], model, provenance=True)
    assert table.columns.tolist()[-5:] == NEW
    assert table.sha256.tolist() == [sha256(Path(path)) for path in files[:3]]
