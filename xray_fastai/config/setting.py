"""Describes one option, and checks its value.

A field's metadata (`Setting`) says which values the field may have. `check_fields` checks them, and the command line
makes its options of the same fields.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from numbers import Real
from typing import Any, get_args

from xray_fastai.system.errors import OptionError
from xray_fastai.system.text import fault_of, shown

MAX_TEXT = 4096
"""Characters of an option's text."""
PANELS = ("Data", "Images", "Network", "Training", "Calibration", "Decision", "Output", "Run", "Machine")
"""The purposes that `--help` divides options by, in its order."""


@dataclass(frozen=True)
class Setting:
    """Describes one option: its help text, and which values it may have. None leaves a limit out."""

    help: str
    panel: str | None = None  # one of PANELS: where `--help` shows the option; None is at the end
    metavar: str | None = None  # stands for the value in the help text: DIR
    choices: tuple[str, ...] = ()
    pattern: str | None = None  # regular expression of further choices
    min: float | None = None  # the smallest value
    max: float | None = None  # the largest value
    above: float | None = None  # all values are larger
    below: float | None = None  # all values are smaller
    word: str | None = None  # may stand in place of a number
    check: Callable[[str], str | None] | None = None  # returns what the user has to do, or None for a right value
    repeatable: bool = False  # whether the option may be given several times; the texts are joined by commas
    printable: bool = False  # whether unprintable characters are refused, because an export or a message holds the text

    @property
    def is_path(self) -> bool:
        """Whether the value may name a file or a folder."""
        return self.metavar is not None and re.search("DIR|FILE|LIST.csv", self.metavar) is not None

    @property
    def is_closed(self) -> bool:
        """Whether `min` and `max` alone limit the values."""
        return self.above is None and self.below is None

    def advice(self, value: Any) -> str | None:
        """Return what the user has to do about a wrong value; None for a right one."""
        if value == self.word:
            return None
        if self.choices and not self.is_choice(value):
            return f"choose one of {', '.join(self.choices)}"
        if not self._is_within(value):
            return f"give {self._limits()}{self.or_word}"
        if self.printable and (fault := fault_of(value, MAX_TEXT)):
            return f"{fault}; give another text"
        return None if self.check is None else self.check(value)

    @property
    def or_word(self) -> str:
        """The end of an advice that names the word, if there is one."""
        return f", or {self.word}" if self.word else ""

    def is_choice(self, value: Any) -> bool:
        """Return whether a value is one of the choices, or matches `pattern`."""
        return value in self.choices or (self.pattern is not None and re.fullmatch(self.pattern, value) is not None)

    def _is_within(self, value: Any) -> bool:
        # in this direction each comparison is False for NaN
        return (
            (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _limits(self) -> str:
        if self.is_closed:
            return f"{self.min} or more" if self.max is None else f"a number from {self.min} to {self.max}"
        low = f"at least {self.min}" if self.above is None else f"above {self.above}"
        high = f"at most {self.max}" if self.below is None else f"below {self.below}"
        return f"a number that is {low} and {high}"


def setting_of(option: Field[Any]) -> Setting:
    """Return the description of a field of `FitConfig` or `PredictConfig`."""
    setting: Setting = option.metadata["setting"]
    return setting


def setting(default: Any, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(help, **limits)})


def check_fields(config: Any) -> None:
    """Convert and check each field of a settings object.

    Raises:
        OptionError: a value has the wrong type, or is not allowed; the error names its option.
    """
    for option in fields(config):
        value = _converted(option, getattr(config, option.name))
        object.__setattr__(config, option.name, value)
        if value is not None and (advice := setting_of(option).advice(value)):
            text = f"{value:g}" if isinstance(value, float) else shown(value)
            raise OptionError(advice, option=option.name, value=text)


def _converted(option: Field[Any], value: Any) -> Any:
    """Convert a value from Python to what JSON holds: a path to text, {"a": "b"} to a=b, a NumPy number to Python's.

    In a path, ~ is the user's home folder, as a shell has it.
    """
    kind, *others = get_args(option.type) or (option.type,)
    if setting_of(option).repeatable and isinstance(value, (list, tuple)):
        value = ",".join(value) or None
    if value is None and type(None) in others:
        return None
    if kind is str and isinstance(value, Mapping):
        value = ",".join(f"{key}={text}" for key, text in value.items())
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if setting_of(option).is_path and isinstance(value, str):
        value = os.path.expanduser(value)
    if (word := setting_of(option).word) is not None and isinstance(value, str) and value.lower() == word:
        return word
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if kind in (int, float) and is_number and math.isfinite(value) and kind(value) == value:
        return kind(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        advice = "give text" if kind is str else f"give a value of type {kind.__name__}{setting_of(option).or_word}"
        raise OptionError(advice, option=option.name, value=shown(value))
    return value
