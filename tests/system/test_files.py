"""A file or folder appears complete or not at all."""

import os
from pathlib import Path

import pytest

from xray_fastai.system import files
from xray_fastai.system.errors import UserError
from xray_fastai.system.files import acquire, atomic_write, cache_dir, check_new, release, replaced


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_is_replaced_at_the_end_of_the_block(sync, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path, sync=sync) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("old", ["old", None])
def test_an_error_leaves_the_old_file_and_no_temporary_file(error, old, tmp_path):
    path = tmp_path / "a.txt"
    if old:
        path.write_text(old)
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert [file.read_text() for file in tmp_path.iterdir()] == ([old] if old else [])


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass
    assert path.read_text() == "old"


def test_a_new_file_needs_a_free_name_and_a_folder(tmp_path):
    check_new(tmp_path / "a.txt", "output")
    (tmp_path / "a.txt").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("a.txt", "link"):
        with pytest.raises(UserError, match=f"^output {tmp_path / name}: already exists"):
            check_new(tmp_path / name, "output")
    with pytest.raises(UserError, match="there is no folder"):
        check_new(tmp_path / "no" / "a.txt", "output")


def fill(folder: Path, content: str) -> None:
    (folder / "marker").write_text(content)


def test_a_folder_is_replaced_at_the_end_of_the_block(tmp_path):
    folder = tmp_path / "results"
    for content in ("old", "new"):
        with replaced(folder, "marker") as new:
            fill(new, content)
    assert (folder / "marker").read_text() == "new" and os.listdir(tmp_path) == ["results"]
    with pytest.raises(KeyboardInterrupt), replaced(folder, "marker") as new:
        fill(new, "half")
        raise KeyboardInterrupt
    assert (folder / "marker").read_text() == "new" and os.listdir(tmp_path) == ["results"]


def test_a_folder_of_another_kind_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no marker"), replaced(tmp_path, "marker"):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_lock_is_held_once_and_its_file_is_deleted(tmp_path):
    lock = acquire(tmp_path / "lock")
    assert acquire(tmp_path / "lock", timeout=0) is None
    release(lock)
    assert not os.listdir(tmp_path)
    release(acquire(tmp_path / "lock", timeout=0))


@pytest.mark.skipif(os.name != "posix", reason="other systems have other cache folders")
def test_the_cache_folder_is_that_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x" / "xray-fastai"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir().name == "xray-fastai" and cache_dir().is_relative_to(tmp_path)


def test_a_user_without_a_home_folder(run, refused, monkeypatch):
    """As in a container whose user id has no entry in the list of users."""

    def fail(*_, **__):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(files, "user_cache_path", fail)
    with pytest.raises(OSError, match="no home folder"):
        cache_dir()
    refused(run("data", "cache"), "no cache folder (this user has no home folder)")
    refused(run("data", "check"), "no home folder", "or give --data")
