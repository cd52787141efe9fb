"""The command line: parses, calls one function, prints what came back."""

from pathlib import Path
from typing import Annotated

import typer
import typer.core

from xray_fastai import __version__
from xray_fastai.cli.data import data_app
from xray_fastai.cli.options import choice, command, one_of, option
from xray_fastai.config import (
    ARCHITECTURES,
    AUGMENTATIONS,
    CONTRASTS,
    DEVICES,
    HELP,
    INFERENCE_PRECISIONS,
    PRECISIONS,
    RECIPES,
    SCHEDULES,
    FitConfig,
    PredictConfig,
)
from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError


class Commands(typer.core.TyperGroup):
    """The program's commands; of several processes that find the same wrong option, the first says so."""

    def main(self, *args, **kwargs):
        try:
            return super().main(*args, **kwargs)
        except SystemExit as stop:
            if stop.code == 2:
                distributed.give_way()
            raise


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


def _version(wanted: bool) -> None:
    if wanted:
        print(f"xray-fastai {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    distributed.hush()


class ResumeCommand(typer.core.TyperCommand):
    """`--resume` may stand without the name of a run; typer has no options whose value may be left out."""

    def parse_args(self, ctx, args):
        ahead = [*args, "-"][1:]
        newest = [arg == "--resume" and follower.startswith("-") for arg, follower in zip(args, ahead, strict=True)]
        return super().parse_args(ctx, [f"{a}=" if alone else a for a, alone in zip(args, newest, strict=True)])


@app.command(cls=ResumeCommand)
@command
def fit(
    ctx: typer.Context,
    data: Annotated[str | None, option("data", metavar="DIR")] = FitConfig.data,
    epochs: Annotated[int, option("epochs", min=1)] = FitConfig.epochs,
    freeze_epochs: Annotated[int | None, option("freeze_epochs", min=0)] = FitConfig.freeze_epochs,
    frozen_views: Annotated[int, option("frozen_views", min=0)] = FitConfig.frozen_views,
    patience: Annotated[int, option("patience", min=1)] = FitConfig.patience,
    batch_size: Annotated[int, option("batch_size", min=1)] = FitConfig.batch_size,
    lr: Annotated[float, option("lr")] = FitConfig.lr,
    size: Annotated[int | None, option("size", min=32)] = FitConfig.size,
    arch: Annotated[str, choice("arch", tuple(ARCHITECTURES))] = FitConfig.arch,
    weights: Annotated[str | None, option("weights", metavar="imagenet|none|FILE")] = FitConfig.weights,
    recipe: Annotated[str, choice("recipe", tuple(RECIPES))] = FitConfig.recipe,
    contrast: Annotated[str | None, choice("contrast", CONTRASTS)] = FitConfig.contrast,
    augment: Annotated[str | None, choice("augment", AUGMENTATIONS)] = FitConfig.augment,
    schedule: Annotated[str | None, choice("schedule", SCHEDULES)] = FitConfig.schedule,
    class_weights: Annotated[
        str | None, option("class_weights", metavar="balanced|none|LIST")
    ] = FitConfig.class_weights,
    dropout: Annotated[float, option("dropout")] = FitConfig.dropout,
    valid: Annotated[str, option("valid", metavar="auto|folder|FRACTION")] = FitConfig.valid,
    positive: Annotated[str | None, option("positive", metavar="CLASS")] = FitConfig.positive,
    target_sensitivity: Annotated[float | None, option("target_sensitivity")] = FitConfig.target_sensitivity,
    patient_pattern: Annotated[str | None, option("patient_pattern", metavar="REGEX")] = FitConfig.patient_pattern,
    skip_bad: Annotated[bool, option("skip_bad")] = FitConfig.skip_bad,
    exclude: Annotated[str | None, option("exclude", metavar="LIST.csv")] = FitConfig.exclude,
    seed: Annotated[int, option("seed")] = FitConfig.seed,
    device: Annotated[str, choice("device", DEVICES)] = FitConfig.device,
    precision: Annotated[str, choice("precision", PRECISIONS)] = FitConfig.precision,
    workers: Annotated[int | None, option("workers", min=0)] = FitConfig.workers,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help=HELP["cache"])] = FitConfig.cache,
    name: Annotated[str | None, option("name", metavar="RUN")] = FitConfig.name,
    exports: Annotated[str, option("exports", metavar="DIR")] = FitConfig.exports,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[RUN]",
            help="Go on with a fit that crashed or was interrupted, with its settings; without RUN, with the newest. "
            "Only --data, --device, --workers, --no-cache, --exports and --open may be given beside it.",
        ),
    ] = None,
    open: Annotated[bool, typer.Option("--open", help="Show report.html in the browser at the end.")] = False,
) -> None:
    """Train on split folders (or, without data, on the built-in rehearsal) and write exports/RUN."""
    settings = {option: value for option, value in locals().items() if option in HELP}
    if resume is None:
        settings = {"config": FitConfig(**settings)}
    else:  # those that stand on the command line
        settings = {k: v for k, v in settings.items() if ctx.get_parameter_source(k).name == "COMMANDLINE"}
    from xray_fastai.training.fit import fit as run

    result = run(**settings, resume=False if resume is None else resume or True)
    if open and distributed.rank() == 0:
        _open(result.path / "report.html")
    if result.error:
        raise UserError(
            f"{result.error}; the best weights so far are in {result.path}; try a lower --lr than {result.config.lr:g}"
        )
    if result.signal:
        distributed.tell("Interrupted: the best weights so far were exported.")
        raise typer.Exit(128 + result.signal)


