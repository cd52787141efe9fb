"""Defines the commands that make an export: `fit`, `recalibrate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

import xray_fastai
from xray_fastai.cli.next_steps import next_command
from xray_fastai.cli.options import settings_from
from xray_fastai.cli.shared import (
    Column,
    Device,
    Exclude,
    Export,
    Images,
    Model,
    Open,
    chosen_export,
    either,
    open_report,
)
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError


@settings_from(FitConfig)
def fit(
    ctx: typer.Context,
    folder: Annotated[
        str | None, typer.Argument(metavar="FOLDER", help="Folder of the images: the same as --data.")
    ] = None,
    *,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[RUN]",
            rich_help_panel="Run",
            help="Resume an interrupted fit with its settings: the run of this name, or the newest if no name is "
            "given. Only --data, --images, --device, --workers, --no-cache, --exports, --quiet, --log and --open may "
            "be given with it.",
        ),
    ] = None,
    open: Open = False,
    **settings: Any,
) -> None:
    """Train on images in train/ and val/ (without any, on a synthetic data set) and write exports/RUN."""
    settings["data"] = either(folder, settings["data"], "data")
    config = FitConfig(**settings)
    if resume is None and distributed.rank() == 0:
        from xray_fastai.training.inputs import check_paths

        check_paths(config)
    from xray_fastai.training.write_export import FitInterrupted

    try:
        if resume is None:
            result = xray_fastai.fit(config)
        else:
            given = [name for name in settings if _is_given(ctx, name) or (name == "data" and folder is not None)]
            result = xray_fastai.fit(resume=resume or True, **{name: settings[name] for name in given})
    except FitInterrupted as stop:
        result = stop.result
    if open and distributed.rank() == 0:
        open_report(result.path)
    if result.error:
        raise UserError(
            f"{result.error}; the best weights so far are in {result.path}; try a lower --lr than {result.lr:g}"
        )
    if result.signal:
        kept = "the best weights so far were exported" if result.history else "no epoch was completed"
        distributed.tell(f"Interrupted: {kept}.")
        raise typer.Exit(128 + result.signal)


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def recalibrate(
    export: Export = None,
    model: Model = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR|FILE",
            rich_help_panel="Data",
            help="Labelled local images, in folders named as the model's classes, or a table, as .csv.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel="Data",
            help="Folder in --data that holds these folders. [default: --data itself]",
        ),
    ] = None,
    unlabelled: Annotated[
        Path | None,
        typer.Option(
            "--unlabelled",
            metavar="DIR",
            rich_help_panel="Data",
            help="Local images without labels: batch norm is adapted to them.",
        ),
    ] = None,
    match_scores: Annotated[
        bool,
        typer.Option(
            "--match-scores",
            rich_help_panel="Calibration",
            help="Instead, move the operating point so that the share of them called positive fits validation's.",
        ),
    ] = False,
    prevalence: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            rich_help_panel="Calibration",
            help="Share of positive images in --unlabelled, which --match-scores needs.",
        ),
    ] = None,
    target_sensitivity: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            rich_help_panel="Calibration",
            help="Choose the threshold for this sensitivity. [default: by Youden's J]",
        ),
    ] = None,
    cost_ratio: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            rich_help_panel="Calibration",
            help="Choose it for R false alarms being as bad as one missed positive image.",
        ),
    ] = None,
    exclude: Exclude = None,
    patients: Annotated[
        str | None,
        typer.Option(
            "--patients",
            metavar="LIST.csv",
            rich_help_panel="Data",
            help="List of the patients: a .csv file with the columns file and patient.",
        ),
    ] = None,
    images: Images = None,
    column: Column = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            rich_help_panel="Output",
            help="New export. [default: EXPORT-recalibrated, beside EXPORT]",
        ),
    ] = None,
    device: Device = PredictConfig.device,
) -> None:
    """Fit an export's probabilities and threshold to another place's images, and write a new export."""
    model = chosen_export(export, model)
    result = xray_fastai.recalibrate(
        model, data, split, unlabelled=unlabelled, match_scores=match_scores, prevalence=prevalence,
        target_sensitivity=target_sensitivity, cost_ratio=cost_ratio, exclude=exclude, patients=patients,
        images=images, column=column, output=output, device=device,
    )  # fmt: skip
    print(result)
    next_command("predict", "IMAGE_OR_FOLDER", "--model", result.path)
