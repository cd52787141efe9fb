"""Download a large file, and resume it after a broken connection (RFC 9110: Range, If-Range, Content-Range).

    NAME.part        the bytes downloaded so far
    NAME.part.json   the remote file that they belong to: its address, size, ETag and Last-Modified

`requests` transfers the data. It comes with fastai, brings certificates, uses the proxies that the environment names,
and has a time limit for each read. urllib3's `Retry` decides whether and when to try again.
"""

import json
import re
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import requests
from rich.filesize import decimal
from urllib3.exceptions import HTTPError, InvalidHeader, NameResolutionError, NewConnectionError, TimeoutError
from urllib3.util import Retry

from xray_fastai import __version__
from xray_fastai.system.errors import UserError
from xray_fastai.system.progress import transfer_bar
from xray_fastai.system.text import shown

CONNECT, STALL = 20.0, 60.0
"""Seconds to wait for a connection, and then for more bytes."""
MAX_WAIT = 60.0  # seconds, also if the host asks for more (Retry-After)
RETRY = Retry(5, status_forcelist=(408, 425, 429, 500, 502, 503, 504))
"""How often to try again without progress, and the status codes that may be temporary. The waits are 1, 2, 4 ... s."""
CHUNK = 1 << 16

Check = Callable[[int, int], None]


class DownloadError(UserError):
    """A file that cannot be downloaded; `value` is its address."""

    def __init__(self, message: str, *, url: str):
        super().__init__(message, value=shown(url, 200))


class _TemporaryError(Exception):
    """A failure that another attempt may not have."""

    def __init__(self, text: str, wait: float | None = None, unreachable: bool = False):
        super().__init__(text)
        self.wait = wait  # seconds that the host asks for
        self.unreachable = unreachable  # no server answers at the address


@dataclass(frozen=True)
class RemoteFile:
    """What the host says about a file; None for what it does not say."""

    url: str
    size: int | None  # bytes
    etag: str | None
    modified: str | None

    @property
    def validator(self) -> str | None:
        """The value for If-Range, which allows no weak ETag (RFC 9110, 13.1.5)."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def matches(self, other: "RemoteFile") -> bool:
        """Return whether the two agree in everything that both say."""
        pairs = [(self.size, other.size), (self.etag, other.etag), (self.modified, other.modified)]
        return all(mine is None or theirs is None or mine == theirs for mine, theirs in pairs)


def fetch(url: str, part: Path, magic: bytes, check: Check) -> None:
    """Download a file, or resume its download.

    Args:
        url: the address, http or https.
        part: the file to write; an earlier call may have left its beginning.
        magic: the first bytes of every file of the expected kind. An answer that begins otherwise replaces nothing.
        check: called with the size of the file and the number of bytes to come, before the first of them is written.
            It raises a `UserError` to stop the download.

    Raises:
        DownloadError: no server answers, the host refuses, or it sends another kind of file. The part is kept.
        OSError: the part cannot be written.
    """
    if not re.match("https?://", url):
        raise DownloadError("not an address; give one that begins with https:// or http://", url=url)
    retry, reached = RETRY, False
    with requests.Session() as session:
        while True:
            before = _size(part)
            try:
                return _attempt(session, url, part, magic, check)
            except _TemporaryError as error:
                if 0 < before < _size(part):  # this attempt made progress
                    retry = RETRY
                reached = reached or not error.unreachable
                failures = len(retry.history) + 1
                if failures > RETRY.total or not reached:
                    times = f", {failures} times in a row" if failures > 1 else ""
                    raise DownloadError(f"{error}{times}; try again later", url=url) from None
                retry = retry.increment(error=error)
                wait = min(MAX_WAIT, 2.0 ** (failures - 1) if error.wait is None else error.wait)
                print(f"{'interrupted':<14}{error}; trying again in {wait:g} s", flush=True)
            time.sleep(wait)


def discard(part: Path) -> None:
    """Delete a partial download."""
    for file in (part, _note(part)):
        file.unlink(missing_ok=True)


def _attempt(session: requests.Session, url: str, part: Path, magic: bytes, check: Check) -> None:
    known = _known(url, part)
    have = 0 if known is None else _size(part)
    if known is not None and have == known.size:
        return _say_complete(part, have)
    headers = {"User-Agent": f"xray-fastai/{__version__}", "Accept-Encoding": "identity"}
    if known is not None:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": known.validator} if known.validator else {})
    try:
        with session.get(url, headers=headers, stream=True, timeout=(CONNECT, STALL)) as answer:
            if known is not None and answer.status_code == 416:  # the file of unknown size was complete already
                remote = RemoteFile(url, have, answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
                if answer.headers.get("Content-Range") == f"bytes */{have}" and remote.matches(known):
                    return _say_complete(part, have)
            start, remote = _read_headers(answer, url, part, known, have)
            chunks = _chunks(answer, len(magic))
            first = next(chunks)
            if start == 0 and not first.startswith(magic):
                kind = shown(answer.headers.get("Content-Type", "without a type"))
                raise DownloadError(f"sends another kind of file ({kind}), such as a page to log in", url=url)
            if remote.size is not None:
                check(remote.size, remote.size - start)
            _announce(remote, start, have)
            with part.open("ab" if start else "wb") as stream, transfer_bar(remote.size, start) as advance:
                if start == 0:
                    _note(part).write_text(json.dumps(asdict(remote)))
                for chunk in chain([first], chunks):
                    stream.write(chunk)
                    advance(len(chunk))
    except (requests.RequestException, HTTPError) as error:
        raise _translated(error, url) from None
    if remote.size is not None and _size(part) != remote.size:
        raise _TemporaryError(f"the connection closed after {_size(part):,} of {remote.size:,} bytes")


def _read_headers(
    answer: requests.Response, url: str, part: Path, known: RemoteFile | None, have: int
) -> tuple[int, RemoteFile]:
    """Return the position of an answer's first byte, and the file that it belongs to."""
    status, headers = answer.status_code, answer.headers
    size = headers.get("Content-Length", "")
    remote = RemoteFile(url, int(size) if size.isdecimal() else None, headers.get("ETag"), headers.get("Last-Modified"))
    if status == 200:
        return 0, remote
    if known is not None and status in (206, 416):
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if span:
            remote = RemoteFile(url, known.size if span[2] == "*" else int(span[2]), remote.etag, remote.modified)
        if status == 206 and span and int(span[1]) == have and remote.matches(known):
            return have, remote
        discard(part)
        raise _TemporaryError("the partial download belongs to another version of the file", wait=0)
    text = "the host answers " + shown(f"{status} {answer.reason or ''}".strip())
    if RETRY.is_retry("GET", status):
        try:
            wait = RETRY.get_retry_after(answer.raw)
        except InvalidHeader:  # neither seconds nor a date
            wait = None
        raise _TemporaryError(text, wait=wait)
    why = {403: ", so it may need a browser", 404: ", so it may have moved", 410: ", so it was removed"}
    raise DownloadError(f"{text}{why.get(status, '')}", url=url)


