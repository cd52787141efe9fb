"""Defines the commands that handle exports as files: `runs`, `default`, `report`, `verify`, `export`."""

from pathlib import Path
from typing import Annotated

import typer

import xray_fastai
from xray_fastai.cli.next_steps import next_command
from xray_fastai.cli.options import one_of
from xray_fastai.cli.shared import Export, Json, Model, Open, chosen_export, either, open_report
from xray_fastai.system.errors import OptionError, UserError

SORTS = ("date", "name", "data", "network", "valid", "test", "status")
"""As `export.runs.SORTS`, which takes a moment to import."""


def runs(
    pair: Annotated[
        list[str] | None,
        typer.Argument(metavar="EXPORT", help="One export, to see its details; two, to see which settings differ."),
    ] = None,
    exports: Annotated[Path, typer.Option("--exports", metavar="DIR", help="Folder of the exports.")] = Path("exports"),
    sort: Annotated[
        str, typer.Option(metavar="COLUMN", callback=one_of(*SORTS), help=f"Sort by {', '.join(SORTS)}.")
    ] = "date",
    json: Json = False,
) -> None:
    """List the exports and the unfinished runs with their results; show one, or in which settings two differ."""
    from xray_fastai.cli.runs_table import print_differences, print_run, print_runs

    if not pair:
        print_runs(exports, sort, json)
    elif len(pair) == 1:
        run, settings = print_run(pair[0], exports, json)
        if not json:
            from xray_fastai.data.folders import lacks_test

            untested = run.test is None and not lacks_test(settings["data"])
            next_command("evaluate" if untested else "interpret", run.path)
    elif len(pair) == 2:
        print_differences(pair, json)
        if not json:
            next_command("compare", *pair)
    else:
        raise OptionError(f"{len(pair)} exports given; give two to compare, one to show, or none to list all")


def default(
    export: Annotated[
        Path | None, typer.Argument(metavar="EXPORT", help="Export to use. [default: show the present one]")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Use the newest export again.")] = False,
) -> None:
    """Choose the export that commands use if none is given; without EXPORT, show which that is.

    The environment variable XRAY_FASTAI_MODEL comes before this choice.
    """
    from xray_fastai.export.reader import default_export, find_export, set_default

    if clear and export is not None:
        raise OptionError(f"{export} is given, too; leave one of them out", option="clear")
    if clear or export is not None:
        set_default(export)
    path, why = default_export()
    print(f"{find_export(path)} ({why})")
    if export is not None:
        next_command("predict", "IMAGE_OR_FOLDER")


def report(
    export: Export = None,
    model: Model = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", rich_help_panel="Output", help="Folder to write to. [default: EXPORT]"),
    ] = None,
    open: Open = False,
) -> None:
    """Write an export's report.html again, from the files that are in the export now."""
    model = chosen_export(export, model)
    from xray_fastai.evaluation.report import write_report
    from xray_fastai.export.reader import find_export

    path = write_report(find_export(model), output)
    print(f"{'report':<14}{path}")
    if open:
        open_report(path.parent)


def verify(
    export: Annotated[
        Path | None,
        typer.Argument(
            metavar="EXPORT",
            help="An export's folder, or a .zip of one. [default: that of 'xray-fastai default', else the newest in "
            "./exports]",
        ),
    ] = None,
    model: Model = None,
) -> None:
    """Check that an export is complete and safe to load, without running anything in it.

    The exit code is 1 if it is not.
    """
    from xray_fastai.export.reader import find_export

    result = xray_fastai.verify(either(export, model, "model") or find_export())
    print(result)
    if not result.ok:
        raise UserError(result.faults[0])
    if result.path.is_dir():
        next_command("predict", "IMAGE_OR_FOLDER", "--model", result.path)


def export(
    export: Export = None,
    model: Model = None,
    format: Annotated[str, typer.Option(metavar="onnx", callback=one_of("onnx"), help="Output format.")] = "onnx",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write. [default: RUN.onnx in this folder]")
    ] = None,
) -> None:
    """Write an export as one ONNX file: preprocessing, network, temperature and softmax in one graph."""
    model = chosen_export(export, model)
    from xray_fastai.inference.onnx_export import export_onnx

    print(export_onnx(model, output))
