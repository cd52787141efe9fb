"""Puts the commands together; each is a function of the module of its group."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from xray_fastai import __version__
from xray_fastai.cli.command import Command, Commands, ResumeCommand
from xray_fastai.cli.data import data_app
from xray_fastai.cli.evaluation import compare, evaluate, interpret
from xray_fastai.cli.exports import default, export, report, runs, verify
from xray_fastai.cli.inference import predict, serve
from xray_fastai.cli.next_steps import steps_in
from xray_fastai.cli.training import fit, recalibrate
from xray_fastai.system import distributed

GROUPS: dict[str, tuple[Any, ...]] = {
    "Train": (fit, recalibrate),
    "Judge": (evaluate, interpret, compare),
    "Use": (predict, serve),
    "Manage": (runs, default, report, verify, export),
}
"""The commands as `--help` groups them."""

app = typer.Typer(
    cls=Commands,
    help="Train a chest X-ray classifier by transfer learning, see where it errs, hand over the model. "
    "No medical device: for research and teaching.",
    invoke_without_command=True,
    rich_markup_mode=None,  # typer would import rich for each wrong option
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"xray-fastai {__version__}")
        raise typer.Exit


@app.callback()
def main(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show does not end the command
        with contextlib.suppress(OSError):  # of a stream whose file was replaced by a pipe
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    distributed.hush()
    if ctx.invoked_subcommand is None:
        print(steps_in(Path()))


for panel, commands in GROUPS.items():
    for command in commands:
        app.command(cls=ResumeCommand if command is fit else Command, rich_help_panel=panel)(command)
app.add_typer(data_app, name="data", cls=Commands, rich_help_panel="Data")
