"""Holds the options that several commands have, and what they do before and after their function."""

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from xray_fastai.cli.options import option_of
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.system import distributed
from xray_fastai.system.errors import OptionError

Value = TypeVar("Value")

Export = Annotated[
    Path | None,
    typer.Argument(
        metavar="EXPORT", help="Export to use. [default: that of 'xray-fastai default', else the newest in ./exports]"
    ),
]
Model = Annotated[Path | None, typer.Option("--model", metavar="EXPORT", help="The same as EXPORT.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR|FILE",
        rich_help_panel="Data",
        help="Folder of the images, or a table of them, as .csv. [default: the one that fit used]",
    ),
]
Images = Annotated[str | None, option_of(FitConfig, "images")]
Column = Annotated[list[str] | None, option_of(FitConfig, "column")]
Device = Annotated[str, option_of(PredictConfig, "device")]
Precision = Annotated[str, option_of(PredictConfig, "precision")]
Uncalibrated = Annotated[bool, option_of(PredictConfig, "uncalibrated")]
Prevalence = Annotated[float | None, option_of(PredictConfig, "prevalence")]
Gate = Annotated[bool, option_of(PredictConfig, "gate")]
Abstain = Annotated[float, option_of(PredictConfig, "abstain")]
Tta = Annotated[bool, option_of(PredictConfig, "tta")]
Exclude = Annotated[str | None, option_of(FitConfig, "exclude")]
Patients = Annotated[
    str | None,
    typer.Option(
        "--patients",
        metavar="LIST.csv",
        rich_help_panel="Data",
        help="List of the patients: a .csv file with the columns file and patient. [default: the one of fit, without "
        "--data]",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="DIR", rich_help_panel="Output", help="Folder to write to. [default: the export's folder]"
    ),
]
Json = Annotated[bool, typer.Option("--json", rich_help_panel="Output", help="Print the result as JSON.")]
Open = Annotated[
    bool, typer.Option("--open", rich_help_panel="Output", help="Show report.html in the browser at the end.")
]


def either(argument: Value | None, option: Value | None, name: str) -> Value | None:
    """Return an argument, or the option that stands for the same.

    Args:
        argument: the positional argument, such as EXPORT.
        option: the option's value.
        name: Python's name of the option.

    Raises:
        OptionError: both are given.
    """
    if argument is None or option is None:
        return option if argument is None else argument
    raise OptionError(f"{argument} is given, too; leave one of them out", option=name, value=option)


def chosen_export(argument: Path | None, option: Path | None, quiet: bool = False) -> Path:
    """Return the export that EXPORT or --model names; else the default one, whose name is printed with the reason.

    A wrong path is answered at once; the imports of the command itself take seconds.

    Args:
        argument: EXPORT.
        option: --model.
        quiet: print nothing.

    Raises:
        OptionError: both are given.
        UserError: there is no such export.
    """
    from xray_fastai.export.reader import find_export, why_chosen

    model = either(argument, option, "model")
    path = find_export(model)
    if model is None and not quiet and distributed.rank() == 0:
        print(f"{'model':<14}{path}{why_chosen(None)}", flush=True)
    return path if model is None else model


def check_export(model: Path | None) -> None:
    """Check that an export exists, without torch.

    Raises:
        UserError: it does not.
    """
    from xray_fastai.export.reader import find_export

    if distributed.rank() == 0:
        find_export(model)


def open_report(folder: Path) -> None:
    """Show a folder's report.html in the browser."""
    import webbrowser

    webbrowser.open((folder / "report.html").resolve().as_uri())
