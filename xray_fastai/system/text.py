"""Text from files of others, fit for one line of a terminal or a table."""

import base64
import re

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, what turns the direction of writing round, and halves of a character."""


def fault_of(text: str, longest: int) -> str | None:
    """What is wrong with a text of at most `longest` characters that is to be printed as it is; None: nothing."""
    if len(text) > longest:
        return f"is {len(text):,} characters long, more than {longest:,}"
    if found := UNPRINTABLE.search(text):
        return f"holds the unprintable character {found.group()!a}"
    return None


def shown(value: object, longest: int = 60) -> str:
    """A value on one line, cut where it is too long: what could move the cursor or end the line is written out."""
    text = UNPRINTABLE.sub(lambda found: ascii(found.group())[1:-1], str(value)[: 4 * longest])
    return text if len(text) <= longest else text[: longest - 1] + "…"


def count_of(number: int, what: str) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def data_uri(content: bytes, mime_type: str) -> str:
    """Return `content` as a data URI (RFC 2397), which a page shows without loading a file."""
    return f"data:{mime_type};base64,{base64.b64encode(content).decode()}"
