"""Runs the commands: parses, prints an error as one line, and chooses the exit code."""

import gc
import os
import re
import shlex
import signal
import sys
import warnings
from itertools import pairwise
from typing import Any

import typer
import typer.core

from xray_fastai.cli.names import near_command, near_option
from xray_fastai.cli.parameters import kind_of
from xray_fastai.system import distributed
from xray_fastai.system.errors import OptionError, UserError
from xray_fastai.system.signals import ignore_closed_output, output_is_closed
from xray_fastai.system.text import shown
from xray_fastai.system.threads import sleep_soon

STOPPED = (129, 130, 143)
"""The exit codes after SIGHUP, Ctrl-C and SIGTERM."""
DEBUG = "XRAY_FASTAI_DEBUG"
"""The environment variable that makes an unexpected error print its traceback, and libraries their warnings."""


USAGE_ERROR: Any = typer.BadParameter.__base__
"""click's UsageError: newer versions of typer have a copy of click, which has no public name."""

_HOME = re.compile(r"^(--[a-z-]+=|)(~(?:/.*)?)$", re.DOTALL)
_ASSIGNMENT = re.compile(r"([a-z_]+)=(.+)", re.DOTALL)


class WrongValue(typer.BadParameter):
    """A value that an option does not take; the message says what to give."""


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

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; an option of a command that stands before it is answered by the command."""
        try:
            rest: list[str] = super().parse_args(ctx, args)
        except USAGE_ERROR as error:
            if not hasattr(error, "possibilities"):
                raise
            option = error.option_name
            owners = [name for name, command in self.commands.items() if option in options_of(command)]
            meant = f"{owners[0]} {option}" if owners else near_option(option, options_of(self))
            error.message = f"No such option: {option}; " + (f"did you mean {meant}?" if meant else "see --help")
            error.possibilities = None
            raise
        return rest

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments begin with; an unknown one is answered by the one that is meant."""
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing and not args[0].startswith("-"):
            path_command = _command_for(args[0]) if ctx.parent is None else None
            meant = path_command or near_command(args[0], self.names())
            advice = f"; did you mean '{ctx.command_path} {meant}'?" if meant else f"; see '{ctx.command_path} --help'"
            ctx.fail(f"No such command '{shown(args[0])}'{advice}")
        return super().resolve_command(ctx, args)

    def names(self) -> list[str]:
        """Return what may follow this group's name: its commands, those of its groups, and its options."""
        inner = [f"{name} {sub}" for name, group in self.commands.items() for sub in getattr(group, "commands", ())]
        return [*self.commands, *inner, *options_of(self)]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _write_help(self, ctx, formatter)


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
        args = [_HOME.sub(lambda m: m[1] + os.path.expanduser(m[2]), arg) for arg in args]
        try:
            extra = super().parse_args(ctx, list(args))
        except USAGE_ERROR as error:
            if (text := self._in_our_words(error, args)) is None:
                raise
            ctx.fail(text)
        if ctx.resilient_parsing:  # for completion
            return extra
        for argument in [*(str(ctx.params.get(name) or "") for name in ("folder", "export")), *extra]:
            assigned = _ASSIGNMENT.fullmatch(argument)
            if assigned and assigned[1] in self.option_names() and not os.path.exists(argument):
                ctx.fail(f"{argument}: did you mean {self.option_names()[assigned[1]]} {shlex.quote(assigned[2])}?")
        if extra:
            kind = "model" if os.path.isfile(os.path.join(extra[0], "model.json")) else "data"
            option = self.option_names().get(kind)
            meant = f"; did you mean {option} {shlex.quote(extra[0])}?" if option and os.path.isdir(extra[0]) else ""
            ctx.fail(f"Got unexpected extra argument{'s' * (len(extra) > 1)} ({' '.join(extra)}){meant}")
        return extra

    def _in_our_words(self, error: Any, args: list[str]) -> str | None:
        """Return what is wrong with a command line; None where click's own words are good."""
        if hasattr(error, "possibilities"):
            meant = near_option(error.option_name, options_of(self))
            return f"No such option: {error.option_name}; " + (f"did you mean {meant}?" if meant else "see --help")
        if hasattr(error, "option_name"):
            return f"{error.option_name}: give a value"
        param = getattr(error, "param", None)
        if not isinstance(param, typer.core.TyperOption) or error.message == "":  # an option that is missing
            return None
        value = _value_of(args, param.opts)
        advice = error.message if isinstance(error, WrongValue) else kind_of(self, param.name).advice()
        return f"{param.opts[0]}{'' if value is None else f' {shown(value)}'}: {advice}"

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
            raise typer.Exit(2 if isinstance(error, OptionError) else 1) from None
        except KeyboardInterrupt as stop:
            notes = "; ".join(getattr(stop, "__notes__", ["nothing was written."]))
            distributed.tell(f"\nStopped; {notes}")
            raise typer.Exit(128 + getattr(stop, "number", signal.SIGINT)) from None
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

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _write_help(self, ctx, formatter)


class ResumeCommand(Command):
    """Allows `--resume` without a value, which typer does not support: it becomes `--resume=`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        pairs = pairwise([*args, "-"])
        alone = [arg == "--resume" and follower.startswith("-") for arg, follower in pairs]
        return super().parse_args(ctx, [f"{arg}=" if a else arg for arg, a in zip(args, alone, strict=True)])


def options_of(command: Any) -> list[str]:
    """Return all options of a command as the user types them."""
    options = [option for param in command.params for option in (*param.opts, *param.secondary_opts)]
    return [*(option for option in options if option[0] == "-"), "--help"]


def _write_help(command: Any, ctx: Any, formatter: Any) -> None:
    from xray_fastai.cli.help import render_help  # it needs rich, which only --help pays for

    formatter.write(render_help(command, ctx))


def _value_of(args: list[str], options: list[str]) -> str | None:
    """Return the last value that a command line gives to an option."""
    values = [value for option, value in pairwise(args) if option in options]
    values += [arg.partition("=")[2] for arg in args if arg.partition("=")[0] in options and "=" in arg]
    return values[-1] if values else None


def _command_for(path: str) -> str | None:
    """Return the command for a path that was given in place of one."""
    if os.path.isfile(path):
        return f"predict {shlex.quote(path)}"
    if os.path.isdir(path):
        command = "evaluate" if os.path.isfile(os.path.join(path, "model.json")) else "fit"
        return f"{command} {shlex.quote(path)}"
    return None
