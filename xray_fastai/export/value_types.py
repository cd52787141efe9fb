"""Describes the values in `model.json`: their types and limits, and the base class of its objects."""

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from xray_fastai.config.choices import ARCHITECTURES, TIMM_PATTERN
from xray_fastai.config.class_names import class_fault
from xray_fastai.export.layout import QUANTILES
from xray_fastai.system.text import fault_of, shown

ENTRIES = 1_000
"""The largest number of entries of a table of names, and of each list but that of the validation files."""
TENSORS = 5_000
"""The largest number of a backbone's tensors; timm's largest networks have 3,000."""


def _text(text: str) -> str:
    if fault := fault_of(text, 4096):
        raise ValueError(fault)
    return text


def _class(name: str) -> str:
    if fault := class_fault(name):
        raise ValueError(fault)
    return name


def _architecture(name: Any) -> Any:
    if not isinstance(name, str) or (name not in ARCHITECTURES and not re.fullmatch(TIMM_PATTERN, name)):
        raise ValueError(f"{shown(name)} is none of {', '.join(ARCHITECTURES)}, timm/NAME")
    return name


def _date(text: str) -> str:
    datetime.fromisoformat(text)
    return text


def at_most(limit: int) -> BeforeValidator:
    """Return the check that a table has no more entries than that."""

    def check(table: Any) -> Any:
        if isinstance(table, dict) and len(table) > limit:
            raise ValueError(f"{len(table):,} entries, more than {limit:,}")
        return table

    return BeforeValidator(check)


Text = Annotated[str, AfterValidator(_text)]
Class = Annotated[str, AfterValidator(_class)]
Architecture = Annotated[str, BeforeValidator(_architecture)]
Date = Annotated[str, Field(max_length=40), AfterValidator(_date)]
Count = Annotated[int, Field(ge=0, le=10**12)]
Counts = Annotated[dict[Class, Count], at_most(ENTRIES)]
Quantiles = Annotated[list[float], Field(min_length=QUANTILES, max_length=QUANTILES, fail_fast=True)]
Packed = Annotated[str, Field(pattern="^([0-9A-Za-z+/]{8})*$")]
"""Keys of 6 bytes each, in base64."""
Positive = Annotated[float, Field(gt=0)]
Dimensions = Annotated[int, Field(ge=1, le=256)]
FileKey = Annotated[str, Field(pattern="^[0-9a-f]{12}$")]


class Part(BaseModel):
    """Describes an object of `model.json`: exact types and finite numbers. Unknown keys are kept for a warning."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def unknown(self, where: str = "") -> Iterator[str]:
        """Yield the paths of the keys that this version does not know."""
        yield from (f"{where}{key}" for key in self.model_extra or {})
        for name in type(self).model_fields:
            value = getattr(self, name)
            for i, part in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(part, Part):
                    yield from part.unknown(f"{where}{name}[{i}]." if isinstance(value, list) else f"{where}{name}.")
