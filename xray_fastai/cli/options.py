"""What commands share: how they end, and options that are told of once, in `config`."""

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps

import typer

from xray_fastai.config import HELP
from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError
from xray_fastai.system.signals import ignore_closed_output

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
            text = error.on_command_line({*inspect.signature(function).parameters, "class"})
            distributed.tell("; ".join([f"Error: {text}", *getattr(error, "__notes__", [])]))
            raise typer.Exit(1) from None
        except KeyboardInterrupt as stop:
            what = "; ".join(getattr(stop, "__notes__", ["nothing was written."]))
            distributed.tell(f"\nStopped; {what}")
            raise typer.Exit(143 if type(stop).__name__ == "Terminated" else 130) from None
        except typer.Exit:
            distributed.finish()
            raise
        except BrokenPipeError:
            raise typer.Exit(ignore_closed_output()) from None
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


def option(name: str, **kwargs):
    return typer.Option(f"--{name.replace('_', '-')}", help=HELP[name], **kwargs)


def one_of(*choices: str) -> Callable:
    def check(value: str | None) -> str | None:
        if value is not None and value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}.")
        return value

    return check


def choice(name: str, choices: tuple[str, ...]):
    return option(name, callback=one_of(*choices), metavar="|".join(choices) if len(choices) < 5 else "NAME")
