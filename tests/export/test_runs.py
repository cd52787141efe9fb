"""The default export, and the list of runs; neither needs torch."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.cli.test_start import imports_none_of
from tests.export.test_old_exports import OLD
from xray_fastai.data.folders import lacks_test
from xray_fastai.export.reader import default_export, find_export, set_default
from xray_fastai.export.runs import Auc, differing_settings, list_runs
from xray_fastai.system.errors import UserError


@pytest.fixture
def exports(tmp_path, monkeypatch):
    """Three exports, of which `last` is the newest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XRAY_FASTAI_MODEL", raising=False)
    with zipfile.ZipFile(OLD / "export.zip") as archive:
        archive.extractall(tmp_path)
    for i, name in enumerate(("first", "second", "last")):
        folder = Path(shutil.copytree(tmp_path / "export-0.1.0", tmp_path / "exports" / name))
        change(folder, created=f"2026-11-2{i}T10:00:00+00:00")
        os.utime(folder / "model.json", (i, i))
    return Path("exports")


def change(folder, **values):
    file = folder / "model.json"
    times = file.stat()
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    os.utime(file, (times.st_atime, times.st_mtime))


def test_a_chosen_export_comes_before_the_newest_and_the_variable_before_it(exports, monkeypatch):
    assert default_export() == (exports / "last", "the newest in ./exports")
    set_default("exports/first")
    assert default_export() == (exports / "first", "the default")
    assert find_export() == exports / "first"
    monkeypatch.setenv("XRAY_FASTAI_MODEL", "exports/second/model.json")
    assert default_export() == (exports / "second", "by XRAY_FASTAI_MODEL")
    assert find_export() == exports / "second"
    assert find_export("exports/last") == exports / "last"
    monkeypatch.delenv("XRAY_FASTAI_MODEL")
    set_default(None), set_default(None)  # the second time there is none
    assert find_export() == exports / "last"


def test_the_choice_moves_with_the_folder_and_may_lie_elsewhere(exports, tmp_path):
    set_default("exports/first")
    exports.rename("models")
    assert default_export("models")[0] == Path("models/first")
    set_default("export-0.1.0", "models")
    assert default_export("models")[0] == tmp_path / "export-0.1.0"


def test_a_choice_that_is_gone_is_one_line(exports, monkeypatch):
    set_default("exports/first")
    (exports / "first").rename("elsewhere")
    with pytest.raises(UserError, match=r"^the default export exports/first is gone or incomplete; choose another by"):
        find_export()
    with pytest.raises(UserError, match=r"^nowhere: not an export"):
        set_default("nowhere")
    monkeypatch.setenv("XRAY_FASTAI_MODEL", "nowhere")
    with pytest.raises(UserError, match=r"^the environment variable XRAY_FASTAI_MODEL names nowhere: not an export"):
        find_export()


def test_each_run_has_a_row(exports):
    set_default("exports/second")
    change(exports / "last", worst_group={"name": "darkest", "images": 20, "roc_auc": 0.7, "low": 0.5, "high": 0.9})
    result = {"roc_auc": {"value": 0.9, "low": 0.8, "high": 0.95}}
    worst = {"name": "sharpest", "images": 9, "roc_auc": 0.6, "low": 0.5, "high": 0.7}
    (exports / "first" / "evaluation-test").mkdir(exist_ok=True)
    file = exports / "first" / "evaluation-test" / "metrics.json"
    file.write_text(json.dumps({"metrics": result, "worst_group": worst}))
    (exports / ".crash.partial" / "checkpoint").mkdir(parents=True)
    (exports / ".crash.partial" / "checkpoint" / "settings.json").write_text("{}")
    shutil.copytree(exports / "last", exports / "no-weights").joinpath("model.safetensors").unlink()
    shutil.copytree(exports / "last", exports / "damaged").joinpath("model.json").write_text("{")
    (exports / "no-run").mkdir()

    runs = {run.name: run for run in list_runs(exports)}
    assert list(runs)[:4] == ["crash", "last", "second", "first"]  # the newest first, those without a date last
    assert {run.name: run.status for run in runs.values()} == {
        "crash": "unfinished", "last": "complete", "second": "complete", "first": "complete", "no-weights": "broken",
        "damaged": "broken",
    }  # fmt: skip
    assert [run.name for run in runs.values() if run.default] == ["second"]
    assert runs["first"].test == Auc(0.9, 0.8, 0.95)
    assert (runs["first"].worst_group, runs["first"].worst) == ("sharpest", Auc(0.6, 0.5, 0.7))
    assert (runs["last"].worst_group, runs["last"].test) == ("darkest", None)
    assert (runs["last"].data, runs["last"].images, runs["last"].network) == ("built-in phantom", 510, "resnet18 32")
    assert (runs["last"].valid_images, runs["last"].out_of_fold) == (102, False)
    assert runs["last"].valid.low is None and 0 < runs["last"].valid.value < 1
    assert "model.safetensors is missing" in runs["no-weights"].fault and "model.json" in runs["damaged"].fault
    assert runs["crash"].fault == "xray-fastai fit --resume crash"
    assert next(run.name for run in list_runs(exports, "test")) == "first"
    assert [run.name for run in list_runs(exports, "name")] == sorted(runs)


