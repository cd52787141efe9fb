"""Text from other people's files is printed on one line, or named as unprintable."""

import base64

import pytest

from xray_fastai.system.text import count_of, data_uri, fault_of, shown


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
