"""Holds the options that several commands have, and what they do before and after their function."""

from pathlib import Path
from typing import Annotated

import typer

from xray_fastai.cli.options import option_of
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.system import distributed

Export = Annotated[
    Path | None, typer.Option("--model", metavar="EXPORT", help="Export to use. [default: the newest in ./exports]")
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR|FILE",
        help="Folder of the images, or a table of them, as .csv. [default: the one that fit used]",
    ),
]
Images = Annotated[str | None, option_of(FitConfig, "images")]
Column = Annotated[list[str] | None, option_of(FitConfig, "column")]
Device = Annotated[str, option_of(PredictConfig, "device")]
Precision = Annotated[str, option_of(PredictConfig, "precision")]
Uncalibrated = Annotated[bool, option_of(PredictConfig, "uncalibrated")]
Prevalence = Annotated[float | None, option_of(PredictConfig, "prevalence")]
Tta = Annotated[bool, option_of(PredictConfig, "tta")]
Exclude = Annotated[str | None, option_of(FitConfig, "exclude")]
Patients = Annotated[
    str | None,
    typer.Option(
        "--patients",
        metavar="LIST.csv",
        help="List of the patients: a .csv file with the columns file and patient. [default: the one of fit, without "
        "--data]",
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Folder to write to. [default: the export's folder]")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Open = Annotated[bool, typer.Option("--open", help="Show report.html in the browser at the end.")]


def check_export(model: Path | None) -> None:
    """Answer a wrong --model at once; the imports of the command itself take seconds."""
    from xray_fastai.export.reader import find_export

    if distributed.rank() == 0:
        find_export(model)


def open_report(folder: Path) -> None:
    """Show a folder's report.html in the browser."""
    import webbrowser

    webbrowser.open((folder / "report.html").resolve().as_uri())
