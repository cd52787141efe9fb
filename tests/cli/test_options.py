"""The options of `fit` and `predict`: the command line, Python and the export take them from one dataclass."""

import inspect
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import get_args

import pytest
import typer
import typer.main
from typer.testing import CliRunner

import xray_fastai
from xray_fastai import FitConfig
from xray_fastai.cli import evaluation, inference
from xray_fastai.cli.command import Command
from xray_fastai.cli.inference import predict
from xray_fastai.cli.main import app
from xray_fastai.cli.options import settings_from
from xray_fastai.cli.training import fit
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.config.setting import setting, setting_of
from xray_fastai.export.schema import Settings
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import as_typed

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize(("function", "config"), [(fit, FitConfig), (predict, PredictConfig)])
def test_a_command_has_one_option_for_each_field(function, config):
    own = {"fit": {"ctx", "folder", "resume", "open"}, "predict": {"paths", "model"}}[function.__name__]
    parameters = {name: p.default for name, p in inspect.signature(function).parameters.items() if name not in own}
    assert parameters == {field.name: field.default for field in fields(config)}
    options = {param.name: param for param in COMMANDS[function.__name__].params}
    for field in fields(config):
        assert options[field.name].opts == [f"--{field.name.replace('_', '-')}"]
        assert options[field.name].help == as_typed(setting_of(field).help, {})
        assert options[field.name].default == field.default


def other_values(config, *without):
    """Return a value for each field but one that is not its default, and the command line that gives these values."""
    texts = {
        "output": "text.csv",
        "valid": "0.2",
        "class_weights": "1,2",
        "weights_range": "-1,1",
        "column": "label=text",
        "time_limit": "2h",
        "log": "tensorboard",
        "members": 3,
    }
    by_type = {bool: None, int: 40, float: 0.25, str: "text"}
    values, args = {}, []
    wanted = [field for field in fields(config) if field.name not in without]
    for field in wanted:
        kind = next(kind for kind in by_type if kind in (field.type, *get_args(field.type)))
        option = f"--{field.name.replace('_', '-')}"
        if kind is bool:
            values[field.name] = not field.default
            args.append(option.replace("--", "--no-") if field.default else option)
        else:
            choices = setting_of(field).choices
            value = choices[-1] if choices else texts.get(field.name, by_type[kind])
            values[field.name] = value
            args += [option, value]
    assert not [field.name for field in wanted if values[field.name] == field.default]
    return values, args


@pytest.fixture
def calls(monkeypatch):
    """Replace what `fit` and `predict` call by a function that notes its arguments."""
    calls = []

    def replace(function, result):
        monkeypatch.setattr(function, lambda *args, **kwargs: calls.append((args, kwargs)) or result)

    monkeypatch.setattr("xray_fastai.training.inputs.check_paths", lambda config: None)
    monkeypatch.setattr(inference, "_check_images", lambda paths: None)
    monkeypatch.setattr(inference, "check_export", lambda path: None)
    monkeypatch.setattr(inference, "check_paths", lambda paths, config: None)
    replace("xray_fastai.training.fit.fit", SimpleNamespace(error=None, signal=None))
    replace("xray_fastai.inference.predict_files.predict_command", 2)  # unreadable files
    return calls


def test_every_option_reaches_the_fit(run, calls):
    values, args = other_values(FitConfig)
    assert run("fit", *args).exit_code == 0
    assert calls == [((FitConfig(**values),), {})]


def test_a_file_name_of_any_bytes_is_taken(run, calls):
    run("predict", "a", "--output", "a\udcff.csv")
    assert calls[0][0][2].output == "a\udcff.csv"


def test_the_command_runs_without_any_option(run, calls):
    result = run("fit")
    assert result.exit_code == 0, result.output
    assert calls == [((FitConfig(),), {})]


def test_the_learning_rate_is_a_number_or_find(run, calls, refused):
    for text, value in (("2e-3", 2e-3), ("find", "find"), ("Find", "find"), ("FIND", "find")):
        assert run("fit", "--lr", text).exit_code == 0
        assert calls.pop() == ((FitConfig(lr=value),), {})
    for text in ("foo", "finde", ""):
        result = run("fit", "--lr", text)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1] == f"Error: --lr {text}: give a number, or find"
    for text in ("0", "-1", "20", "nan"):
        refused(run("fit", "--lr", text), f"--lr {text}: give a number that is above 0 and below 10, or find", code=2)
    assert "did you mean --lr find?" in run("fit", "--lr-find").stderr


def test_a_resumed_fit_gets_only_the_options_that_were_given(run, calls):
    run("fit", "--resume", "--no-cache", "--epochs", FitConfig.epochs)
    run("fit", "--workers", 0, "--resume", "small")
    assert calls == [
        ((), {"resume": True, "cache": False, "epochs": FitConfig.epochs}),
        ((), {"resume": "small", "workers": 0}),
    ]


