"""What Python shows of the functions and answers to wrong arguments: signature, help, near names, Python's names."""

import inspect
import io
import pydoc
from contextlib import redirect_stdout
from dataclasses import fields

import pytest
import typer.main

from xray_fastai import FitConfig, check_data, evaluate, fit, interpret, predict, verify
from xray_fastai.cli.main import app
from xray_fastai.config.setting import setting_of
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import as_typed
from xray_fastai.training.fit import OTHER_NAMES


def test_the_signature_of_fit_has_the_options():
    parameters = inspect.signature(fit).parameters
    assert next(iter(parameters)) == "data" and parameters["data"].default is None
    for field in fields(FitConfig)[1:]:
        assert parameters[field.name].default == field.default, field.name
        assert parameters[field.name].annotation == field.type
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]


def test_help_says_what_each_option_does():
    page = pydoc.plain(pydoc.render_doc(fit))
    assert "epochs: int = 100" in page and "**settings" not in page
    text = " ".join(page.replace("|", " ").split())
    for field in fields(FitConfig)[1:]:
        assert f" {field.name}: {' '.join(setting_of(field).help.split())}" in text
    assert "--" not in text.replace("data check --fix", "")


@pytest.mark.parametrize(
    ("name", "function", "of_the_command", "of_python"),
    [
        ("fit", fit, {"folder", "open"}, {"callbacks", "metrics"}),
        ("evaluate", evaluate, {"export", "json", "open"}, set()),
        ("interpret", interpret, {"export", "open"}, set()),
        ("predict", predict, {"output", "resume", "heatmaps"}, set()),
        ("verify", verify, {"export", "model"}, {"path"}),
        ("check", check_data, {"folder", "fix", "json"}, {"data"}),
    ],
)
def test_names_and_defaults_are_those_of_the_command(name, function, of_the_command, of_python):
    """The README lists the exceptions."""
    commands = typer.main.get_command(app).commands
    commands |= commands["data"].commands
    options = {param.name: param for param in commands[name].params}
    arguments = inspect.signature(function).parameters
    assert options.keys() - arguments.keys() == of_the_command and arguments.keys() - options.keys() == of_python
    for key in (options.keys() & arguments.keys()) - {"resume", "paths"}:
        assert options[key].default == arguments[key].default, key
        typed = "class" if key == "label" else key.replace("_", "-")
        assert options[key].opts[0] == f"--{typed}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epoch": 1}, "epoch: no such option; did you mean epochs?"),
        ({"batchsize": 8}, "batchsize: no such option; did you mean batch_size?"),
        ({"item_tfms": []}, f"item_tfms: no such option; {OTHER_NAMES['item_tfms']}"),
        ({"zzz": 1}, "zzz: no such option; fit takes data, resume, "),
        ({"size": (64, 64)}, "size (64, 64): give a value of type int"),
        ({"data": 3}, "data of type int: give a folder, or a FitConfig"),
    ],
)
def test_a_wrong_argument_of_fit_is_answered_in_one_line(wrong, message):
    with pytest.raises(UserError) as error:
        fit(**wrong)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_an_unknown_option_is_also_pythons_error():
    with pytest.raises(TypeError, match="did you mean epochs"):
        fit(epoch=1)


def test_each_other_name_names_options_that_are_there():
    known = inspect.signature(fit).parameters
    for name, advice in OTHER_NAMES.items():
        assert name not in known
        typed = as_typed(advice, {name: f"<{name}>" for name in known})
        assert typed.count("<") == advice.count("="), advice


def test_data_and_settings_are_taken_in_each_form(tmp_path):
    for arguments, options in [
        ((tmp_path / "no",), {}),
        ((), {"data": str(tmp_path / "no")}),
        ((FitConfig(data=str(tmp_path / "no")),), {}),
        ((FitConfig(data=str(tmp_path / "no")),), {"epochs": 2}),
    ]:
        with pytest.raises(UserError, match=f"^data {tmp_path / 'no'}: no such folder"), redirect_stdout(io.StringIO()):
            fit(*arguments, **options)
    with pytest.raises(UserError, match=r"^epochs 0: give 1 or more"):
        fit(FitConfig(data="x"), epochs=0)


def test_the_home_folder_is_expanded(monkeypatch, tmp_path, export):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = FitConfig(data="~/x", weights="~/w.pth", exports="~/e", name="a")
    assert [config.data, config.weights, config.exports] == [str(tmp_path / name) for name in ("x", "w.pth", "e")]
    with pytest.raises(UserError, match=f"^data {tmp_path}/x: no such folder"):
        fit("~/x")
    with pytest.raises(UserError, match=f"^data {tmp_path}/x: no such folder"):
        evaluate(export, "~/x")
    assert predict(["~/a.png"], export).path.tolist() == [str(tmp_path / "a.png")]


def test_an_error_has_the_names_of_the_place_where_it_is_read(export, run, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"to search its subfolders, too, give recursive=True$"):
        predict(tmp_path / "empty", export)
    refused(run("predict", tmp_path / "empty", "--model", export), "too, give --recursive")


def test_every_option_in_a_help_text_is_one(run):
    """The texts name options as Python does, and the command line translates them."""
    for name, command in typer.main.get_command(app).commands.items():
        if name in ("fit", "predict"):
            known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
            for param in command.params:
                for word in (getattr(param, "help", None) or "").replace("data check --fix", "").split():
                    word = word.strip(".,:;()]")
                    assert not word.startswith("--") or word in {*known, "--calibration"}, word
                    assert not word.endswith("="), word
