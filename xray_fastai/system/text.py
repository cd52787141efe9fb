"""Text for people: a line of a terminal, a cell of a table, a paragraph, a number with its unit.

File names and values from files of others may hold anything, so what this module returns for them is printable.
"""

import base64
import math
import re
import textwrap
from collections.abc import Mapping

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, characters that reverse the direction of writing, and lone surrogates."""

_OPTION = re.compile(
    r"(?<![^\s(\[])"  # not within a path: runs/lr=0.1/a.png
    r'([a-z_]+)=(?:"([^"\s]*)"|(True|False)|(\d[\d.]*|[A-Z]+))?'
    r"(?=[\s,;:.)\]]|$)"
)
FORMULA = r"^'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"  # the last four are fullwidth
"""Text that a spreadsheet runs as a formula, apostrophes before it included; `page.js` uses the same expression."""

WIDTH = 80
"""Columns of a terminal that text is wrapped at."""


def fault_of(text: str, max_length: int) -> str | None:
    """Return why a text cannot be printed as it is: longer than `max_length`, or unprintable. None: it can."""
    if len(text) > max_length:
        return f"is {len(text):,} characters long, more than {max_length:,}"
    if match := UNPRINTABLE.search(text):
        return f"holds the unprintable character {match.group()!a}"
    return None


def shown(value: object, max_length: int = 60) -> str:
    """Return a value for an error message: on one line, unprintable characters escaped, the end of a long one cut.

    >>> shown("two\\nlines"), shown("abcdef", 4)
    ('two\\\\nlines', 'abc…')
    """
    text = UNPRINTABLE.sub(lambda match: ascii(match.group())[1:-1], str(value)[: 4 * max_length])
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def printable(text: str) -> str:
    """Return a text with a question mark for each character that cannot be printed."""
    return "".join(character if character.isprintable() else "?" for character in text)


def csv_text(text: str) -> str:
    """Return a text for a cell of a CSV file that people open in a spreadsheet or a terminal.

    An apostrophe before `FORMULA` keeps it text; `from_csv` removes it again. Unprintable characters become escapes, as
    do bytes of a file name that are not UTF-8. Tabs and line breaks stay: quotation marks hold them.

    >>> csv_text("=1+1"), csv_text("'=1+1"), csv_text("a\\x1b[0m"), csv_text("it's")
    ("'=1+1", "''=1+1", 'a\\\\x1b[0m', "it's")
    """
    escaped = UNPRINTABLE.sub(lambda match: _escaped_for_csv(match.group()), text)
    return f"'{escaped}" if re.match(FORMULA, escaped) else escaped


def _escaped_for_csv(character: str) -> str:
    return character if character in "\t\r\n" else ascii(character)[1:-1]


def from_csv(text: str) -> str:
    """Return the text that `csv_text` was given, in which escapes stay.

    >>> from_csv("'=1+1"), from_csv("''=1+1"), from_csv("'quoted'")
    ('=1+1', "'=1+1", "'quoted'")
    """
    return text[1:] if text.startswith("'") and re.match(FORMULA, text) else text


def shorten(text: str, width: int) -> str:
    """Return a printable text of at most `width` characters, without the middle of a long one.

    Names of files and folders often differ at one of their ends only.

    >>> shorten("person1000_bacteria_2931.jpeg", 15)
    'person1…31.jpeg'
    """
    text = printable(text)
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def as_typed(text: str, options: Mapping[str, str]) -> str:
    """Return a text that names options as Python does (`size=`, `cache=False`) with those of the command line.

    Args:
        text: names options as Python does.
        options: the names on the command line by Python's; others get dashes.

    >>> as_typed("try a size= below 64, label= or device=\\"cpu\\" (cache=False)", {"label": "--class"})
    'try a --size below 64, --class or --device cpu (--no-cache)'
    """

    def typed(match: re.Match[str]) -> str:
        name, word, switch, value = match.groups()
        option = options.get(name, f"--{name.replace('_', '-')}")
        if switch == "False":
            return f"--no{option[1:]}"
        return " ".join(filter(None, (option, word, value)))

    return _OPTION.sub(typed, text)


def wrap(text: str, head: str = "", width: int = WIDTH) -> list[str]:
    """Return a text as lines of at most `width` characters; the first begins with `head`, the others are indented.

    A word stays whole, even one that is too long: a path can then be copied.

    >>> wrap("see the file with all names", "advice: ", 22)
    ['advice: see the file', '        with all names']
    """
    lines = textwrap.wrap(
        text, width, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return lines or [head.rstrip()]


def count_of(number: int, what: str) -> str:
    """Return a number with its noun: `1 row`, `1,234 rows`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def format_number(value: object) -> str:
    """Return a cell of a table: a float with three decimals, an integer with separators, `-` for a missing value.

    >>> [format_number(value) for value in (0.12345, 0.00012345, 1234, None, "text")]
    ['0.123', '0.00012', '1,234', '-', 'text']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) > 10):
        return f"{value:,.0f}"
    return f"{value:.3f}" if 5e-4 <= abs(value) < 1e4 or value == 0 else f"{value:.2g}"


def percent(share: float) -> str:
    """Return a share as a percentage with three digits: 0.0314 is 3.14 %."""
    return f"{100 * share:.3g} %"


def format_interval(value: float, low: float | None, high: float | None, digits: int = 3) -> str:
    """Return a value with its interval; without it where a limit is None or NaN.

    >>> format_interval(0.9, 0.85, 0.934), format_interval(0.9, None, None)
    ('0.900 (0.850 to 0.934)', '0.900')
    """
    text = f"{value:.{digits}f}"
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return text
    return f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def data_uri(content: bytes, mime_type: str) -> str:
    """Return `content` as a data URI (RFC 2397), which a page shows without loading a file."""
    return f"data:{mime_type};base64,{base64.b64encode(content).decode()}"


DURATION = re.compile(r"(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s?)?", re.IGNORECASE)


def seconds_of(text: str) -> float | None:
    """Return the seconds of a duration; None for another text.

    >>> [seconds_of(text) for text in ("90s", "30m", "1h30m", "7200", "soon")]
    [90.0, 1800.0, 5400.0, 7200.0, None]
    """
    found = DURATION.fullmatch(text.strip())
    if found is None or not found[0]:
        return None
    hours, minutes, seconds = (float(found[unit] or 0) for unit in "hms")
    return 3600 * hours + 60 * minutes + seconds
