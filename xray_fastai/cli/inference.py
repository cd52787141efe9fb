"""Defines the commands that use a model on new images: `predict`, `serve`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from xray_fastai.cli.options import settings_from
from xray_fastai.cli.shared import Abstain, Device, Export, Gate, Model, Prevalence, check_export, chosen_export
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.system.errors import UserError


@settings_from(PredictConfig)
def predict(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, folders, or - for a list of paths on standard input.")
    ],
    model: Annotated[
        Path | None, typer.Option("--model", metavar="EXPORT", help="Export to use. [default: the newest in ./exports]")
    ] = None,
    **settings: Any,
) -> None:
    """Predict new images. The exit code is 1 if a file could not be read."""
    config = PredictConfig(**settings)
    check_export(model)
    for path in paths:
        if (Path(path) / "model.json").is_file():
            raise UserError(f"{path}: an export, no images; give it as --model {shlex.quote(path)}, and images besides")
    from xray_fastai.inference.predict_files import predict_command as run

    errors = run(paths, model, config)
    if errors:
        raise typer.Exit(1)


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
    model = chosen_export(export, model)
    from xray_fastai.serving.server import serve as run

    config = PredictConfig(prevalence=prevalence, gate=gate, abstain=abstain, device=device)
    run(model, host, port, config=config, open=open)
