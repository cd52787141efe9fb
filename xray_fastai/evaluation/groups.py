"""Metrics by group in `metrics.json`, on the terminal and in the report (`metrics.groups` computes them).

The groups are the columns `group:NAME` of the table of images: what `--column NAME=HEADER` keeps of a label table.
"""

import math
from typing import Any

import pandas as pd

from xray_fastai.data.table_columns import GROUP
from xray_fastai.metrics.comparison import Called
from xray_fastai.metrics.groups import NAMES, by_group, in_bands
from xray_fastai.metrics.table import title_of
from xray_fastai.system.text import WIDTH, format_interval, shorten, wrap

_NAME_WIDTH, _COUNT_WIDTH = 12, 7


def groups_of(images: pd.DataFrame, called: Called, classes: list[str]) -> list[dict[str, Any]]:
    """Return the metrics by each column of groups, as `metrics.json` holds them; empty without such columns.

    Args:
        images: the table of N images.
        called: their predictions at the chosen threshold.
        classes: the names of the classes.
    """
    return [_of_column(name.removeprefix(GROUP), images[name], called, classes) for name in _columns(images)]


def _columns(images: pd.DataFrame) -> list[str]:
    return [str(name) for name in images.columns if str(name).startswith(GROUP)]


def _of_column(name: str, values: pd.Series, called: Called, classes: list[str]) -> dict[str, Any]:
    groups, words = in_bands(name, values)
    found = by_group(called, groups, classes)
    return {
        "column": name,
        "bands": words,  # how numbers were cut; null: the groups are the column's values
        "groups": [
            {
                "name": row.name,
                "images": row.images,
                "patients": row.patients,
                "counts": dict(zip(classes, row.counts, strict=True)),
                "metrics": {metric: _plain(interval._asdict()) for metric, interval in row.metrics.items()},
                "too_few": row.too_few,  # why a metric is null
            }
            for row in found.rows
        ],
        "gaps": [_plain(gap._asdict()) for gap in found.gaps],
    }


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Return values that JSON can hold: NaN becomes null."""
    return {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in fields.items()}


def lines_of(columns: list[dict[str, Any]]) -> list[str]:
    """Return the tables of all columns for the terminal, each with an empty line behind it."""
    lines = []
    for column in columns:
        heads = "".join(f"{_title(name):<20}" for name in NAMES).rstrip()
        by = shorten(f"by {column['column']}", _NAME_WIDTH - 1)
        lines.append(f"{by:<{_NAME_WIDTH}}{'images':<{_COUNT_WIDTH}}{heads}")
        for group in column["groups"]:
            cells = "".join(f"{cell_of(group['metrics'][name]):<20}" for name in NAMES)
            name = shorten(group["name"], _NAME_WIDTH - 1)
            lines.append(f"{name:<{_NAME_WIDTH}}{group['images']:<{_COUNT_WIDTH},}{cells}".rstrip()[:WIDTH])
        for remark in remarks_on(column):
            lines += wrap(remark)
        lines.append("")
    return lines


def _title(name: str) -> str:
    return title_of(name).partition(" (")[0]


def cell_of(metric: dict[str, float | None]) -> str:
    """Return a metric of a group with two digits; `-` where the group is too small."""
    return "-" if metric["value"] is None else format_interval(**metric, digits=2)


def remarks_on(column: dict[str, Any]) -> list[str]:
    """Return the gaps, how numbers were cut, and which groups are too small, a sentence each."""
    remarks = [
        f"{_title(gap['metric'])}, {gap['best']} less {gap['worst']}: "
        f"{format_interval(gap['difference'], gap['low'], gap['high'])}"
        + (f", allowing for the choice among {gap['groups']} groups." if gap["groups"] > 2 else ".")
        for gap in column["gaps"]
    ]
    if column["bands"] is not None:
        remarks.append(f"Groups by {column['column']}: {column['bands']}.")
    return remarks + [f"{group['name']}: {group['too_few']}." for group in column["groups"] if group["too_few"]]
