"""What `xray-fastai` alone says of the folder that it is in, and the line at the end of a command."""

import shutil
from pathlib import Path

from tests.export.test_runs import exports  # noqa: F401


def commands(text):
    return [line.strip().removeprefix("xray-fastai ") for line in text.splitlines()[1:] if line.startswith("  xray")]


def test_an_empty_folder(run):
    result = run()
    assert result.exit_code == 0 and result.stdout.startswith("No images and no export here. Next:\n")
    assert commands(result.stdout) == ["fit --epochs 3", "data download", "data check FOLDER"]
    assert max(map(len, result.stdout.splitlines())) <= 72


def test_a_folder_with_images(run):
    Path("my images/Train").mkdir(parents=True)
    small = "--arch resnet18 --size 64 --epochs 3"
    assert commands(run().stdout) == [
        "data check 'my images'", f"fit 'my images' {small}", "fit 'my images'",
    ]  # fmt: skip
    Path("chest_xray/train").mkdir(parents=True)
    assert commands(run().stdout)[-1] == "fit chest_xray"
    Path("train").mkdir()
    assert run().stdout.startswith("Images in this folder. Next:")
    assert commands(run().stdout)[-1] == "fit ."


def test_a_folder_with_exports(run, exports):  # noqa: F811
    assert run().stdout.startswith("Export: exports/last (the newest in ./exports). Next:\n")
    shutil.rmtree("exports/last/evaluation-test", ignore_errors=True)
    assert commands(run().stdout) == ["evaluate", "interpret", "predict IMAGE_OR_FOLDER"]
    Path("exports/last/evaluation-test").mkdir()
    assert commands(run().stdout) == ["interpret", "predict IMAGE_OR_FOLDER", "serve --open"]
    checkpoint = exports / ".stopped.partial" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "settings.json").write_text("{}")
    assert commands(run().stdout)[0] == "fit --resume stopped"
    run("default", "exports/first")
    assert "exports/first (the default)" in run().stdout
    shutil.rmtree("exports/first")
    gone = run()
    assert gone.exit_code == 0 and gone.stdout.startswith("the default export exports/first is gone")


def test_the_next_command_is_the_last_line_and_not_beside_json(run, exports, monkeypatch):  # noqa: F811
    class Result:
        path = Path("exports/last/evaluation-test")

        def to_json(self):
            return "{}"

        def __str__(self):
            return "result"

    monkeypatch.setattr("xray_fastai.evaluation.evaluate.evaluate", lambda *args, **kwargs: Result())
    assert run("evaluate").stdout.splitlines() == [
        "model         exports/last (the newest in ./exports)", "result",
        "next: xray-fastai interpret exports/last --split test",
    ]  # fmt: skip
    assert run("evaluate", "exports/first", "--data", "a b").stdout.splitlines() == [
        "result", "next: xray-fastai interpret exports/first --data 'a b' --split test",
    ]  # fmt: skip
    assert run("evaluate", "--json").stdout == "{}\n"
