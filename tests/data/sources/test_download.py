"""The public collection comes whole through any connection, or not at all; tried on a host of this test's own."""

import io
import os
import random
import shutil
import signal
import socket
import stat
import struct
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import draw_collection, wait_for
from xray_fastai.data.folders import read_split
from xray_fastai.data.sources import download, kermany

PART = Path("chest_xray.zip.part")
DATE = "Tue, 15 Nov 1994 12:45:26 GMT"
PUBLISHED = {("train", "NORMAL"): 3, ("train", "PNEUMONIA"): 4, ("test", "NORMAL"): 1, ("test", "PNEUMONIA"): 2}


def zipped(files, method=zipfile.ZIP_STORED):
    """A .zip of names and contents."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return content.getvalue()


def xrays(root="chest_xray/", seed=0, counts=PUBLISHED):
    """Ten files, 20,000 bytes each, in the collection's folders."""
    rng = random.Random(seed)
    return {
        f"{root}{split}/{label}/{label}-{i}.jpeg": rng.randbytes(20_000)
        for (split, label), count in counts.items()
        for i in range(count)
    }


JUNK = {
    "chest_xray/.DS_Store": b"x",
    "__MACOSX/chest_xray/train/NORMAL/._NORMAL-0.jpeg": b"x",
    "chest_xray/a.txt": b"x",
}


class Host:
    """One file on a local server, which gives its first answers by a plan; `waits`: seconds before new attempts."""

    def __init__(self, content):
        self.content, self.etag, self.modified, self.ranges = content, '"one"', DATE, True
        self.plan, self.asked, self.waits, self.released = [], [], [], threading.Event()
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                host.asked.append(self.headers)
                step = host.plan.pop(0) if host.plan else Host.send
                step(host, self) if callable(step) else host.refuse(self, step)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/file"

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def ranges_asked(self):
        return [headers.get("Range") for headers in self.asked]

    def refuse(self, handler, status):
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def send(self, handler, most=None, end=None, length=True):
        """Send the file, or after If-Range held the part of it that is asked for; `end` after `most` bytes."""
        asked, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        start = 0
        if asked and self.ranges and condition in (None, self.etag or self.modified):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        else:
            handler.send_response(200)
        if length:
            handler.send_header("Content-Length", str(len(self.content) - start))
        if self.etag:
            handler.send_header("ETag", self.etag)
        if self.modified:
            handler.send_header("Last-Modified", self.modified)
        handler.end_headers()
        handler.wfile.write(self.content[start:][:most])
        self.sent = start + (most or 0)
        if end:
            end(self, handler)


def resets(most):
    def end(host, handler):
        wait_for(lambda: PART.is_file() and PART.stat().st_size >= host.sent - 20_000)  # what is not read yet is lost
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return lambda host, handler: host.send(handler, most, end)


def stalls(most):
    return lambda host, handler: host.send(handler, most, lambda *_: host.released.wait(60))


def closes(most):
    return lambda host, handler: host.send(handler, most)


def answers(body, kind):
    def answer(_, handler):
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.fixture
def host(monkeypatch):
    host = Host(zipped(xrays() | JUNK))
    for name, value in [("time", SimpleNamespace(sleep=host.waits.append)), ("STALL", 20), ("CHUNK", 4096)]:
        monkeypatch.setattr(download, name, value)
    monkeypatch.setattr(kermany, "PUBLISHED", PUBLISHED)
    yield host
    host.close()


@pytest.fixture
def get(run, host):
    """Download from the host into ./chest_xray."""
    return lambda *args: run("data", "download", "--url", host.url, *args)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whole(folder="chest_xray", files=None):
    """Whether the folder holds the collection's images, and nothing of the download is left beside it."""
    folder = Path(folder)
    assert contents(folder) == (files or {name.removeprefix("chest_xray/"): data for name, data in xrays().items()})
    return [path.name for path in folder.parent.iterdir()] == [folder.name]


