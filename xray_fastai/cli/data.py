"""The commands `xray-fastai data …`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from xray_fastai.cli.options import command, option
from xray_fastai.system.errors import UserError

data_app = typer.Typer(help="Data sets: get the public one, check one, draw a synthetic one.", no_args_is_help=True)


@data_app.command()
@command
def check(
    folder: Annotated[Path | None, typer.Argument(metavar="DIR", help="[default: ./chest_xray, else phantom]")] = None,
    patient_pattern: Annotated[str | None, option("patient_pattern", metavar="REGEX")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all that was found as JSON.")] = False,
    fix: Annotated[
        Path | None, typer.Option(metavar="LIST.csv", help="Write a list of the files to leave out, for fit --exclude.")
    ] = None,
) -> None:
    """What is wrong with a data set. Exit code 1 where something would spoil a result."""
    from xray_fastai.data.audit.check import check_data
    from xray_fastai.system.files import check_new
    from xray_fastai.system.text import count_of

    if fix is not None:
        check_new(fix, "fix")
    result = check_data(folder, patient_pattern)
    print(result.to_json() if json else result)
    if fix is not None:
        result.write_fix(fix)
        if not json:
            told = f"{'written':<9}{fix}, {count_of(len(result.left_out), 'file')} to leave out"
            print(told + (": look it through, then" if result.left_out else ""))
        if not json and result.left_out:
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
    from xray_fastai.data.sources.kermany import obtain

    print(obtain(folder, url, archive))


@data_app.command()
@command
def phantom(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is not there yet, or empty.")],
    images: Annotated[int, typer.Option(help="How many.")] = 600,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
) -> None:
    """Draw synthetic chest X-rays into DIR/{train,val,test}/{NORMAL,PNEUMONIA}: for rehearsal and tests."""
    from xray_fastai.data.sources.phantom import write

    try:
        write(folder, images, seed)
    except FileExistsError:
        raise UserError(f"{folder}: is there already and not empty; give a new folder") from None
    except ValueError as error:
        raise UserError(f"{error}", option="images", value=images) from None
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror})") from None
    print(f"{images} synthetic X-rays in {folder}; next: xray-fastai fit --data {folder}")


@data_app.command()
@command
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete them.")] = False,
) -> None:
    """The decoded images that fits keep in the user's cache folder: how many files, where, how large."""
    from xray_fastai.data import pixel_cache
    from xray_fastai.system.text import count_of, format_bytes

    files = pixel_cache.kept()
    size = pixel_cache.clear() if clear else sum(file.stat().st_size for file in files)
    print(
        f"{pixel_cache.folder()}: {format_bytes(size)} in {count_of(len(files), 'file')}"
        + (", deleted" if clear else "")
    )
