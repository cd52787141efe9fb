"""Defines the commands that use a model on new images: `predict`, `serve`."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from xray_fastai.cli.next_steps import next_command
from xray_fastai.cli.options import settings_from
from xray_fastai.cli.shared import Abstain, Device, Export, Gate, Model, Prevalence, check_export, either
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.inference.inputs import check_paths
from xray_fastai.system.errors import UserError

UNREADABLE = 3
"""The exit code if some files could not be read, and all others were predicted."""


@settings_from(PredictConfig)
def predict(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Files, folders, or - for a list of paths on standard input.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="EXPORT",
            help="Export to use. [default: that of 'xray-fastai default', else the newest in ./exports]",
        ),
    ] = None,
    **settings: Any,
) -> None:
    """Predict new images. The exit code is 3 if some files could not be read."""
    config = PredictConfig(**settings)
    _check_images(paths)
    check_paths(paths, config)
    check_export(model)
    from xray_fastai.inference.predict_files import predict_command as run

    errors = run(paths, model, config)
    if sys.stdout.isatty() and not any(settings.get(name) for name in ("output", "heatmaps", "report")):
        next_command("predict", *paths, "--heatmaps", "maps")
    if errors:
        raise typer.Exit(UNREADABLE)


def _check_images(paths: list[str]) -> None:
    """Answer a folder that is an export before the model is loaded."""
    for path in paths:
        if os.path.isfile(os.path.join(path, "model.json")):
            advice = f"give it as --model {shlex.quote(path)}, and images besides"
            raise UserError(f"{path}: an export, no images; {advice}")


def serve(
    export: Export = None,
    model: Model = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 admits other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8080,
    prevalence: Prevalence = PredictConfig.prevalence,
    gate: Gate = PredictConfig.gate,
    abstain: Abstain = PredictConfig.abstain,
    device: Device = PredictConfig.device,
    open: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Serve a page to drop images on, and POST /predict for programs. Ctrl-C ends it."""
    model = either(export, model, "model")
    check_export(model)
    from xray_fastai.serving.server import serve as run

    config = PredictConfig(prevalence=prevalence, gate=gate, abstain=abstain, device=device)
    run(model, host, port, config=config, open=open)
