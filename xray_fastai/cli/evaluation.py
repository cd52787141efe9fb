"""Defines the commands that say how good a model is: `evaluate`, `interpret`, `compare`."""

from pathlib import Path
from typing import Annotated

import typer

import xray_fastai
from xray_fastai.cli.next_steps import next_command
from xray_fastai.cli.shared import (
    Abstain,
    Column,
    Data,
    Device,
    Exclude,
    Export,
    Gate,
    Images,
    Json,
    Model,
    Open,
    Output,
    Patients,
    Precision,
    Prevalence,
    Tta,
    Uncalibrated,
    check_export,
    chosen_export,
    open_report,
)
from xray_fastai.config.predict_config import PredictConfig


def evaluate(
    export: Export = None,
    model: Model = None,
    data: Data = None,
    split: Annotated[
        str,
        typer.Option(
            metavar="test|valid|train",
            rich_help_panel="Data",
            help="Split: test, valid (the images that fit validated on) or train.",
        ),
    ] = "test",
    threshold: Annotated[
        str,
        typer.Option(
            metavar="auto|T", rich_help_panel="Decision", help="Decision threshold; auto is the one that fit chose."
        ),
    ] = "auto",
    uncalibrated: Uncalibrated = PredictConfig.uncalibrated,
    prevalence: Prevalence = PredictConfig.prevalence,
    gate: Gate = PredictConfig.gate,
    abstain: Abstain = PredictConfig.abstain,
    tta: Tta = PredictConfig.tta,
    exclude: Exclude = None,
    patients: Patients = None,
    images: Images = None,
    column: Column = None,
    output: Output = None,
    statement: Annotated[
        bool,
        typer.Option("--statement", help="Write methods, results, CLAIM and TRIPOD+AI for a manuscript (Markdown)."),
    ] = False,
    device: Device = PredictConfig.device,
    precision: Precision = PredictConfig.precision,
    json: Json = False,
    open: Open = False,
) -> None:
    """Measure how good a model is: metrics with 95 % intervals, a table of predictions and plots."""
    model = chosen_export(export, model, quiet=json)
    result = xray_fastai.evaluate(
        model, data, split, threshold, uncalibrated=uncalibrated, prevalence=prevalence, gate=gate, abstain=abstain,
        tta=tta, exclude=exclude, patients=patients, images=images, column=column, output=output, statement=statement,
        device=device, precision=precision,
    )  # fmt: skip
    print(result.to_json() if json else result)
    if open:
        open_report(result.path.parent)
    if not json:
        next_command("interpret", model, *_same(data, split))


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The first export.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The second, of the same classes.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR|FILE",
            rich_help_panel="Data",
            help="Folder of the images, or a table as .csv. [default: those of both fits]",
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            metavar="test|valid|train",
            rich_help_panel="Data",
            help="Split: test, valid (the images that both validated on) or train.",
        ),
    ] = "test",
    exclude: Exclude = None,
    patients: Patients = None,
    images: Images = None,
    column: Column = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", rich_help_panel="Output", help="Folder to write to. [default: this folder]"
        ),
    ] = None,
    device: Device = PredictConfig.device,
    precision: Precision = PredictConfig.precision,
    json: Json = False,
) -> None:
    """Compare two models on the same images: paired differences of all metrics, with intervals by patient."""
    for model in (a, b):
        check_export(model)
    result = xray_fastai.compare(
        a, b, data, split, exclude=exclude, patients=patients, images=images, column=column, output=output,
        device=device, precision=precision,
    )  # fmt: skip
    print(result.to_json() if json else result)
    if not json:
        next_command("runs", a, b)


def interpret(
    export: Export = None,
    model: Model = None,
    data: Data = None,
    split: Annotated[
        str,
        typer.Option(
            metavar="test|valid|train",
            rich_help_panel="Data",
            help="Split: valid (the images that fit validated on), test or train.",
        ),
    ] = "valid",
    top: Annotated[int, typer.Option(min=1, rich_help_panel="Images", help="Number of images.")] = 16,
    label: Annotated[
        str | None,
        typer.Option("--class", metavar="CLASS", rich_help_panel="Images", help="Only images of this class."),
    ] = None,
    only_errors: Annotated[
        bool, typer.Option("--only-errors", rich_help_panel="Images", help="Only images with a wrong prediction.")
    ] = False,
    confident: Annotated[
        bool,
        typer.Option(
            "--confident",
            rich_help_panel="Images",
            help="Show the correct predictions of the highest confidence, not the top losses.",
        ),
    ] = False,
    exclude: Exclude = None,
    patients: Patients = None,
    images: Images = None,
    column: Column = None,
    output: Output = None,
    device: Device = PredictConfig.device,
    precision: Precision = PredictConfig.precision,
    open: Open = False,
) -> None:
    """Show where a model errs and what it looks at: top losses with their Grad-CAM heat maps."""
    model = chosen_export(export, model)
    result = xray_fastai.interpret(
        model, data, split, top, label=label, only_errors=only_errors, confident=confident, exclude=exclude,
        patients=patients, images=images, column=column, output=output, device=device, precision=precision,
    )  # fmt: skip
    print(result)
    if open:
        open_report(result.path.parent)
    next_command("predict", "IMAGE_OR_FOLDER", "--model", model)


def _same(data: Path | None, split: str) -> list[str]:
    """Return the options for the same images."""
    return [*([] if data is None else ["--data", str(data)]), "--split", split]
