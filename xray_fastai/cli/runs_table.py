"""Prints the runs and the differences of two: as tables, for a terminal of any width, or as JSON."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from xray_fastai.export.runs import Auc, Run, differing_settings, list_runs, one_run, to_json
from xray_fastai.system.text import as_typed, format_interval, printable, wrap

NARROW = 72
"""Below this number of columns a run's cells stand below each other."""
PIPE_WIDTH = 160
"""Columns of a table that is written to a file or a pipe."""


def print_runs(exports: Path, sort: str, as_json: bool) -> None:
    """Print two lines a run of a folder: its name, date, status, data, network and AUCs."""
    runs = list_runs(exports, sort)
    if as_json:
        print(to_json(runs))
        return
    if not runs:
        print(f"{exports}: no run in it; make one by 'xray-fastai fit'")
        return
    _print_rows(("run", "data, network", "valid AUC", "test AUC", "worst group"), [_cells(run) for run in runs])
    for run in runs:
        if run.fault is not None:
            print(printable(f"{run.name}: {run.fault}"))


def print_run(name: str, exports: Path, as_json: bool) -> tuple[Run, dict[str, Any]]:
    """Print all of one export that the list has, and what was set for its fit; return both."""
    run, settings = one_run(name, exports)
    if as_json:
        print(json.dumps(asdict(run) | {"settings": settings}, indent=2))
        return run, settings
    set_values = {name: value for name, value in settings.items() if value is not None}
    lines = {
        "export": f"{run.path}{', the default' if run.default else ''}",
        "fit": f"{(run.date or '')[:16].replace('T', ' ')}, {run.status}",
        "data": f"{run.data}, {run.images:,} images",
        "network": run.network,
        "valid AUC": _valid(run),
        "test AUC": "not measured yet" if run.test is None else _auc(run.test),
        "worst group": "-" if run.worst_group is None else f"{run.worst_group} {_auc(run.worst)}",
        "settings": ", ".join(f"{name} {_shown(value)}" for name, value in set_values.items()),
    }
    for title, text in lines.items():
        print("\n".join(wrap(_line(str(text)), f"{title:<14}")))
    return run, settings


def print_differences(pair: list[str], as_json: bool) -> None:
    """Print the settings in which two exports differ."""
    differing = differing_settings(*pair)
    if as_json:
        print(json.dumps(differing, indent=2))
        return
    if not differing:
        print("the settings are the same")
        return
    rows = [
        (as_typed(f"{name}=", {}) if " " not in name else name, *map(_shown, pair)) for name, pair in differing.items()
    ]
    _print_rows(("setting", *pair), rows)


def _cells(run: Run) -> tuple[str, ...]:
    status = f"{run.status}{', default' if run.default else ''}"
    date = "" if run.date is None else f"{run.date[:16].replace('T', ' ')}, "
    first = f"{run.name}\n{date}{status}"
    if run.network is None:
        return (first,)
    worst = "-" if run.worst_group is None else f"{run.worst_group}\n{_auc(run.worst)}"
    return first, f"{run.data}, {run.images:,} images\n{run.network}", _valid(run), _auc(run.test), worst


def _valid(run: Run) -> str:
    """Return the AUC of validation, and of which images it is: those of a hold-out, or of all folds."""
    if run.valid is None or not run.valid_images:
        return _auc(run.valid)
    return f"{_auc(run.valid)}\n{run.valid_images:,} {'out of fold' if run.out_of_fold else 'held out'}"


def _auc(auc: Auc | None) -> str:
    return "-" if auc is None else format_interval(auc.value, auc.low, auc.high).replace(" (", "\n(")


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _print_rows(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    if console.width < NARROW:
        for row in rows:
            console.print(Text(_line(row[0]), style="bold"))
            for title, cell in zip(titles[1:], row[1:], strict=False):  # a broken run has no other cells
                console.print(Padding(f"{title}: {_line(cell)}", (0, 0, 0, 2), expand=False))
        return
    table = Table(*titles, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*("\n".join(printable(line) for line in cell.splitlines()) for cell in row))
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _line(cell: str) -> str:
    return printable(cell.replace("\n", " "))
