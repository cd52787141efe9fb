"""`--help`: panels, defaults, examples, any width; what is typed wrong is answered by what was meant."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
import typer.main

from xray_fastai.cli.command import options_of
from xray_fastai.cli.examples import EXAMPLES
from xray_fastai.cli.main import app
from xray_fastai.cli.names import COMMANDS as OTHER_COMMANDS
from xray_fastai.cli.names import OPTIONS as OTHER_OPTIONS
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.config.setting import PANELS, setting_of

ROOT = typer.main.get_command(app)
GROUPS = {name: command for name, command in ROOT.commands.items() if hasattr(command, "commands")}
COMMANDS = {name: command for name, command in ROOT.commands.items() if name not in GROUPS}
COMMANDS |= {f"{name} {sub}": command for name, group in GROUPS.items() for sub, command in group.commands.items()}
PAGES = ["", *GROUPS, *COMMANDS]


@pytest.mark.parametrize("config", [FitConfig, PredictConfig])
def test_each_field_has_a_panel(config):
    assert [field.name for field in fields(config) if setting_of(field).panel not in PANELS] == []


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_page_fits_and_names_each_option(page, width, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    result = run(*page.split(), "--help")
    assert result.exit_code == 0
    text, _, examples = result.stdout.partition("\nExamples\n")
    assert max(map(len, text.splitlines())) <= min(width, 100)
    assert "\x1b" not in text
    assert ("\u256d" in text) == (width >= 60)  # a frame's corner: a narrow page has none
    for option in options_of(COMMANDS.get(page) or GROUPS.get(page) or ROOT):
        assert re.search(rf"{option}\b", text), option
    for _, line in EXAMPLES[page]:
        assert f"\n    {line}\n" in examples  # in one line, to be copied


def test_descriptions_are_whole_and_in_panels(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(run("--help").stdout.replace("\u2502", " ").split())
    for command in ROOT.commands.values():
        assert " ".join(command.help.split("\n\n")[0].split()) in text
    places = [run("fit", "--help").stdout.index(f" {panel} ") for panel in ("Data", "Network", "Training", "Run")]
    assert places == sorted(places)


def test_a_default_is_said_once_at_the_end(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for page in COMMANDS:
        for line in run(*page.split(), "--help").stdout.splitlines():
            assert line.count("[default:") <= 1, line
    text = run("fit", "--help").stdout
    assert "Seed of all random numbers. [default: 42]" in text
    assert "[default: --cache]" in " ".join(text.replace("\u2502", " ").split())


def test_colours_are_for_terminals_only(run, monkeypatch):
    assert "\x1b" not in run("--help").stdout
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    command = COMMANDS["verify"]
    assert "\x1b[" in command.get_help(typer.Context(command, info_name="verify"))


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_are_commands(page):
    assert EXAMPLES[page]
    for _, line in EXAMPLES[page]:
        program, name, *args = shlex.split(line)
        if name in GROUPS:
            name, *args = f"{name} {args[0]}", *args[1:]
        assert program == "xray-fastai"
        COMMANDS[name].make_context(name, args)


def test_other_tools_names_lead_to_options_and_commands_that_exist():
    known = {option for command in [ROOT, *COMMANDS.values()] for option in options_of(command)}
    assert {ours.split()[0] for ours in OTHER_OPTIONS} <= known
    assert set(OTHER_COMMANDS) - known <= set(COMMANDS)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train", "No such command 'train'; did you mean 'xray-fastai fit'?"),
        ("test", "No such command 'test'; did you mean 'xray-fastai evaluate'?"),
        ("evalaute", "No such command 'evalaute'; did you mean 'xray-fastai evaluate'?"),
        ("chek", "No such command 'chek'; did you mean 'xray-fastai data check'?"),
        ("data audit", "No such command 'audit'; did you mean 'xray-fastai data check'?"),
        ("data validate-all", "No such command 'validate-all'; see 'xray-fastai data --help'"),
        ("fit --bs 3", "No such option: --bs; did you mean --batch-size?"),
        ("fit --learning_rate 1", "No such option: --learning_rate; did you mean --lr?"),
        ("fit --gpu", "No such option: --gpu; did you mean --device cuda?"),
        ("fit --model resnet18", "No such option: --model; did you mean --arch?"),
        ("fit --sede 3", "No such option: --sede; did you mean --seed?"),
        ("fit --output x", "No such option: --output; did you mean --exports?"),
        ("predict a --conf 0.3", "No such option: --conf; did you mean --threshold?"),
        ("predict a --imgsz 3", "No such option: --imgsz; see --help"),
        ("--epochs 3", "No such option: --epochs; did you mean fit --epochs?"),
        ("fit epochs=3", "epochs=3: did you mean --epochs 3?"),
        ("fit --epochs three", "--epochs three: give a whole number, 1 or more"),
        ("fit --epochs=2.5", "--epochs 2.5: give a whole number, 1 or more"),
        ("fit --seed 1 --seed x", "--seed x: give a whole number"),
        ("fit --size 20", "--size 20: give a whole number from 32 to 4096"),
        ("fit --lr fast", "--lr fast: give a number, or find"),
        ("fit --device tpu", "--device tpu: choose one of auto, cpu, cuda, mps"),
        ("fit --epochs", "--epochs: give a value"),
        ("serve --port x", "--port x: give a whole number from 0 to 65535"),
        ("export --format tflite", "--format tflite: only onnx is known"),
    ],
)
def test_what_was_meant(command, message, run):
    result = run(*command.split())
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: {message}"


def test_a_folder_or_a_file_in_place_of_a_command(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir(), (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.json").write_text(""), (tmp_path / "a b.jpeg").write_text("")
    assert "did you mean" not in run("data", "images").stderr
    for path, meant in (("images", "fit images"), ("run", "evaluate run"), ("a b.jpeg", "predict 'a b.jpeg'")):
        assert f"; did you mean 'xray-fastai {meant}'?" in run(path).stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "words", [["--version"], ["fit", "--sede", "3"], ["fit", "--epochs", "x"], ["fit", "--data", "no"]]
)
def test_only_help_pays_for_rich(words):
    code = """
import sys
from xray_fastai.cli import app
try:
    app(sys.argv[1:])
except SystemExit:
    pass
sys.exit("rich.console" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True).returncode == 0
    assert subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True).returncode == 1


def test_completion_knows_commands_and_options():
    def completed(words):
        place = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        process = subprocess.run(
            [sys.executable, "-m", "xray_fastai"], capture_output=True, text=True,
            env={"PATH": "", "_XRAY_FASTAI_COMPLETE": "complete_bash", **place},
        )  # fmt: skip
        return process.stdout.split()

    assert completed("xray-fastai ev") == ["evaluate"]
    assert completed("xray-fastai fit --device c") == ["cpu", "cuda"]
    assert completed("xray-fastai fit a b --patience 3 --batch") == ["--batch-size"]