Export = Annotated[Path | None, typer.Option("--model", metavar="EXPORT", help="[default: the newest in ./exports]")]
Data = Annotated[Path | None, typer.Option("--data", metavar="DIR", help="[default: the folder that fit used]")]
Device = Annotated[str, choice("device", DEVICES)]
Precision = Annotated[
    str,
    typer.Option(
        "--precision", metavar="|".join(INFERENCE_PRECISIONS), help="auto: bf16 where the model was trained in it."
    ),
]
Output = Annotated[Path | None, typer.Option("--output", metavar="DIR", help="Write there, not into the export.")]
Tta = Annotated[bool, typer.Option("--tta", help="Test-time augmentation: the mean over five views of an image.")]
Open = Annotated[bool, typer.Option("--open", help="Show report.html in the browser.")]


def _open(report: Path) -> None:
    import webbrowser

    webbrowser.open(report.resolve().as_uri())


@app.command()
@command
def evaluate(
    model: Export = None,
    data: Data = None,
    split: Annotated[str, typer.Option(help="test, valid (what fit validated on) or train.")] = "test",
    threshold: Annotated[
        str, typer.Option(metavar="auto|T", help="Decision threshold: auto is the one that fit chose.")
    ] = "auto",
    uncalibrated: Annotated[bool, typer.Option("--uncalibrated", help="Without the temperature.")] = False,
    tta: Tta = False,
    output: Output = None,
    device: Device = "auto",
    precision: Precision = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
    open: Open = False,
) -> None:
    """How good a model is: metrics with 95 % intervals, a table of predictions and plots."""
    from xray_fastai.evaluation.evaluate import evaluate as run

    result = run(
        model, data, split, threshold, uncalibrated=uncalibrated, tta=tta, output=output, device=device,
        precision=precision,
    )  # fmt: skip
    print(result.to_json() if json else result)
    if open:
        _open(result.path.parent / "report.html")


@app.command()
@command
def interpret(
    model: Export = None,
    data: Data = None,
    split: Annotated[str, typer.Option(help="valid (what fit validated on), test or train.")] = "valid",
    top: Annotated[int, typer.Option(min=1, help="How many images.")] = 16,
    label: Annotated[str | None, typer.Option("--class", metavar="CLASS", help="Only images of this class.")] = None,
    only_errors: Annotated[bool, typer.Option("--only-errors", help="Only images called wrongly.")] = False,
    confident: Annotated[
        bool, typer.Option("--confident", help="Instead, the images called rightly with the highest confidence.")
    ] = False,
    output: Output = None,
    device: Device = "auto",
    precision: Precision = "auto",
    open: Open = False,
) -> None:
    """Where a model errs, and what it looks at: top losses beside their Grad-CAM heat maps."""
    from xray_fastai.evaluation.interpret import interpret as run

    result = run(
        model, data, split, top, label=label, only_errors=only_errors, confident=confident, output=output,
        device=device, precision=precision,
    )  # fmt: skip
    print(result)
    if open:
        _open(result.path.parent / "report.html")


@app.command()
@command
def predict(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files, folders, or - for a list of paths.")],
    model: Export = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="A .csv or .jsonl file to write.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an --output that was cut short.")] = False,
    heatmaps: Annotated[Path | None, typer.Option(metavar="DIR", help="Write Grad-CAM overlays there.")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Folders with what is below them.")] = False,
    threshold: Annotated[float | None, typer.Option(min=0, max=1, help="[default: the one that fit chose]")] = None,
    uncalibrated: Annotated[bool, typer.Option("--uncalibrated", help="Without the temperature.")] = False,
    tta: Tta = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """What a model says of new images. Exit code 1 where a file could not be read."""
    from xray_fastai.inference.predict_files import predict_command as run

    config = PredictConfig(
        output=output, resume=resume, heatmaps=heatmaps, recursive=recursive, threshold=threshold,
        uncalibrated=uncalibrated, tta=tta, batch_size=batch_size, device=device, precision=precision,
    )  # fmt: skip
    bad = run(paths, model, config)
    if bad:
        raise typer.Exit(1)


@app.command()
@command
def serve(
    model: Export = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="To listen on; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    device: Device = "auto",
    open: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """A page to drop images on, and POST /predict for programs. Ctrl-C ends it."""
    from xray_fastai.serving.server import serve as run

    run(model, host, port, device=device, open=open)


@app.command()
@command
def verify(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export's folder, or a .zip of one.")],
) -> None:
    """Is an export whole, and safe to load? Exit code 1 where it is not. Nothing in it is run."""
    from xray_fastai.export.verification import verify as run

    found = run(export)
    print(found)
    if not found.ok:
        raise UserError(found.faults[0])


@app.command()
@command
def export(
    export: Annotated[Path | None, typer.Argument(metavar="EXPORT", help="[default: the newest in ./exports]")] = None,
    format: Annotated[str, typer.Option(metavar="onnx", callback=one_of("onnx"), help="Of the file.")] = "onnx",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="[default: RUN.onnx in this folder]")] = None,
) -> None:
    """An export as one file for other runtimes: preprocessing, network, temperature and softmax in one graph."""
    from xray_fastai.inference.onnx_export import export_onnx

    print(export_onnx(export, output))