def nothing_but(*names):
    return sorted(path.name for path in Path().iterdir()) == sorted(names)


KEPT = (PART.name, f"{PART.name}.json")


# what comes, and what is said of it


def test_the_images_come_with_their_licence_and_citation(get, host):
    result = get()
    assert result.exit_code == 0, result.output
    assert whole() and host.ranges_asked() == [None]
    for words in ("train         3 NORMAL, 4 PNEUMONIA", "test          1 NORMAL, 2 PNEUMONIA", "CC BY 4.0"):
        assert words in result.stdout
    assert "Kermany" in result.stdout and "10.17632/rscbjbr9sj.2" in result.stdout
    assert "WARNING" not in result.stdout and result.stderr == ""
    assert "3 files of the archive that belong to no split" in result.stdout


def test_what_was_unpacked_is_what_fit_and_check_read(run, tmp_path):
    drawn = draw_collection(tmp_path / "drawn", {"train/NORMAL": 2, "train/PNEUMONIA": 2, "test/NORMAL": 1})
    archive = tmp_path / "a.zip"
    archive.write_bytes(zipped({f"chest_xray/{name}": data for name, data in contents(drawn).items()}))
    before = archive.read_bytes()
    result = run("data", "download", "below/here", "--archive", archive)
    assert result.exit_code == 0, result.output
    assert len(read_split(Path("below/here"), "train")) == 4 and whole("below/here", contents(drawn))
    assert archive.read_bytes() == before
    assert "WARNING" in result.stdout and "train/NORMAL 2 instead of 1,349" in result.stdout


def test_an_empty_folder_is_filled_and_any_other_left_alone(get, run, refused, host):
    Path("chest_xray").mkdir()
    assert get().exit_code == 0 and whole()
    for args in (["--url", host.url], ["--archive", "none.zip"]):
        refused(run("data", "download", *args), "chest_xray: already exists; give a new folder or an empty one")
    assert whole() and len(host.asked) == 1
    Path("file").write_text("mine")
    refused(get("file"), "file: already exists")
    Path("empty").mkdir()
    os.chdir("empty")
    refused(get("."), "the current folder")
    os.chdir("..")
    refused(get("file/below"), "file/below: cannot be")


def test_kaggles_archive_with_everything_twice(run, monkeypatch):
    monkeypatch.setattr(kermany, "PUBLISHED", PUBLISHED)
    counts = {**PUBLISHED, ("train", "NORMAL"): 2, ("val", "NORMAL"): 1}
    files = xrays(counts=counts)
    Path("a.zip").write_bytes(zipped(files | xrays("chest_xray/chest_xray/", counts=counts) | JUNK))
    result = run("data", "download", "data", "--archive", "a.zip")
    assert result.exit_code == 0, result.output
    assert contents(Path("data")) == {name.removeprefix("chest_xray/"): data for name, data in files.items()}
    assert "val           1 NORMAL" in result.stdout and "WARNING" not in result.stdout


# connections that break


@pytest.mark.slow
@pytest.mark.parametrize("breaks", [resets, stalls, closes])
def test_a_broken_connection_is_resumed(breaks, get, host, monkeypatch):
    if breaks is stalls:
        monkeypatch.setattr(download, "STALL", 0.5)
    host.plan = [breaks(60_000), breaks(50_000)]
    result = get()
    assert result.exit_code == 0, result.output
    assert whole() and len(host.asked) == 3
    starts = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in host.ranges_asked()[1:]]
    assert 40_000 <= starts[0] <= 60_000 < starts[1] <= 110_000
    assert {headers["If-Range"] for headers in host.asked[1:]} == {'"one"'}
    assert result.stdout.count("interrupted") == 2 and result.stderr == ""


def test_a_host_that_sends_on_to_another_address(get, host):
    def send_on(host, handler):
        handler.send_response(302)
        handler.send_header("Location", f"{host.url}?signed=1")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    host.plan = [send_on, resets(60_000), send_on]
    assert get().exit_code == 0 and whole()
    assert [asked is None for asked in host.ranges_asked()] == [True, True, False, False]


