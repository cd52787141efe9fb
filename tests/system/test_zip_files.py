"""A .zip is checked before anything of it is unpacked. Archives made to harm: `test_hostile`, `test_download`."""

import stat
import struct
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from xray_fastai.system.zip_files import ArchiveError, check_names, open_zip, unpack


@pytest.fixture
def archive(tmp_path):
    """Write a .zip of names and contents."""

    def archive(*entries, method=zipfile.ZIP_STORED):
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w", method) as opened:
            for name, content in entries:
                opened.writestr(name, content)
        return path

    return archive


def refusal(path, max_names=1000, max_bytes=10**9):
    with pytest.raises(ArchiveError) as error, open_zip(path, max_names, max_bytes):
        pytest.fail("the archive must not be opened")
    assert error.value.value == path
    return error.value.message


def test_a_good_archive_is_opened(archive):
    with open_zip(archive(("a/b.txt", b"content"), ("a/c.txt", b"")), 1000, 7) as opened:
        assert opened.read("a/b.txt") == b"content"


@pytest.mark.parametrize("name", ["a/b", "A/b", "a//b", "a/./b"])
def test_two_names_of_one_file_are_refused(name):
    paths = [PurePosixPath("a/b"), PurePosixPath("c")]
    check_names(Path("a.zip"), paths)
    with pytest.raises(ArchiveError, match=r"^a\.zip: holds two files of one name"):
        check_names(Path("a.zip"), [*paths, PurePosixPath(name)])


def test_the_limits_are_on_the_list_of_names_and_on_all_bytes(archive):
    path = archive(("a", bytes(600)), ("b", bytes(401)))
    assert "lists more files" in refusal(path, max_names=90)
    assert "unpacks to more than 1.0 kB" in refusal(path, max_bytes=1000)
    with open_zip(path, 1000, 1001):
        pass


def test_a_bomb_a_link_and_a_damaged_file_are_refused(archive):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    assert "a link or a device" in refusal(archive((link, b"/etc/passwd")))
    assert "a bomb" in refusal(archive(("a", bytes(110_000_000)), method=zipfile.ZIP_DEFLATED))
    path = archive(("a", b"content"))
    path.write_bytes(path.read_bytes().replace(b"content", b"contend"))
    with pytest.raises(ArchiveError, match="a damaged archive: Bad CRC-32"), open_zip(path, 1000, 1000) as opened:
        opened.read("a")
    path.write_bytes(b"PK\3\4")
    assert "not a .zip archive" in refusal(path)


def test_only_the_wanted_files_are_unpacked(archive, tmp_path):
    path = archive(("x/run/model.json", b"{}"), ("x/run/a.csv", b"1"), ("x/run/evil.pkl", b"2"), ("model.txt", b""))
    folder = tmp_path / "out"
    folder.mkdir()
    assert unpack(path, folder, ["model.json", "a.csv", "b.csv"], 2) == ("x/run/", ["a.csv", "evil.pkl", "model.json"])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"model.json": b"{}", "a.csv": b"1"}


def test_a_file_above_the_limit_is_not_unpacked_even_if_its_header_gives_less(archive, tmp_path):
    path = archive(("model.json", b"x" * 5000), method=zipfile.ZIP_DEFLATED)
    with pytest.raises(ArchiveError, match=r"model\.json: more than the 4,999 bytes allowed"):
        unpack(path, tmp_path, ["model.json"], 4999)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 5000), struct.pack("<I", 10)))
    (tmp_path / "b").mkdir()
    with pytest.raises(ArchiveError):
        unpack(path, tmp_path / "b", ["model.json"], 4999)
    assert (tmp_path / "b" / "model.json").stat().st_size <= 4999
