"""Runs the commands: parses, prints an error as one line, and chooses the exit code."""

import gc
import os
import re
import shlex
import sys
import warnings
from itertools import pairwise
from typing import Any

import typer
import typer.core

from xray_fastai.system import distributed
from xray_fastai.system.errors import UserError
from xray_fastai.system.signals import ignore_closed_output, output_is_closed
from xray_fastai.system.threads import sleep_soon

STOPPED = (130, 143)
"""The exit codes after Ctrl-C and SIGTERM."""
DEBUG = "XRAY_FASTAI_DEBUG"
"""The environment variable that makes an unexpected error print its traceback, and libraries their warnings."""


_HOME = re.compile(r"^(--[a-z-]+=|)(~(?:/.*)?)$", re.DOTALL)


class WrongCommandLine(UserError):
    """Arguments and options that cannot stand together; the exit code is 2."""


class Commands(typer.core.TyperGroup):
    """Groups the commands. If several processes find the same wrong option, only the first prints it."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except SystemExit as stop:
            if stop.code == 2:
                distributed.give_way()
            if stop.code in STOPPED:
                gc.freeze()  # else Python's end looks for garbage, which takes 2 s of CPU time with torch
            raise


class Command(typer.core.TyperCommand):
    """Runs one command and turns its errors into one line on standard error.

    Exit codes: 1 for an error that the user can fix and for a bug, 2 for a wrong command line, 130 for Ctrl-C, 143 for
    SIGTERM, 141 if standard output was closed.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, where ~ is the home folder, also in `--data=~/x`, which a shell does not know.

        A folder without its option is refused with the option that it belongs to.
        """
        ctx.allow_extra_args = True  # refused here, where the option that was meant is known
        extra = super().parse_args(ctx, [_HOME.sub(lambda m: m[1] + os.path.expanduser(m[2]), arg) for arg in args])
        if extra:
            kind = "model" if os.path.isfile(os.path.join(extra[0], "model.json")) else "data"
            option = self.option_names().get(kind)
            meant = f"; did you mean {option} {shlex.quote(extra[0])}?" if option and os.path.isdir(extra[0]) else ""
            ctx.fail(f"Got unexpected extra argument{'s' * (len(extra) > 1)} ({' '.join(extra)}){meant}")
        return extra

    def invoke(self, ctx: Any) -> Any:
        if DEBUG not in os.environ:
            warnings.simplefilter("ignore")  # libraries warn developers, not users
        sleep_soon()
        try:
            distributed.check_command(self.name or "")
            return super().invoke(ctx)
        except UserError as error:
            text = error.on_command_line(self.option_names())
            distributed.tell("; ".join([f"Error: {text}", *getattr(error, "__notes__", [])]))
            raise typer.Exit(2 if isinstance(error, WrongCommandLine) else 1) from None
        except KeyboardInterrupt as stop:
            notes = "; ".join(getattr(stop, "__notes__", ["nothing was written."]))
            distributed.tell(f"\nStopped; {notes}")
            raise typer.Exit(143 if type(stop).__name__ == "Terminated" else 130) from None
        except typer.Exit:
            distributed.finish()
            raise
        except MemoryError:
            lower = [option for name, option in self.option_names().items() if name in ("batch_size", "size")]
            advice = f"lower {' or '.join(lower)}, or close other programs" if lower else "close other programs"
            distributed.tell(f"Error: out of memory; {advice}")
            raise typer.Exit(1) from None
        except Exception as error:
            if isinstance(error, OSError) and output_is_closed(error):
                raise typer.Exit(ignore_closed_output()) from None
            if DEBUG in os.environ:
                sys.stderr = sys.__stderr__ if distributed.rank() else sys.stderr
                raise
            text = str(error).splitlines()[0] if str(error) else ""
            distributed.tell(
                f"Error: unexpected {type(error).__name__}: {text}. This is a bug in xray-fastai: please report it "
                f"with the output of {DEBUG}=1."
            )
            raise typer.Exit(1) from None

    def option_names(self) -> dict[str, str]:
        """Return the options as the user types them, by the names of the function's parameters."""
        return {param.name: param.opts[0] for param in self.params if isinstance(param, typer.core.TyperOption)}


class ResumeCommand(Command):
    """Allows `--resume` without a value, which typer does not support: it becomes `--resume=`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        pairs = pairwise([*args, "-"])
        alone = [arg == "--resume" and follower.startswith("-") for arg, follower in pairs]
        return super().parse_args(ctx, [f"{arg}=" if a else arg for arg, a in zip(args, alone, strict=True)])
