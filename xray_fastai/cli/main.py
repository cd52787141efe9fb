"""Defines the commands: each calls one function and prints its result."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from xray_fastai import __version__
from xray_fastai.cli.command import Command, Commands, ResumeCommand
from xray_fastai.cli.data import data_app
from xray_fastai.cli.options import one_of, option_of, settings_from
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError

app = typer.Typer(
    cls=Commands,
    help="Train a chest X-ray classifier by transfer learning, see where it errs, hand over the model. "
    "No medical device: for research and teaching.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"xray-fastai {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show does not end the command
        with contextlib.suppress(OSError):  # of a stream whose file was replaced by a pipe
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    distributed.hush()


def _check_export(model: Path | None) -> None:
    """Answer a wrong --model at once; the imports of the command itself take seconds."""
    from xray_fastai.export.reader import find_export

    if distributed.rank() == 0:
        find_export(model)


Export = Annotated[
    Path | None, typer.Option("--model", metavar="EXPORT", help="Export to use. [default: the newest in ./exports]")
]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Folder of the images. [default: the folder that fit used]")
]
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


@app.command(cls=ResumeCommand)
@settings_from(FitConfig)
def fit(
    ctx: typer.Context,
    *,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[RUN]",
            help="Resume an interrupted fit with its settings: the run of this name, or the newest if no name is "
            "given. Only --data, --device, --workers, --no-cache, --exports and --open may be given with it.",
        ),
    ] = None,
    open: Open = False,
    **settings: Any,
) -> None:
    """Train on images in train/ and val/ (without any, on a synthetic data set) and write exports/RUN."""
    config = FitConfig(**settings)
    if resume is None and distributed.rank() == 0:
        _check_paths(config)
    from xray_fastai.training.fit import fit as run
    from xray_fastai.training.write_export import FitInterrupted

    try:
        if resume is None:
            result = run(config)
        else:
            result = run(resume=resume or True, **{k: v for k, v in settings.items() if _is_given(ctx, k)})
    except FitInterrupted as stop:
        result = stop.result
    if open and distributed.rank() == 0:
        _open(result.path / "report.html")
    if result.error:
        raise UserError(
            f"{result.error}; the best weights so far are in {result.path}; try a lower --lr than {result.config.lr:g}"
        )
    if result.signal:
        kept = "the best weights so far were exported" if result.history else "no epoch was completed"
        distributed.tell(f"Interrupted: {kept}.")
        raise typer.Exit(128 + result.signal)


def _check_paths(config: FitConfig) -> None:
    """Answer a wrong --data, --name or folder in --weights at once; the imports of `fit` itself take seconds."""
    from xray_fastai.data.dataset import find_root
    from xray_fastai.export.reader import export_in_weights
    from xray_fastai.export.run_folder import check_name

    check_name(config.exports, config.name)
    export_in_weights(config.weights)
    if config.data is not None:
        find_root(config.data)


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _open(report: Path) -> None:
    import webbrowser

    webbrowser.open(report.resolve().as_uri())


@app.command(cls=Command)
def evaluate(
    model: Export = None,
    data: Data = None,
    split: Annotated[
        str, typer.Option(help="Split: test, valid (the images that fit validated on) or train.")
    ] = "test",
    threshold: Annotated[
        str, typer.Option(metavar="auto|T", help="Decision threshold; auto is the one that fit chose.")
    ] = "auto",
    uncalibrated: Uncalibrated = PredictConfig.uncalibrated,
    prevalence: Prevalence = PredictConfig.prevalence,
    tta: Tta = PredictConfig.tta,
    exclude: Exclude = None,
    patients: Patients = None,
    output: Output = None,
    device: Device = PredictConfig.device,
    precision: Precision = PredictConfig.precision,
    json: Json = False,
    open: Open = False,
) -> None:
    """Measure how good a model is: metrics with 95 % intervals, a table of predictions and plots."""
    _check_export(model)
    from xray_fastai.evaluation.evaluate import evaluate as run

    result = run(
        model, data, split, threshold, uncalibrated=uncalibrated, prevalence=prevalence, tta=tta, exclude=exclude,
        patients=patients, output=output, device=device, precision=precision,
    )  # fmt: skip
    print(result.to_json() if json else result)
    if open:
        _open(result.path.parent / "report.html")


@app.command(cls=Command)
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The first export.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The second, of the same classes.")],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Folder of the images. [default: that of both fits]")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split: test, valid (the images that both validated on) or train.")
    ] = "test",
    exclude: Exclude = None,
    patients: Patients = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write to. [default: this folder]")
    ] = None,
    device: Device = PredictConfig.device,
    precision: Precision = PredictConfig.precision,
    json: Json = False,
) -> None:
    """Compare two models on the same images: paired differences of all metrics, with intervals by patient."""
    for model in (a, b):
        _check_export(model)
    from xray_fastai.evaluation.compare import compare as run

    result = run(
        a, b, data, split, exclude=exclude, patients=patients, output=output, device=device, precision=precision
    )
    print(result.to_json() if json else result)


@app.command(cls=Command)
def interpret(
    model: Export = None,
    data: Data = None,
    split: Annotated[
        str, typer.Option(help="Split: valid (the images that fit validated on), test or train.")
    ] = "valid",
    top: Annotated[int, typer.Option(min=1, help="Number of images.")] = 16,
    label: Annotated[str | None, typer.Option("--class", metavar="CLASS", help="Only images of this class.")] = None,
    only_errors: Annotated[bool, typer.Option("--only-errors", help="Only images with a wrong prediction.")] = False,
    confident: Annotated[
        bool,
        typer.Option("--confident", help="Show the correct predictions of the highest confidence, not the top losses."),
    ] = False,
    exclude: Exclude = None,
    patients: Patients = None,
    output: Output = None,
    device: Device = PredictConfig.device,
    precision: Precision = PredictConfig.precision,
    open: Open = False,
) -> None:
    """Show where a model errs and what it looks at: top losses with their Grad-CAM heat maps."""
    _check_export(model)
    from xray_fastai.evaluation.interpret import interpret as run

    result = run(
        model, data, split, top, label=label, only_errors=only_errors, confident=confident, exclude=exclude,
        patients=patients, output=output, device=device, precision=precision,
    )  # fmt: skip
    print(result)
    if open:
        _open(result.path.parent / "report.html")


@app.command(cls=Command)
def recalibrate(
    export: Annotated[
        Path | None, typer.Argument(metavar="EXPORT", help="Export to fit. [default: the newest in ./exports]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Labelled local images, in folders named as the model's classes."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Folder in --data that holds these folders. [default: --data itself]"),
    ] = None,
    unlabelled: Annotated[
        Path | None,
        typer.Option("--unlabelled", metavar="DIR", help="Local images without labels: batch norm is adapted to them."),
    ] = None,
    match_scores: Annotated[
        bool,
        typer.Option(
            "--match-scores",
            help="Instead, move the operating point so that the share of them called positive fits validation's.",
        ),
    ] = False,
    prevalence: Annotated[
        float | None,
        typer.Option(metavar="P", help="Share of positive images in --unlabelled, which --match-scores needs."),
    ] = None,
    target_sensitivity: Annotated[
        float | None,
        typer.Option(metavar="S", help="Choose the threshold for this sensitivity. [default: by Youden's J]"),
    ] = None,
    cost_ratio: Annotated[
        float | None,
        typer.Option(metavar="R", help="Choose it for R false alarms being as bad as one missed positive image."),
    ] = None,
    exclude: Exclude = None,
    patients: Annotated[
        str | None,
        typer.Option(
            "--patients",
            metavar="LIST.csv",
            help="List of the patients: a .csv file with the columns file and patient.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="New export. [default: EXPORT-recalibrated, beside EXPORT]"),
    ] = None,
    device: Device = PredictConfig.device,
) -> None:
    """Fit an export's probabilities and threshold to another place's images, and write a new export."""
    _check_export(export)
    from xray_fastai.training.recalibrate import recalibrate as run

    print(
        run(
            export, data, split, unlabelled=unlabelled, match_scores=match_scores, prevalence=prevalence,
            target_sensitivity=target_sensitivity, cost_ratio=cost_ratio, exclude=exclude, patients=patients,
            output=output, device=device,
        )
    )  # fmt: skip


@app.command(cls=Command)
@settings_from(PredictConfig)
def predict(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, folders, or - for a list of paths on standard input.")
    ],
    model: Export = None,
    **settings: Any,
) -> None:
    """Predict new images. The exit code is 1 if a file could not be read."""
    config = PredictConfig(**settings)
    _check_export(model)
    from xray_fastai.inference.predict_files import predict_command as run

    errors = run(paths, model, config)
    if errors:
        raise typer.Exit(1)


@app.command(cls=Command)
def serve(
    export: Annotated[
        Path | None, typer.Argument(metavar="EXPORT", help="Export to use. [default: the newest in ./exports]")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", metavar="EXPORT", help="The same.")] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 admits other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8080,
    prevalence: Prevalence = PredictConfig.prevalence,
    device: Device = PredictConfig.device,
    open: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Serve a page to drop images on, and POST /predict for programs. Ctrl-C ends it."""
    if export is not None and model is not None:
        raise UserError(f"{export} is given, too; leave one of them out", option="model", value=model)
    model = export if model is None else model
    _check_export(model)
    from xray_fastai.serving.server import serve as run

    run(model, host, port, prevalence=prevalence, device=device, open=open)


@app.command(cls=Command)
def verify(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export's folder, or a .zip of one.")],
) -> None:
    """Check that an export is complete and safe to load, without running anything in it.

    The exit code is 1 if it is not.
    """
    from xray_fastai.export.verification import verify as run

    result = run(export)
    print(result)
    if not result.ok:
        raise UserError(result.faults[0])


@app.command(cls=Command)
def export(
    export: Annotated[
        Path | None, typer.Argument(metavar="EXPORT", help="Export to use. [default: the newest in ./exports]")
    ] = None,
    format: Annotated[str, typer.Option(metavar="onnx", callback=one_of("onnx"), help="Output format.")] = "onnx",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write. [default: RUN.onnx in this folder]")
    ] = None,
) -> None:
    """Write an export as one ONNX file: preprocessing, network, temperature and softmax in one graph."""
    _check_export(export)
    from xray_fastai.inference.onnx_export import export_onnx

    print(export_onnx(export, output))