def test_a_host_without_ranges_is_asked_again(get, host):
    host.ranges, host.plan = False, [resets(60_000)]
    assert get().exit_code == 0 and whole()
    assert len(host.asked) == 2


def test_a_host_that_tells_neither_size_nor_version(get, host):
    host.etag = host.modified = None
    host.plan = [lambda host, handler: host.send(handler, length=False)]
    assert get().exit_code == 0 and whole()


def test_a_download_of_unknown_size_that_is_whole_is_not_got_again(get, run, host, refused, monkeypatch):
    def nothing_more(host, handler):
        handler.send_response(416)
        handler.send_header("Content-Range", f"bytes */{len(host.content)}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    host.plan = [lambda host, handler: host.send(handler, length=False), nothing_more]
    usage, room = shutil.disk_usage("."), [1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room[0]))
    refused(get(), "free")
    assert nothing_but(*KEPT)
    room[0] = usage.free
    result = get()
    assert result.exit_code == 0 and "downloaded    already" in result.stdout and whole()
    assert host.ranges_asked() == [None, f"bytes={len(host.content)}-"]


@pytest.mark.parametrize(("etag", "asked"), [('"one"', '"one"'), ('W/"one"', DATE), (None, DATE)])
def test_a_file_that_changed_meanwhile_is_downloaded_again(etag, asked, get, host):
    def change(host, handler):
        host.send(handler, 60_000)
        host.content, host.modified, host.etag = zipped(xrays(seed=1)), "Wed, 16 Nov 1994 12:45:26 GMT", '"two"'

    host.etag, host.plan = etag, [change]
    assert get().exit_code == 0
    assert host.asked[1]["If-Range"] == asked
    assert whole(files={name.removeprefix("chest_xray/"): data for name, data in xrays(seed=1).items()})


def test_a_part_of_another_file_is_refused(get, host):
    def lie(host, handler):
        host.content, host.etag = zipped(xrays(seed=1)), '"two"'
        handler.headers.replace_header("If-Range", '"two"')
        host.send(handler)

    host.plan = [resets(60_000), lie]
    assert get().exit_code == 0
    assert host.ranges_asked()[2] is None
    assert whole(files={name.removeprefix("chest_xray/"): data for name, data in xrays(seed=1).items()})


def test_it_stops_after_six_failures_and_resumes_the_next_time(get, host, refused):
    host.plan = [closes(60_000)] + [503] * 5
    refused(get(), "503", "6 times in a row", PART.name, "is kept", "the same command resumes it")
    assert nothing_but(*KEPT) and PART.stat().st_size == 60_000 and len(host.asked) == 6
    assert host.waits == [1, 2, 4, 8, 16]
    host.asked.clear()
    result = get()
    assert result.exit_code == 0 and whole()
    assert host.ranges_asked() == ["bytes=60000-"] and "resuming" in result.stdout


@pytest.mark.parametrize("note", ["other", "damaged", "missing"])
def test_a_part_of_an_unknown_file_is_not_resumed(note, get, run, host):
    host.plan = [closes(60_000), 404]
    assert get().exit_code == 1
    host.asked.clear()
    if note == "damaged":
        Path(f"{PART}.json").write_text('{"url": 3}')
    elif note == "missing":
        Path(f"{PART}.json").unlink()
    url = f"{host.url}?other" if note == "other" else host.url
    assert run("data", "download", "--url", url).exit_code == 0 and whole()
    assert host.ranges_asked() == [None]


def test_a_stall_before_the_answer(get, host, monkeypatch):
    monkeypatch.setattr(download, "STALL", 0.5)
    host.plan = [lambda host, _: host.released.wait(60)]
    assert get().exit_code == 0 and whole()


