"""Prints a command's help: what it does, its options in panels by purpose, and examples.

Only `--help` imports this module, which needs rich. Typer's own rich help divides a line into six columns, of which the
last is a few letters wide on a terminal of 40 columns; here an option has two columns, or two lines where it is narrow.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import typer.core
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from xray_fastai.cli.examples import EXAMPLES
from xray_fastai.cli.parameters import kind_of
from xray_fastai.config.setting import PANELS

MAX_WIDTH = 100
"""Columns of the text: longer lines are hard to read."""
NARROW = 60
"""Below this number of columns an option's text stands below the option, without a frame."""
COLUMN = 28
"""Columns of an option with its value; a longer value stands on the next line."""
METAVARS = {int: "N", float: "X"}

Row = tuple[Text, Text]


def render_help(command: Any, ctx: Any) -> str:
    """Return the help text of a command or a group of commands, in colours if standard output is a terminal."""
    console = Console(highlight=False, emoji=False)
    console.width = min(console.width, MAX_WIDTH)
    with console.capture() as capture:
        console.print(Text(command.get_usage(ctx), style="bold"))
        for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
            console.print()
            console.print(" ".join(paragraph.split()), markup=False)
        console.print()
        for title, rows in _panels(command, ctx):
            _print_panel(console, title, rows)
        if examples := EXAMPLES.get(" ".join(ctx.command_path.split()[1:])):
            _print_examples(console, examples)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _panels(command: Any, ctx: Any) -> Iterable[tuple[str, list[Row]]]:
    """List the titles and rows of the panels: commands, then arguments, then options by purpose."""
    panels: dict[str, list[Row]] = {}
    for name, member in getattr(command, "commands", {}).items():
        text = " ".join(inspect.cleandoc(member.help or "").split("\n\n")[0].split())
        panels.setdefault(member.rich_help_panel or "Commands", []).append((Text(name, style="bold cyan"), Text(text)))
    yield from panels.items()
    panels = {}
    for param in command.get_params(ctx):
        if not getattr(param, "hidden", False):
            default = "Arguments" if isinstance(param, typer.core.TyperArgument) else "Options"
            title = getattr(param, "rich_help_panel", None) or default
            panels.setdefault(title, []).append((_name(command, param), _text(param)))
    order = ["Arguments", *PANELS, "Options"]
    yield from sorted(panels.items(), key=lambda panel: order.index(panel[0]) if panel[0] in order else len(PANELS))


def _name(command: Any, param: Any) -> Text:
    """Return an option with its value's name, or an argument's name."""
    if isinstance(param, typer.core.TyperArgument):
        return Text((param.metavar or param.name.upper()) + "..." * (param.nargs != 1), style="bold cyan")
    text = Text("/".join(param.opts + param.secondary_opts), style="bold cyan")
    if not param.is_flag:
        text.append(" ").append(
            param.metavar or METAVARS.get(kind_of(command, param.name).type, "TEXT"), style="yellow"
        )
    return text


def _text(param: Any) -> Text:
    """Return an option's help text with its default at the end."""
    text, bracket, default = (getattr(param, "help", None) or "").partition("[default: ")
    shown = bracket + default
    value = param.default
    if not shown and param.required:
        shown = "[required]"
    elif not shown and value is not None and value is not False and not callable(value):
        shown = f"[default: {_written(param, value)}]"
    return Text(text.rstrip()).append(f" {shown}" if shown else "", style="dim")


def _written(param: Any, value: Any) -> str:
    if value is True:
        return str(param.opts[0])
    return f"{value:g}" if isinstance(value, float) else str(value)


def _print_panel(console: Console, title: str, rows: list[Row]) -> None:
    if console.width < NARROW:
        console.rule(Text(title, style="bold"), align="left", style="dim")
        for name, text in rows:
            console.print(name)
            console.print(Padding(text, (0, 0, 0, 2), expand=False))
        return
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    longest_word = max(len(word) for name, _ in rows for word in name.plain.split())
    table.add_column(width=max(longest_word, COLUMN if any(name.plain[0] == "-" for name, _ in rows) else 12))
    table.add_column(ratio=1)
    for row in rows:
        table.add_row(*row)
    console.print(Panel(table, title=Text(title, style="bold"), title_align="left", border_style="dim"))


def _print_examples(console: Console, examples: tuple[tuple[str, str], ...]) -> None:
    console.print(Text("\nExamples", style="bold"))
    for text, line in examples:
        if text:
            console.print(Padding(Text(text, style="dim"), (0, 0, 0, 2), expand=False))
        console.print(Text(f"    {line}"), soft_wrap=True)  # a line that is copied has no breaks
