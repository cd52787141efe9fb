"""The command line: parses, calls one function, prints what came back."""

import os
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from xray_fastai import __version__, distributed
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
)
from xray_fastai.errors import UserError

app = typer.Typer(
    help="Train a chest X-ray classifier by transfer learning, see where it errs, hand over the model. "
    "No medical device: for research and teaching.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets: get the public one, check one, draw a synthetic one.", no_args_is_help=True)
app.add_typer(data_app, name="data")

DEBUG = "XRAY_FASTAI_DEBUG"


def command(function: Callable) -> Callable:
    """One line and exit code 1 for what the user can mend, 130 for Ctrl-C; never a traceback, unless asked for."""

    @wraps(function)
    def wrapped(*args, **kwargs):
        if DEBUG not in os.environ:
            warnings.simplefilter("ignore")  # the libraries' notes to developers
        try:
            distributed.check_command(function.__name__)
            return function(*args, **kwargs)
        except UserError as error:
            distributed.tell("; ".join([f"Error: {error}", *getattr(error, "__notes__", [])]))
            raise typer.Exit(1) from None
        except KeyboardInterrupt as stop:
            what = "; ".join(getattr(stop, "__notes__", ["nothing was written."]))
            distributed.tell(f"\nStopped; {what}")
            raise typer.Exit(143 if type(stop).__name__ == "Terminated" else 130) from None
        except typer.Exit:
            distributed.finish()
            raise
        except BrokenPipeError:  # nobody reads standard output any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which Python flushes once more at its end
            raise typer.Exit(141) from None
        except Exception as error:
            if DEBUG in os.environ:
                sys.stderr = sys.__stderr__ if distributed.rank() else sys.stderr
                raise
            text = str(error).splitlines()[0] if str(error) else ""
            distributed.tell(
                f"Error: unexpected {type(error).__name__}: {text}. This is a bug in xray-fastai: please report it "
                f"with what {DEBUG}=1 shows."
            )
            raise typer.Exit(1) from None

    return wrapped


def _version(wanted: bool) -> None:
    if wanted:
        print(f"xray-fastai {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    distributed.hush()


def _option(name: str, **kwargs):
    return typer.Option(f"--{name.replace('_', '-')}", help=HELP[name], **kwargs)


def _one_of(*choices: str) -> Callable:
    def check(value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}.")
        return value

    return check


def _choice(name: str, choices: tuple[str, ...]):
    return _option(name, callback=_one_of(*choices), metavar="|".join(choices) if len(choices) < 5 else "NAME")


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
    data: Annotated[str | None, _option("data", metavar="DIR")] = FitConfig.data,
    epochs: Annotated[int, _option("epochs", min=1)] = FitConfig.epochs,
    freeze_epochs: Annotated[int | None, _option("freeze_epochs", min=0)] = FitConfig.freeze_epochs,
    patience: Annotated[int, _option("patience", min=1)] = FitConfig.patience,
    batch_size: Annotated[int, _option("batch_size", min=1)] = FitConfig.batch_size,
    lr: Annotated[float, _option("lr")] = FitConfig.lr,
    size: Annotated[int | None, _option("size", min=32)] = FitConfig.size,
    arch: Annotated[str, _choice("arch", ARCHITECTURES)] = FitConfig.arch,
    weights: Annotated[str | None, _option("weights", metavar="imagenet|none|FILE")] = FitConfig.weights,
    recipe: Annotated[str, _choice("recipe", tuple(RECIPES))] = FitConfig.recipe,
    contrast: Annotated[str | None, _choice("contrast", CONTRASTS)] = FitConfig.contrast,
    augment: Annotated[str | None, _choice("augment", AUGMENTATIONS)] = FitConfig.augment,
    schedule: Annotated[str | None, _choice("schedule", SCHEDULES)] = FitConfig.schedule,
    class_weights: Annotated[
        str | None, _option("class_weights", metavar="balanced|none|LIST")
    ] = FitConfig.class_weights,
    dropout: Annotated[float, _option("dropout")] = FitConfig.dropout,
    valid: Annotated[str, _option("valid", metavar="auto|folder|FRACTION")] = FitConfig.valid,
    positive: Annotated[str | None, _option("positive", metavar="CLASS")] = FitConfig.positive,
    target_sensitivity: Annotated[float | None, _option("target_sensitivity")] = FitConfig.target_sensitivity,
    patient_pattern: Annotated[str | None, _option("patient_pattern", metavar="REGEX")] = FitConfig.patient_pattern,
    skip_bad: Annotated[bool, _option("skip_bad")] = FitConfig.skip_bad,
    exclude: Annotated[str | None, _option("exclude", metavar="LIST.csv")] = FitConfig.exclude,
    seed: Annotated[int, _option("seed")] = FitConfig.seed,
    device: Annotated[str, _choice("device", DEVICES)] = FitConfig.device,
    precision: Annotated[str, _choice("precision", PRECISIONS)] = FitConfig.precision,
    workers: Annotated[int | None, _option("workers", min=0)] = FitConfig.workers,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help=HELP["cache"])] = FitConfig.cache,
    name: Annotated[str | None, _option("name", metavar="RUN")] = FitConfig.name,
    exports: Annotated[str, _option("exports", metavar="DIR")] = FitConfig.exports,
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
    from xray_fastai.training import fit as run

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
Device = Annotated[str, _choice("device", DEVICES)]
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
    from xray_fastai.evaluation import evaluate as run

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
    open: Open = False,
) -> None:
    """Where a model errs, and what it looks at: top losses beside their Grad-CAM heat maps."""
    from xray_fastai.interpretation import interpret as run

    result = run(
        model, data, split, top, label=label, only_errors=only_errors, confident=confident, output=output, device=device
    )
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
    from xray_fastai.shards import predict_command as run

    bad = run(
        paths, model, output=output, resume=resume, heatmaps=heatmaps, recursive=recursive, threshold=threshold,
        uncalibrated=uncalibrated, tta=tta, batch_size=batch_size, device=device, precision=precision,
    )  # fmt: skip
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
    from xray_fastai.server import serve as run

    run(model, host, port, device=device, open=open)


@app.command()
@command
def verify(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="An export's folder, or a .zip of one.")],
) -> None:
    """Is an export whole, and safe to load? Exit code 1 where it is not. Nothing in it is run."""
    from xray_fastai.verification import verify as run

    found = run(export)
    print(found)
    if not found.ok:
        raise UserError(found.faults[0])


@app.command()
@command
def export(
    export: Annotated[Path | None, typer.Argument(metavar="EXPORT", help="[default: the newest in ./exports]")] = None,
    format: Annotated[str, typer.Option(metavar="onnx", callback=_one_of("onnx"), help="Of the file.")] = "onnx",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="[default: RUN.onnx in this folder]")] = None,
) -> None:
    """An export as one file for other runtimes: preprocessing, network, temperature and softmax in one graph."""
    from xray_fastai.onnx_export import export_onnx

    print(export_onnx(export, output))


@data_app.command()
@command
def check(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="[default: ./chest_xray, else phantom]")] = None,
    patient_pattern: Annotated[str | None, _option("patient_pattern", metavar="REGEX")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all that was found as JSON.")] = False,
    fix: Annotated[
        Path | None, typer.Option(metavar="LIST.csv", help="Write a list of the files to leave out, for fit --exclude.")
    ] = None,
) -> None:
    """What is wrong with a data set. Exit code 1 where something would spoil a result."""
    from xray_fastai.audit import check_data
    from xray_fastai.fixlist import check_new
    from xray_fastai.rowfile import count_of

    if fix is not None:
        check_new(fix)
    result = check_data(folder, patient_pattern)
    print(result.to_json() if json else result)
    if fix is not None:
        result.write_fix(fix)
        if not json:
            print(f"{'written':<9}{fix}, {count_of(len(result.left_out), 'file')} to leave out: look it through, then")
            options = [] if folder is None else ["--data", str(folder)]
            print(f"{'':9}{shlex.join(['xray-fastai', 'fit', *options, '--exclude', str(fix)])}")
    if not result.ok:
        raise typer.Exit(1)


@data_app.command()
@command
def download(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet, or empty.")] = Path(
        "chest_xray"
    ),
    url: Annotated[str | None, typer.Option(metavar="URL", help="Another address of the archive.")] = None,
    archive: Annotated[Path | None, typer.Option(metavar="FILE", help="Unpack a .zip that is here already.")] = None,
) -> None:
    """Get the public collection (5,856 X-rays, 1.2 GB, CC BY 4.0) into DIR/{train,test}/{NORMAL,PNEUMONIA}.

    A download that broke off is gone on with by the same command.
    """
    from xray_fastai.collection import obtain

    print(obtain(folder, url, archive))


@data_app.command()
@command
def phantom(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet, or empty.")],
    images: Annotated[int, typer.Option(help="How many.")] = 600,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
) -> None:
    """Draw synthetic chest X-rays into DIR/{train,val,test}/{NORMAL,PNEUMONIA}: for rehearsal and tests."""
    from xray_fastai.phantom import write

    try:
        write(folder, images, seed)
    except FileExistsError:
        raise UserError(f"{folder}: is there already and not empty; give a new folder") from None
    except ValueError as error:
        raise UserError(f"--images {images}: {error}") from None
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror})") from None
    print(f"{images} synthetic X-rays in {folder}; next: xray-fastai fit --data {folder}")


@data_app.command()
@command
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete them.")] = False,
) -> None:
    """The decoded images that fits keep in the user's cache folder: how many files, where, how large."""
    from xray_fastai import pixelcache

    files = pixelcache.kept()
    size = pixelcache.clear() if clear else sum(file.stat().st_size for file in files)
    print(f"{pixelcache.folder()}: {pixelcache.told(size)} in {len(files)} files" + (", deleted" if clear else ""))
