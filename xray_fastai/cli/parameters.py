"""Looks up what a command's function says of its parameters: their types and limits."""

import inspect
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from typer.models import ParameterInfo


@dataclass(frozen=True)
class Kind:
    """Describes the values of a parameter."""

    type: type = str
    min: float | None = None
    max: float | None = None

    def advice(self) -> str:
        """Return what to give: "give a whole number from 0 to 65535"."""
        what = {int: "give a whole number", float: "give a number"}.get(self.type, "give another value")
        if self.min is None and self.max is None:
            return what
        if self.max is None:
            return f"{what}, {self.min} or more"
        return f"{what} up to {self.max}" if self.min is None else f"{what} from {self.min} to {self.max}"


def kind_of(command: Any, name: str) -> Kind:
    """Return the kind of a parameter by its name in Python; text, if the function has no such parameter (`--help`)."""
    parameter = inspect.signature(command.callback).parameters.get(name)
    if parameter is None or get_args(parameter.annotation) == ():
        return Kind()
    annotated, *about = get_args(parameter.annotation)
    kinds = [kind for kind in get_args(annotated) or (annotated,) if kind is not type(None)]
    info = next((item for item in about if isinstance(item, ParameterInfo)), None)
    return Kind(get_origin(kinds[0]) or kinds[0], getattr(info, "min", None), getattr(info, "max", None))