@pytest.mark.parametrize("without", [("prevalence", "append"), ("uncalibrated", "resume")])  # they exclude each other
def test_every_option_reaches_the_prediction(without, run, calls):
    values, args = other_values(PredictConfig, *without)
    result = run("predict", "a", "-", *args)
    assert calls == [((["a", "-"], None, PredictConfig(**values)), {})]
    assert result.exit_code == 3  # for the unreadable files


@pytest.mark.parametrize("name", ["evaluate", "interpret"])
def test_a_command_and_its_function_have_the_same_defaults(name):
    command, function = (inspect.signature(getattr(home, name)).parameters for home in (evaluation, xray_fastai))
    assert set(function) <= set(command)
    for parameter in function.values():
        assert command[parameter.name].default == parameter.default, parameter


def test_predict_has_the_same_defaults_in_python():
    parameters = inspect.signature(xray_fastai.predict).parameters
    for field in fields(PredictConfig):
        assert field.name not in parameters or parameters[field.name].default == field.default, field.name


def test_the_export_has_one_entry_for_each_field():
    assert set(Settings.model_fields) == {field.name for field in fields(FitConfig)}


def test_a_new_option_needs_one_new_field():
    @dataclass(frozen=True)
    class WithMixup(FitConfig):
        mixup: float = setting(0.4, "Strength of mixup.", min=0, max=1)
        swap: bool = setting(True, "Swap the classes.")

    app = typer.Typer()

    @app.command(cls=Command)
    @settings_from(WithMixup)
    def fit(**settings):
        print(WithMixup(**settings))

    def run(*args):
        return CliRunner().invoke(app, args)

    assert "mixup=0.4, swap=True)" in run().output
    assert "epochs=3" in run("--epochs", "3", "--mixup", "0.2", "--no-swap").output
    assert "mixup=0.2, swap=False)" in run("--mixup", "0.2", "--no-swap").output
    assert "Strength of mixup." in run("--help").output
    assert run("--mixup", "2").exit_code == 2
    with pytest.raises(UserError, match=r"^mixup 2: give a number from 0 to 1$"):
        WithMixup(mixup=2)


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (FitConfig, {"epochs": 0}, "epochs 0: give 1 or more"),
        (FitConfig, {"epochs": 2.5}, "epochs 2.5: give a value of type int"),
        (FitConfig, {"epochs": True}, "epochs True: give a value of type int"),
        (FitConfig, {"data": 3}, "data 3: give text"),
        (FitConfig, {"size": 5000}, "size 5000: give a number from 32 to 4096"),
        (FitConfig, {"lr": 0}, "lr 0: give a number that is above 0 and below 10, or find"),
        (FitConfig, {"lr": "foo"}, "lr foo: give a value of type float, or find"),
        (FitConfig, {"lr": float("nan")}, "lr nan: give a number that is above 0 and below 10"),
        (FitConfig, {"dropout": 1}, "dropout 1: give a number that is at least 0 and below 1"),
        (FitConfig, {"target_sensitivity": 1.5}, "target_sensitivity 1.5: give a number that is above 0 and at most 1"),
        (FitConfig, {"seed": 2**32}, "seed 4294967296: give a number that is at least 0 and below 4294967296"),
        (FitConfig, {"device": "tpu"}, "device tpu: choose one of auto, cpu, cuda, mps"),
        (FitConfig, {"valid": "0.9"}, "valid 0.9: give auto, folder, a fraction from 0.02 to 0.5, or group:NAME"),
        (FitConfig, {"column": "Finding"}, "column Finding: give NAME=HEADER, as in label=Finding"),
        (FitConfig, {"valid": "group:"}, "valid group:: give auto, folder"),
        (FitConfig, {"class_weights": "1,inf"}, "class_weights 1,inf: give balanced, none, or numbers above 0"),
        (FitConfig, {"class_weights": "3:1:1"}, "class_weights 3:1:1: give balanced, none, or numbers above 0"),
        (FitConfig, {"class_weights": "A=1,2"}, "class_weights A=1,2: give balanced, none, or numbers above 0"),
        (FitConfig, {"patient_pattern": "("}, "patient_pattern (: not a regular expression: missing )"),
        (FitConfig, {"name": ".x"}, "name .x: use letters, digits"),
        (FitConfig, {"weights": "a\x1b"}, r"weights a\x1b: holds the unprintable character '\x1b'; give another text"),
        (PredictConfig, {"threshold": 2}, "threshold 2: give a number from 0 to 1"),
        (PredictConfig, {"precision": "fp16"}, "precision fp16: choose one of auto, fp32, bf16"),
        (PredictConfig, {"batch_size": 0}, "batch_size 0: give 1 or more"),
        (PredictConfig, {"resume": True}, "resume: give the file to continue by output="),
    ],
)
def test_a_wrong_value_is_refused_by_name(config, wrong, message):
    with pytest.raises(UserError) as error:
        config(**wrong)
    assert str(error.value).startswith(message)


