"""Shows the options that a function takes as keywords, and names the nearest one where a keyword is none of them."""

import functools
import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from xray_fastai.system.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])


class UnknownOptionError(UserError, TypeError):
    """An argument that a function does not take; Python raises `TypeError` for such ones."""


def takes_options(
    config: type, others: Mapping[str, str], only: Collection[str] | None = None
) -> Callable[[Function], Function]:
    """Replace `**settings` in a function's signature and docstring by the fields of a dataclass.

    `help`, editors and notebooks then show each option with its default and its help text (`config.Setting`). A keyword
    that is no option raises `UnknownOptionError` with the nearest one.

    Args:
        config: the dataclass.
        others: what to say of names that other libraries have for the same thing.
        only: the fields that the function takes; None is all of them.
    """

    def decorate(function: Function) -> Function:
        parameters = inspect.signature(function).parameters
        named = [p for p in parameters.values() if p.kind is not p.VAR_KEYWORD]
        wanted = [field for field in fields(config) if only is None or field.name in only]
        options = [field for field in wanted if field.name not in parameters]
        known = [*(p.name for p in named), *(field.name for field in options)]

        @functools.wraps(function)
        def checked(*args: Any, **settings: Any) -> Any:
            for name in settings:
                if name not in known:
                    raise UnknownOptionError(f"no such option; {_advice(function, name, known, others)}", option=name)
            return function(*args, **settings)

        shown = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
                 for f in options]  # fmt: skip
        first = [p for p in named if p.kind is not p.KEYWORD_ONLY]
        last = [p for p in named if p.kind is p.KEYWORD_ONLY]
        signature = inspect.signature(function).replace(parameters=[*first, *shown, *last])
        lines = [f"{field.name}: {field.metadata['setting'].help}" for field in options]
        checked.__signature__ = signature  # type: ignore[attr-defined]
        checked.__doc__ = _with_options(function.__doc__, lines)
        return checked  # type: ignore[return-value]

    return decorate


def _advice(function: Callable[..., Any], name: str, known: list[str], others: Mapping[str, str]) -> str:
    if name in others:
        return others[name]
    if near := get_close_matches(name, known, n=1):
        return f"did you mean {near[0]}?"
    return f"{function.__name__} takes {', '.join(known)}"


def _with_options(doc: str | None, lines: list[str]) -> str | None:
    """Return a docstring with these lines in place of that of `**settings`; None where Python leaves out docstrings."""
    if doc is None:
        return None
    before, _, after = doc.partition("        **settings:")
    listed = "\n".join(
        textwrap.fill(line, 120, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False)
        for line in lines
    )
    return before + listed + "\n" + after.partition("\n")[2]
