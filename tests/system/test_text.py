"""Text for people: shortened, wrapped and printable, whatever a name holds."""

import base64
import doctest

import pytest

from xray_fastai.system import text
from xray_fastai.system.text import count_of, data_uri, fault_of, format_number, printable, shorten, shown, wrap


def test_the_examples():
    failed, tried = doctest.testmod(text)
    assert tried and not failed


def test_shorten():
    assert shorten("short", 9) == "short"
    assert shorten("a\nb\udc80", 9) == "a?b?"
    assert all(len(shorten("0123456789", width)) == width for width in range(1, 10))


def test_what_cannot_be_printed():
    assert printable("a\x1b[31mb") == "a?[31mb"


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


@pytest.mark.parametrize("character", ["\n", "\x1b", "\x7f", "\u2028", "\u202e", "\ud800"])
def test_an_unprintable_character_is_named_and_escaped(character):
    assert "unprintable character" in fault_of(f"a{character}b", 10)
    assert shown(f"a{character}b") == f"a{ascii(character)[1:-1]}b"


def test_a_long_text_is_a_fault_and_is_shortened():
    assert fault_of("é" * 10, 10) is None
    assert "11 characters" in fault_of("é" * 11, 10)
    assert shown("é" * 60) == "é" * 60
    assert shown("é" * 61) == "é" * 59 + "…"
    assert len(shown("\x1b" * 10_000)) == 60


@pytest.mark.parametrize(("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1234, "1,234 rows")])
def test_a_count_has_its_plural(number, text):
    assert count_of(number, "row") == text


def test_a_data_uri_holds_the_content():
    head, _, content = data_uri(b"\0\xff", "image/png").partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(content) == b"\0\xff"