@pytest.mark.parametrize(("status", "asked"), [(401, 1), (403, 1), (404, 1), (500, 6), (503, 6)])
def test_a_host_that_refuses(status, asked, get, host, refused):
    host.plan = [status] * 6
    refused(get(), f"{host.url}: the host answers {status}", "--archive FILE", "kaggle datasets download")
    assert nothing_but() and len(host.asked) == asked


def test_nobody_there(run, host, refused, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
        refused(run("data", "download", "--url", url), url, "no server answers (Connection refused)", "--archive FILE")
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        refused(run("data", "download", "--url", "http://example.invalid/"), "proxy")
    for url in ("file:///etc/passwd", "there", "https://[::1"):
        refused(run("data", "download", "--url", url), url, "not an address")
    refused(run("data", "download", "--url", url, "--archive", "a.zip"), f"--url {url}: give this or --archive")
    assert nothing_but()


# what is not the collection


def test_a_page_instead_of_the_archive_costs_nothing_that_is_here(get, host, refused):
    page = answers(b"<!doctype html><title>Log in</title>", "text/html")
    host.plan = [page]
    refused(get(), "another kind of file (text/html)", "--archive FILE")
    assert nothing_but()
    host.plan = [closes(60_000), page]
    refused(get(), "another kind of file (text/html)", "is kept")
    assert nothing_but(*KEPT)
    assert get().exit_code == 0 and whole()


def spoiled(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


FULL = xrays() | JUNK
WRONG = {
    "cut short": (zipped(FULL)[:150_000], "not a .zip archive, or truncated"),
    "an image spoiled": (spoiled(zipped(FULL), 30_000), "Bad CRC-32"),
    "what is left out spoiled": (zipped(FULL | {"z.txt": b"unlike"}).replace(b"unlike", b"unlikf"), "Bad CRC-32"),
    "its end alone": (b"PK\3\4", "not a .zip archive"),
    "no collection": (zipped({"a/b/c.jpeg": b"x"}), "no collection in it"),
    "two collections": (zipped(xrays("a/") | xrays("b/")), "2 collections"),
    "a name twice": (zipped(FULL | {"chest_xray/train/normal/NORMAL-0.jpeg": b"x"}), "two files of one name"),
    "a way out": (zipped(FULL | {"../out.jpeg": b"x"}), "../out.jpeg: a name that leaves the folder"),
    "a way out within": (zipped({"chest_xray/train/NORMAL/../../../../out.jpeg": b"x"}), "leaves the folder"),
    "an absolute name": (zipped(FULL | {"/out.jpeg": b"x"}), "leaves the folder"),
    "a drive": (zipped(FULL | {"C:out.jpeg": b"x"}), "leaves the folder"),
    "backslashes": (zipped(FULL | {"a\\..\\..\\out.jpeg": b"x"}), "leaves the folder"),
    "a bomb": (zipped(FULL | {"a": bytes(120_000_000)}, zipfile.ZIP_DEFLATED), "a bomb"),
}


def link():
    entry = zipfile.ZipInfo("chest_xray/train/NORMAL/link.jpeg")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zipped(FULL | {entry: b"/etc/passwd"})


def encrypted():
    content = bytearray(zipped(FULL))
    at = content.index(b"PK\1\2")
    content[at + 8] |= 1
    return bytes(content)


WRONG |= {"a link": (link(), "a link or a device"), "encrypted": (encrypted(), "encrypted")}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_archive_is_refused_and_removed(what, get, host, run, refused):
    host.content, words = WRONG[what]
    refused(get(), PART.name, words, "it was deleted")
    assert nothing_but() and not Path("../out.jpeg").exists()
    Path("a.zip").write_bytes(host.content)
    refused(run("data", "download", "--archive", "a.zip"), "a.zip: ", words)
    assert nothing_but("a.zip")


def test_more_files_than_a_collection_has(get, host, refused, monkeypatch):
    monkeypatch.setattr(kermany, "MAX_NAMES", 100)
    refused(get(), "lists more files")
    monkeypatch.setattr(kermany, "MAX_NAMES", 10_000)
    monkeypatch.setattr(kermany, "MAX_BYTES", 100_000)
    refused(get(), "unpacks to more than 100.0 kB")
    assert nothing_but()


@pytest.mark.parametrize("what", ["missing", "folder", "empty", "text"])
def test_no_archive(what, run, refused):
    if what == "folder":
        Path("a.zip").mkdir()
    elif what != "missing":
        Path("a.zip").write_text("" if what == "empty" else "text" * 100)
    refused(run("data", "download", "--archive", "a.zip"), "a.zip")
    assert nothing_but(*[] if what == "missing" else ["a.zip"])


def test_the_published_address_gives_what_was_published(run, host, refused, monkeypatch):
    monkeypatch.setattr(kermany, "ADDRESS", host.url)
    refused(run("data", "download"), host.url, "but the collection has about 1.2 GB")
    assert nothing_but()
    monkeypatch.setattr(kermany, "SIZES", (100_000, 300_000))
    monkeypatch.setattr(kermany, "PUBLISHED", {**PUBLISHED, ("test", "NORMAL"): 5})
    refused(run("data", "download"), "not as published: test/NORMAL 1 instead of 5", "give it by --archive")
    assert nothing_but(*KEPT)
    result = run("data", "download", "--archive", PART)
    assert result.exit_code == 0 and "WARNING       not as published: test/NORMAL 1 instead of 5" in result.stdout
    monkeypatch.setattr(kermany, "PUBLISHED", PUBLISHED)
    result = run("data", "download", "again")
    assert result.exit_code == 0 and "WARNING" not in result.stdout


# room, and being stopped


def test_room_is_looked_for_before_it_is_taken(get, run, host, refused, monkeypatch):
    size = len(host.content)
    free = [2 * size - 1]
    usage = type("Usage", (), {"free": property(lambda _: free.pop(0))})
    monkeypatch.setattr(kermany.shutil, "disk_usage", lambda _: usage())
    refused(get(), "free", "needed for the archive and its images; free some space")
    assert nothing_but()
    free += [2 * size, 100_000]
    refused(get(), "needed to unpack the images; free some space", "is kept")
    assert nothing_but(*KEPT)
    free += [10**9]
    result = get()
    assert result.exit_code == 0 and whole() and "downloaded    already" in result.stdout
    assert len(host.asked) == 2


@pytest.mark.slow
def test_two_at_once(get, host, refused, start):
    host.plan = [stalls(60_000)]
    other = start("data", "download", "--url", host.url)
    wait_for(lambda: host.asked)
    refused(get(), "another download writes this file")
    other.send_signal(signal.SIGTERM)
    other.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_download_is_resumed_later(number, code, start, get, host):
    host.content = zipped(xrays() | {"big": random.Random(1).randbytes(200_000)})
    host.plan = [stalls(180_000)]
    process = start("data", "download", "--url", host.url)
    wait_for(lambda: PART.is_file() and PART.stat().st_size >= 2 * 65536)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    (line,) = message.strip().splitlines()
    assert process.returncode == code and line.startswith("Stopped; chest_xray.zip.part (131.1 kB) is kept")
    assert nothing_but(*KEPT)
    assert get().exit_code == 0 and whole()
    assert host.ranges_asked() == [None, "bytes=131072-"]


def test_stopped_while_unpacking_nothing_is_half_there(get, run, host, monkeypatch):
    extract, count = kermany._extract, iter(range(10))

    def stop(*args):
        if next(count) == 4:
            raise KeyboardInterrupt
        extract(*args)

    monkeypatch.setattr(kermany, "_extract", stop)
    result = get()
    assert result.exit_code == 130 and "is kept" in result.stderr
    assert nothing_but(*KEPT)
    monkeypatch.setattr(kermany, "_extract", extract)
    Path(".chest_xray.unpacking").mkdir()  # as a process that was killed leaves it
    assert get().exit_code == 0 and whole() and len(host.asked) == 1
