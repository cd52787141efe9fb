"""Text for people: shortened, wrapped and printable, whatever a name holds."""

import doctest

import pytest

from xray_fastai.system import text
from xray_fastai.system.text import fault_of, format_number, printable, shorten, shown, wrap


def test_the_examples():
    failed, tried = doctest.testmod(text)
    assert tried and not failed


def test_shorten():
    assert shorten("short", 9) == "short"
    assert shorten("a\nb\udc80", 9) == "a?b?"
    assert all(len(shorten("0123456789", width)) == width for width in range(1, 10))


def test_what_cannot_be_printed():
    assert printable("a\x1b[31mb") == "a?[31mb"
    assert shown("a\x1b[31mb") == r"a\x1b[31mb" and len(shown("\x1b" * 100)) == 60
    assert fault_of("plain", 5) is None and fault_of("plainer", 5) == "is 7 characters long, more than 5"
    assert fault_of("a\u202eb", 5) == r"holds the unprintable character '\u202e'"


def test_wrap():
    path = "folder/" * 12
    assert wrap(f"{path} stays whole", "head ")[0] == f"head {path}"
    assert max(map(len, wrap("many words " * 30, "head "))) <= 80
    assert wrap("", "head ") == ["head"] and wrap("") == [""]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(float("nan"), "-"), (True, "True"), (0.0, "0.000"), (12.0, "12"), (3.0, "3.000"), (123456.7, "1.2e+05")],
)
def test_number(value, expected):
    assert format_number(value) == expected
