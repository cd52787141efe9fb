"""Defines the commands that handle exports as files: `verify`, `export`."""

from pathlib import Path
from typing import Annotated

import typer

from xray_fastai.cli.options import one_of
from xray_fastai.cli.shared import Export, Model, chosen_export, either
from xray_fastai.system.errors import UserError


def verify(
    export: Annotated[
        Path | None,
        typer.Argument(
            metavar="EXPORT", help="An export's folder, or a .zip of one. [default: the newest in ./exports]"
        ),
    ] = None,
    model: Model = None,
) -> None:
    """Check that an export is complete and safe to load, without running anything in it.

    The exit code is 1 if it is not.
    """
    from xray_fastai.export.reader import find_export
    from xray_fastai.export.verification import verify as run

    result = run(either(export, model, "model") or find_export())
    print(result)
    if not result.ok:
        raise UserError(result.faults[0])


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