def test_every_limit_itself_is_allowed():
    for field in fields(FitConfig):
        setting = setting_of(field)
        for value in [*setting.choices, setting.min, setting.max]:
            assert value is None or getattr(FitConfig(**{field.name: value}), field.name) == value


@pytest.mark.parametrize(
    ("text", "classes", "weights"),
    [
        (None, ["NORMAL", "PNEUMONIA"], None),
        ("balanced", ["NORMAL", "PNEUMONIA"], None),
        ("none", ["NORMAL", "PNEUMONIA"], None),
        ("3,1", ["NORMAL", "PNEUMONIA"], [3, 1]),
        ("1.5, 2", ["NORMAL", "PNEUMONIA"], [1.5, 2]),
        ("NORMAL=3,PNEUMONIA=1", ["NORMAL", "PNEUMONIA"], [3, 1]),
        ("NORMAL=3, ABNORMAL=1", ["ABNORMAL", "NORMAL"], [1, 3]),
        ("a=b=2,c=1,d=5", ["a=b", "c", "d"], [2, 1, 5]),
    ],
)
def test_class_weights_as_numbers(text, classes, weights):
    assert FitConfig(class_weights=text).class_weight_list(classes) == weights


def test_the_other_class_and_the_one_to_detect_have_weights_whatever_the_alphabet_says():
    config = FitConfig(recipe="plain").with_recipe()
    for classes, positive, weights in (
        (["NORMAL", "PNEUMONIA"], "PNEUMONIA", "3,1"),
        (["ABNORMAL", "NORMAL"], "ABNORMAL", "1,3"),
        (["NORMAL", "PNEUMONIA"], "NORMAL", "1,3"),
    ):
        assert config.with_weights_of(classes, positive).class_weights == weights
    with pytest.raises(UserError, match=r"^class_weights 3:1: for two classes; here give one for each of A, B, C"):
        config.with_weights_of(["A", "B", "C"], None)


def test_a_recipe_gives_values_only_where_there_are_none():
    assert FitConfig(recipe="plain", augment="light").with_recipe() == FitConfig(
        recipe="plain", contrast="none", augment="light", schedule="constant", class_weights="3:1"
    )


def test_an_error_names_the_option_as_it_is_typed(run, refused, export):
    """`--class` is the parameter `label`; the folder of `data check` is not an option, and is not named as one."""
    assert COMMANDS["interpret"].option_names()["label"] == "--class"
    assert COMMANDS["fit"].option_names()["cache"] == "--cache"
    refused(run("interpret", "--model", export, "--data", export.parent / "moved", "--class", "FLU"), "--class FLU: ")
    assert "--data" not in run("data", "check", "nowhere").stderr


def test_the_home_folder_in_paths(run, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = FitConfig(data="~/x", weights="~/w.pth")
    assert (config.data, config.weights) == (f"{tmp_path}/x", f"{tmp_path}/w.pth")
    refused(run("fit", "--data=~/x"), f"--data {tmp_path}/x: no such folder")
    refused(run("evaluate", "--model=~/x"), f"{tmp_path}/x: not an export")
    refused(run("evaluate", "--model=x~/x"), "x~/x: not an export")


def test_memory_that_runs_out_is_one_line(run, refused, an_image, export, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("xray_fastai.inference.predict_files.predict_command", fail)
    refused(run("predict", an_image, "--model", export), "out of memory; lower --batch-size, or close other programs")


@pytest.mark.parametrize("command", ["evaluate", "interpret", "recalibrate", "serve", "verify", "export"])
def test_an_export_is_an_argument_and_an_option(command, run, refused):
    refused(run(command, "none"), "none: no")
    refused(run(command, "--model", "none"), "none: no")
    result = run(command, "a", "--model", "b")
    assert (result.exit_code, result.stderr) == (2, "Error: --model b: a is given, too; leave one of them out\n")


def test_the_data_are_an_argument_and_an_option(run, calls):
    assert run("fit", "folder", "--epochs", 3).exit_code == 0
    assert run("fit", "--resume", "--data", "folder").exit_code == 0
    assert run("fit", "folder", "--resume").exit_code == 0
    resumed = ((), {"resume": True, "data": "folder"})
    assert calls == [((FitConfig(data="folder", epochs=3),), {}), resumed, resumed]
    result = run("fit", "a", "--data", "b")
    assert (result.exit_code, result.stderr) == (2, "Error: --data b: a is given, too; leave one of them out\n")


def test_a_terminal_without_unicode(start, export, tmp_path):
    (tmp_path / "\u0141\u00f3d\u017a.jpeg").write_bytes(b"broken")
    for encoding in ("ascii", "cp1252"):
        process = start("predict", tmp_path, "--model", export, env={"PYTHONIOENCODING": encoding}, encoding=encoding)
        output, errors = process.communicate()
        assert process.returncode == 3 and "\\u0141" in output and "bug" not in errors, errors
