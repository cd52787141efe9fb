"""Makes a command's options of the fields of `FitConfig` or `PredictConfig`."""

import inspect
import re
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any, TypeVar

import typer

from xray_fastai.cli.command import WrongValue
from xray_fastai.config.setting import setting_of
from xray_fastai.system.text import as_typed

Function = TypeVar("Function", bound=Callable[..., Any])


def settings_from(config: type) -> Callable[[Function], Function]:
    """Replace `**settings` in a command's signature by one option for each field of `config`.

    typer reads the signature. `--help` lists the options after the positional and before the keyword-only parameters.
    """

    def decorate(function: Function) -> Function:
        before, after = [], []
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                after.append(parameter)
            elif parameter.kind is not parameter.VAR_KEYWORD:
                before.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
        options = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[_type(field), _option(field)],
            )
            for field in fields(config)
        ]
        signature = inspect.Signature([*before, *options, *after], return_annotation=None)
        function.__signature__ = signature  # type: ignore[attr-defined]
        function.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
        return function

    return decorate


def _type(field: Field[Any]) -> Any:
    """Return the type by which typer reads an option; it knows no `float | str`."""
    if setting_of(field).repeatable:
        return list[str] | None
    return float | None if setting_of(field).word else field.type


def option_of(config: type, name: str) -> Any:
    """Return typer's description of one field as an option."""
    return _option(next(field for field in fields(config) if field.name == name))


def one_of(*choices: str, pattern: str | None = None) -> Callable[[str | None], str | None]:
    """Return typer's callback that accepts only these values, and those that match a regular expression.

    Raises:
        WrongValue: the value is another one; the exit code is 2.
    """

    def check(value: str | None) -> str | None:
        if value is not None and value not in choices and not (pattern and re.fullmatch(pattern, value)):
            raise WrongValue(f"choose one of {', '.join(choices)}" if choices[1:] else f"only {choices[0]} is known")
        return value

    return check


def number_or(word: str) -> Callable[[str | float], float | str]:
    """Return typer's parser of a number, or of a word in its place.

    Raises:
        WrongValue: the text is neither; the exit code is 2.
    """

    def parse(text: str | float) -> float | str:
        if isinstance(text, str) and text.lower() == word:
            return word
        try:
            return float(text)
        except ValueError:
            raise WrongValue(f"give a number, or {word}") from None

    return parse


def _option(field: Field[Any]) -> Any:
    setting, option = setting_of(field), f"--{field.name.replace('_', '-')}"
    if field.default is True:
        option = f"{option}/--no{option[1:]}"
    details: dict[str, Any] = {
        "help": as_typed(setting.help, {}),
        "metavar": setting.metavar,
        "rich_help_panel": setting.panel,
    }
    if setting.choices:
        details["callback"] = one_of(*setting.choices, pattern=setting.pattern)
        details["autocompletion"] = _completion(setting.choices)
        details["metavar"] = "|".join(setting.choices) if len(setting.choices) < 5 else "NAME"
    if setting.word:
        details["parser"] = number_or(setting.word)
        details["autocompletion"] = _completion((setting.word,))
        details["metavar"] = f"X|{setting.word}"
    if setting.is_closed:  # typer has no open ranges: those are checked by `config` alone
        details |= {"min": setting.min, "max": setting.max}
    return typer.Option(option, **details)


def _completion(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return the function by which the shell completes an option's value."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete
