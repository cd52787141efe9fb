"""Defines the commands `xray-fastai data …`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

import xray_fastai
from xray_fastai.cli.command import Command
from xray_fastai.cli.options import option_of
from xray_fastai.cli.shared import Column, Images
from xray_fastai.config.fit_config import FitConfig
from xray_fastai.system.errors import UserError
from xray_fastai.system.files import CACHE_ADVICE, cache_dir, check_new
from xray_fastai.system.text import count_of

data_app = typer.Typer(help="Check a data set, download the public one, or draw a synthetic one.", no_args_is_help=True)

NewFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")]


@data_app.command(cls=Command)
def check(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR|FILE",
            help="Folder of the data set, or a table of images, as .csv. [default: ./chest_xray, else phantom]",
        ),
    ] = None,
    images: Images = None,
    column: Column = None,
    positive: Annotated[str | None, option_of(FitConfig, "positive")] = FitConfig.positive,
    patient_pattern: Annotated[str | None, option_of(FitConfig, "patient_pattern")] = FitConfig.patient_pattern,
    patients: Annotated[str | None, option_of(FitConfig, "patients")] = FitConfig.patients,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    fix: Annotated[
        Path | None, typer.Option(metavar="LIST.csv", help="Write a list of the files to leave out, for fit --exclude.")
    ] = None,
) -> None:
    """Find what is wrong with a data set.

    The exit code is 1 if something would make the results wrong.
    """
    if fix is not None:
        check_new(fix, "fix")
    result = xray_fastai.check_data(
        folder, patient_pattern, patients=patients, images=images, column=column, positive=positive
    )
    print(result.to_json() if json else result)
    if fix is not None:
        result.write_fix(fix)
        if not json:
            _print_fix(folder, fix, len(result.left_out))
    if not result.ok:
        raise typer.Exit(1)


def _print_fix(folder: Path | None, fix: Path, count: int) -> None:
    line = f"{'written':<9}{fix}, {count_of(count, 'file')} to leave out"
    if count == 0:
        print(line)
        return
    print(f"{line}; read the list, then run")
    options = [] if folder is None else ["--data", str(folder)]
    print(f"{'':9}{shlex.join(['xray-fastai', 'fit', *options, '--exclude', str(fix)])}")


@data_app.command(cls=Command)
def split(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder of classes, or with train/ and val/; or a table as .csv.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .csv file; with --links or --copy a new folder.")],
    test: Annotated[float, typer.Option(metavar="FRACTION", help="Share of the images for testing.")] = 0.2,
    by: Annotated[
        str, typer.Option(metavar="NAME", help="What stays on one side: patient, or NAME of --column NAME=HEADER.")
    ] = "patient",
    seed: Annotated[int, typer.Option(help="Random seed.", min=0, max=2**32 - 1)] = 42,
    links: Annotated[bool, typer.Option("--links", help="Write folders of links to the images.")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Write folders of copies of the images.")] = False,
    images: Images = None,
    column: Column = None,
    positive: Annotated[str | None, option_of(FitConfig, "positive")] = FitConfig.positive,
    patient_pattern: Annotated[str | None, option_of(FitConfig, "patient_pattern")] = FitConfig.patient_pattern,
    patients: Annotated[str | None, option_of(FitConfig, "patients")] = FitConfig.patients,
) -> None:
    """Divide images into training and test, by patient and stratified by class, for fit and evaluate."""
    from xray_fastai.data.patients import patient_rule
    from xray_fastai.data.split import Wanted, split_data
    from xray_fastai.data.table import Source, check_for_table
    from xray_fastai.data.table_labels import Naming

    if links and copy:
        raise UserError("give one of links=True and copy=True", option="copy")
    check_for_table(source, images, column)
    wanted = Wanted(test, by, seed, "links" if links else "copies" if copy else "table")
    rule = patient_rule(patient_pattern, patients)
    division = split_data(Source(source, images, column, Naming(positive)), out, wanted, rule)
    print(division)
    print(f"{'next':<10}{shlex.join(['xray-fastai', *division.next_command])}")


@data_app.command(cls=Command)
def download(
    folder: NewFolder = Path("chest_xray"),
    url: Annotated[str | None, typer.Option(metavar="URL", help="Download the archive from this address.")] = None,
    archive: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Unpack this .zip file instead of downloading it.")
    ] = None,
) -> None:
    """Download the public data set (5,856 X-rays, 1.2 GB, CC BY 4.0) into DIR/{train,test}/{NORMAL,PNEUMONIA}.

    To resume an interrupted download, run the same command again.
    """
    from xray_fastai.data.sources.kermany import obtain

    print(obtain(folder, url, archive))


@data_app.command(cls=Command)
def phantom(
    folder: NewFolder,
    images: Annotated[int, typer.Option(help="Number of images.")] = 510,
    seed: Annotated[int, typer.Option(help="Random seed.", min=0)] = 0,
) -> None:
    """Draw synthetic chest X-rays into DIR/{train,val,test}/{NORMAL,PNEUMONIA}, for rehearsals and tests."""
    from xray_fastai.data.sources.phantom import write

    try:
        write(folder, images, seed)
    except FileExistsError:
        raise UserError(f"{folder}: already exists and is not empty; give a new folder") from None
    except ValueError as error:
        raise UserError(str(error), option="images", value=images) from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give another folder") from None
    print(f"{images} synthetic X-rays in {folder}; next: xray-fastai fit --data {folder}")


@data_app.command(cls=Command)
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete the decoded images.")] = False,
) -> None:
    """Show the decoded images that fits keep in the user's cache folder: where, how many, how large."""
    from rich.filesize import decimal

    from xray_fastai.data import pixel_cache

    try:
        files = pixel_cache.cache_files()
    except OSError as error:
        raise UserError(f"no cache folder ({error.strerror}); {CACHE_ADVICE}") from None
    size = pixel_cache.clear() if clear else sum(file.stat().st_size for file in files)
    deleted = ", deleted" if clear else ""
    print(f"{cache_dir()}: {decimal(size)} in {count_of(len(files), 'file')}{deleted}")