def _chunks(answer: requests.Response, min_first: int) -> Iterator[bytes]:
    """Yield the bytes of an answer as they were sent; the first chunk has `min_first` bytes, if there are so many."""
    chunks, first = answer.raw.stream(CHUNK, decode_content=False), b""
    for chunk in chunks:
        first += chunk
        if len(first) >= min_first:
            break
    yield first
    yield from chunks


def _say_complete(part: Path, size: int) -> None:
    print(f"{'downloaded':<14}already: {part}, {decimal(size)}", flush=True)


def _announce(remote: RemoteFile, start: int, have: int) -> None:
    size = "of unknown size" if remote.size is None else decimal(remote.size)
    if start:
        print(f"{'resuming':<14}at {decimal(start)} of {size}", flush=True)
    else:
        again = ", from the start: the host cannot resume, or the file has changed" if have else ""
        print(f"{'downloading':<14}{size}{again}", flush=True)


def _translated(error: Exception, url: str) -> Exception:
    """Return a short error for the user, or a `_TemporaryError` if another attempt may succeed."""
    causes = list(_causes(error))

    def caused_by(*kinds: type) -> Exception | None:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if isinstance(error, ValueError):
        return DownloadError(f"not an address ({shown(error, 120)})", url=url)
    if isinstance(error, requests.TooManyRedirects):
        return DownloadError("redirects without an end", url=url)
    if certificate := caused_by(ssl.SSLCertVerificationError):
        return DownloadError(f"its certificate is not trusted ({certificate.verify_message})", url=url)
    if isinstance(error, requests.exceptions.ProxyError):
        return _TemporaryError("the proxy that the environment names does not answer, or refuses", unreachable=True)
    if caused_by(NameResolutionError):
        return _TemporaryError("its name cannot be resolved; check the internet connection", unreachable=True)
    if refused := caused_by(NewConnectionError):
        system = next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), None)
        return _TemporaryError(f"no server answers ({system or shown(refused, 120)})", unreachable=True)
    if isinstance(error, requests.ConnectTimeout):
        return _TemporaryError(f"no connection within {CONNECT:g} s")
    if caused_by(TimeoutError):
        return _TemporaryError(f"no data for {STALL:g} s")
    return _TemporaryError("the connection broke")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it, which requests and urllib3 wrap in several ways."""
    while error is not None:
        yield error
        wrapped = [getattr(error, "reason", None), *error.args, error.__cause__, error.__context__]
        error = next((cause for cause in wrapped if isinstance(cause, BaseException)), None)


def _known(url: str, part: Path) -> RemoteFile | None:
    """Return the remote file that this partial download belongs to, or None if it cannot be resumed."""
    try:
        remote = RemoteFile(**json.loads(_note(part).read_text()))
        usable = remote.url == url and _size(part) > 0 and (remote.size is None or _size(part) <= remote.size)
    except (OSError, ValueError, TypeError):
        return None
    return remote if usable else None


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0