def test_a_damaged_evaluation_is_left_out(exports):
    (exports / "first" / "evaluation-test").mkdir(exist_ok=True)
    for text in ("{", "[]", '{"metrics": {"roc_auc": {"value": "x"}}}', '{"metrics": {"roc_auc": {"value": null}}}'):
        (exports / "first" / "evaluation-test" / "metrics.json").write_text(text)
        assert {run.name: run.test for run in list_runs(exports)}["first"] is None


def test_no_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no-folder: No such file or directory; make an export by 'xray-fastai fit'"):
        list_runs(tmp_path / "no-folder")


def test_settings_in_which_two_differ(exports):
    settings = json.loads((exports / "first" / "model.json").read_text())["settings"]
    change(exports / "second", settings=settings | {"lr": 0.5, "name": "other"})
    assert differing_settings("exports/first", "exports/second") == {"lr": (settings["lr"], 0.5)}
    assert differing_settings("exports/first", "exports/last") == {}


def test_the_commands(exports, run, refused, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (exports / "second" / "model.json").write_text("{")
    os.utime(exports / "second" / "model.json", (0, 0))
    assert run("default").stdout == "exports/last (the newest in ./exports)\n"
    chosen = run("default", "exports/first").stdout
    assert chosen == "exports/first (the default)\nnext: xray-fastai predict IMAGE_OR_FOLDER\n"
    refused(run("default", "nowhere"), "nowhere: not an export")
    table = run("runs", "--sort", "name")
    assert table.exit_code == 0 and max(map(len, table.stdout.splitlines()[:-1])) <= 80
    heads = [line.split()[0] for line in table.stdout.splitlines() if line[:1].isalpha()]
    assert [head for head in heads if head in ("first", "last", "second", "second:")] == [
        "first", "last", "second", "second:",
    ]  # fmt: skip
    assert table.stdout.count("default") == 1
    monkeypatch.setenv("COLUMNS", "40")
    narrow = run("runs").stdout
    assert max(map(len, narrow.splitlines()[:-1])) <= 40 and "  valid AUC: 0." in narrow
    listed = json.loads(run("runs", "--json").stdout)
    assert {row["name"]: row["status"] for row in listed}["second"] == "broken"
    assert run("runs", "exports/first", "exports/last").stdout == (
        "the settings are the same\nnext: xray-fastai compare exports/first exports/last\n"
    )
    assert json.loads(run("runs", "exports/first", "exports/last", "--json").stdout) == {}
    change(
        exports / "last",
        architecture="resnet18",
        settings=json.loads((exports / "first" / "model.json").read_text())["settings"] | {"batch_size": 7},
    )
    assert "--batch-size" in run("runs", "exports/first", "exports/last").stdout
    for name in ("first", "exports/first"):
        shown = run("runs", name).stdout
        assert shown.startswith("export        exports/first, the default\n") and "batch_size" in shown
        assert "held out" in shown and shown.splitlines()[-1].startswith("next: xray-fastai evaluate exports/first")
    one = json.loads(run("runs", "first", "--json").stdout)
    assert one["name"] == "first" and one["settings"]["size"] == 32
    refused(run("runs", "nowhere"), "nowhere: not an export")
    assert run("runs", "first", "last", "second").exit_code == 2
    assert run("default", "exports/first", "--clear").exit_code == 2
    assert run("default", "--clear").stdout == "exports/last (the newest in ./exports)\n"
    refused(run("runs", "--exports", "nowhere"), "nowhere: No such file")


@pytest.mark.slow
def test_without_test_images_the_next_step_is_not_to_evaluate(exports, run):
    settings = json.loads((exports / "first" / "model.json").read_text())["settings"]
    for splits, step in ((["train"], "interpret"), (["train", "Test"], "evaluate")):
        for split in splits:
            Path("images", split, "NORMAL").mkdir(parents=True, exist_ok=True)
        change(exports / "first", settings=settings | {"data": "images"})
        assert run("runs", "first").stdout.splitlines()[-1] == f"next: xray-fastai {step} exports/first"
    assert not lacks_test("gone") and not lacks_test("table.csv") and not lacks_test(None)


def test_a_report_is_written_again(exports, run, tmp_path):
    (exports / "last" / "report.html").unlink(missing_ok=True)
    lines = run("report").stdout.splitlines()
    assert lines == ["model         exports/last (the newest in ./exports)", "report        exports/last/report.html"]
    assert "exports/last" in (exports / "last" / "report.html").read_text()
    assert run("report", "exports/first", "--output", tmp_path / "o").exit_code == 0
    assert "exports/first" in (tmp_path / "o" / "report.html").read_text()


@pytest.mark.slow
def test_no_torch_is_imported(exports):
    for command in ('xray("runs")', 'xray("runs", "exports/first", "exports/last")', 'xray("default")'):
        imports_none_of(["torch", "fastai", "matplotlib", "pandas"], command)
    imports_none_of(["torch", "fastai"], 'xray("report")')
