"""A file of another person's folder is opened only if it is a plain file in it."""

import os

import pytest

from xray_fastai.system.errors import UserError
from xray_fastai.system.untrusted import open_received, read_received


@pytest.fixture
def folder(tmp_path):
    """A folder that was received, beside a file that must not be read."""
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "a.json").write_bytes(b"12345")
    return tmp_path / "sent"


def test_a_plain_file_is_read_up_to_the_limit(folder):
    assert read_received(folder, "a.json", 5) == b"12345"
    with pytest.raises(UserError, match="5 bytes, more than the 4 allowed"):
        read_received(folder, "a.json", 4)
    (folder / "link").symlink_to("a.json")
    assert read_received(folder, "link", 5) == b"12345"
    with open_received(folder, "a.json") as (stream, size):
        assert (stream.read(2), size) == (b"12", 5)


FAULTS = {
    "missing": (lambda path: None, "no such file"),
    "a link out": (lambda path: path.symlink_to("../secret"), "a link to outside"),
    "an absolute link": (lambda path: path.symlink_to("/dev/zero"), "a link to outside"),
    "a circle": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "a pipe": (os.mkfifo, "not a plain file"),
    "a folder": (os.mkdir, "not a plain file"),
}


@pytest.mark.parametrize(("make", "words"), FAULTS.values(), ids=FAULTS)
def test_anything_else_is_refused_without_opening_it(make, words, folder):
    make(folder / "b")
    with pytest.raises(UserError, match=f"^{folder / 'b'}: .*{words}"):
        read_received(folder, "b", 100)


def test_a_name_that_climbs_is_refused(folder):
    with pytest.raises(UserError, match="a link to outside"):
        read_received(folder, "../secret", 100)
