"""A large file from the web, gone on with where a connection broke (RFC 9110: Range, If-Range, Content-Range).

    NAME.part        what has come so far
    NAME.part.json   which file of the host's that is: its address, size, ETag and Last-Modified

`requests` does the transfer: it comes with fastai, brings certificates, heeds the proxies that the environment names,
and bounds the wait for each read.
"""

import json
import re
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from xray_fastai import __version__
from xray_fastai.system.errors import UserError
from xray_fastai.system.progress import transfer_bar
from xray_fastai.system.text import shown

if TYPE_CHECKING:
    from requests import Response, Session

CONNECT, STALL = 20.0, 60.0
"""Seconds to wait for a connection, and then for more bytes."""
RETRIES, BACKOFF, LONGEST = 5, 1.0, 60.0
"""How often in a row without a gain it is tried again; the first wait in seconds, which doubles each time; and the
longest that a host may ask for (Retry-After)."""
CHUNK = 1 << 16
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be others a moment later."""

Check = Callable[[int, int], None]


class DownloadError(UserError):
    """A file that can't be got from its address."""


class _Again(Exception):
    """What may go well the next time."""

    def __init__(self, text: str, wait: float | None = None, unreachable: bool = False):
        super().__init__(text)
        self.wait = wait  # seconds that the host asks for
        self.unreachable = unreachable  # nobody answers at that address


@dataclass(frozen=True)
class Offer:
    """What a host says of a file; None is what it does not say."""

    url: str
    size: int | None  # bytes
    etag: str | None
    modified: str | None

    @property
    def validator(self) -> str | None:
        """For If-Range, which takes no weak ETag (RFC 9110, 13.1.5)."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified

    def agrees(self, other: "Offer") -> bool:
        """Whether nothing that both say differs."""
        pairs = [(self.size, other.size), (self.etag, other.etag), (self.modified, other.modified)]
        return all(mine is None or theirs is None or mine == theirs for mine, theirs in pairs)


def fetch(url: str, part: Path, begins: bytes, check: Check) -> None:
    """Download a file, or go on with its download.

    Args:
        url: its address, http or https.
        part: where it goes, and where an earlier call may have left the beginning of it.
        begins: the first bytes that it has to have; until they were seen, nothing that is there is given up.
        check: is told the bytes that the file has and those still to come, before the first of them is written; raises
            a `UserError` where it is not to go on.

    Raises:
        DownloadError: nobody answers, the host refuses, or it gives another kind of file. What has come stays.
        OSError: it can't be written.
    """
    import requests

    if not re.match("https?://", url):
        raise DownloadError(f"{shown(url)}: not an address; give one that begins with https:// or http://")
    failures, reached = 0, False
    with requests.Session() as session:
        while True:
            before = _size(part)
            try:
                return _attempt(session, url, part, begins, check)
            except _Again as again:
                failures = 1 if 0 < before < _size(part) else failures + 1
                reached = reached or not again.unreachable
                if failures > RETRIES or not reached:
                    times = f", {failures} times in a row" if failures > 1 else ""
                    raise DownloadError(f"{shown(url, 200)}: {again}{times}; try again later") from None
                wait = BACKOFF * 2 ** (failures - 1) if again.wait is None else min(LONGEST, again.wait)
                print(f"{'interrupted':<14}{again}; again in {wait:g} s", flush=True)
            time.sleep(wait)


def discard(part: Path) -> None:
    """Remove what has come of a file."""
    for file in (part, _note(part)):
        file.unlink(missing_ok=True)


def _attempt(session: "Session", url: str, part: Path, begins: bytes, check: Check) -> None:
    import requests
    import urllib3

    known = _known(url, part)
    have = 0 if known is None else _size(part)
    if known is not None and have == known.size:
        print(f"{'downloaded':<14}before: {part}, {decimal(have)}", flush=True)
        return
    headers = {"User-Agent": f"xray-fastai/{__version__}", "Accept-Encoding": "identity"}
    if known is not None:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": known.validator} if known.validator else {})
    try:
        with session.get(url, headers=headers, stream=True, timeout=(CONNECT, STALL)) as answer:
            if known is not None and answer.status_code == 416:  # there is no more than what came of unknown size
                offer = Offer(url, have, answer.headers.get("ETag"), answer.headers.get("Last-Modified"))
                if answer.headers.get("Content-Range") == f"bytes */{have}" and offer.agrees(known):
                    print(f"{'downloaded':<14}before: {part}, {decimal(have)}", flush=True)
                    return
            start, offer = _place(answer, url, part, known, have)
            chunks = _chunks(answer, len(begins))
            first = next(chunks)
            if start == 0 and not first.startswith(begins):
                kind = shown(answer.headers.get("Content-Type", "of no type"))
                raise DownloadError(f"{shown(url, 200)}: gives another kind of file ({kind}), such as a page to log in")
            if offer.size is not None:
                check(offer.size, offer.size - start)
            _announce(offer, start, have)
            with part.open("ab" if start else "wb") as stream, transfer_bar(offer.size, start) as advance:
                if start == 0:
                    _note(part).write_text(json.dumps(asdict(offer)))
                for chunk in chain([first], chunks):
                    stream.write(chunk)
                    advance(len(chunk))
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _judged(error, url) from None
    if offer.size is not None and _size(part) != offer.size:
        raise _Again(f"cut short after {_size(part):,} of {offer.size:,} bytes")


def _place(answer: "Response", url: str, part: Path, known: Offer | None, have: int) -> tuple[int, Offer]:
    """The first byte that an answer holds, and which file it is of."""
    status, headers = answer.status_code, answer.headers
    told = shown(f"{status} {answer.reason or ''}".strip())
    size = headers.get("Content-Length", "")
    offer = Offer(url, int(size) if size.isdecimal() else None, headers.get("ETag"), headers.get("Last-Modified"))
    if status == 200:
        return 0, offer
    if known is not None and status in (206, 416):
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if span:
            offer = Offer(url, known.size if span[2] == "*" else int(span[2]), offer.etag, offer.modified)
        if status == 206 and span and int(span[1]) == have and offer.agrees(known):
            return have, offer
        discard(part)
        raise _Again("what is here is no part of the file there now", wait=0)
    if status in PASSING:
        wait = headers.get("Retry-After", "")
        raise _Again(f"the host answers {told}", float(wait) if wait.isdecimal() else None)
    why = {403: ", so it may want a browser", 404: ", so it may have moved", 410: ", so it is gone"}
    raise DownloadError(f"{shown(url, 200)}: the host answers {told}{why.get(status, '')}")


def _chunks(answer: "Response", least: int) -> Iterator[bytes]:
    """The bytes of an answer as they were sent; the first at least so many, unless there are no more."""
    chunks, first = answer.raw.stream(CHUNK, decode_content=False), b""
    for chunk in chunks:
        first += chunk
        if len(first) >= least:
            break
    yield first
    yield from chunks


def _announce(offer: Offer, start: int, have: int) -> None:
    size = "of unknown size" if offer.size is None else decimal(offer.size)
    if start:
        print(f"{'going on':<14}at {decimal(start)} of {size}", flush=True)
    else:
        anew = ", anew: the host does not go on, or the file changed" if have else ""
        print(f"{'downloading':<14}{size}{anew}", flush=True)


def _judged(error: Exception, url: str) -> Exception:
    """What went wrong in a transfer, in few words: for the user, or to be tried again."""
    import requests
    from urllib3.exceptions import NameResolutionError, NewConnectionError, TimeoutError

    inside = list(_inside(error))

    def found(*kinds: type) -> Exception | None:
        return next((one for one in inside if isinstance(one, kinds)), None)

    if isinstance(error, ValueError):
        return DownloadError(f"{shown(url, 200)}: not an address ({shown(error, 120)})")
    if isinstance(error, requests.TooManyRedirects):
        return DownloadError(f"{shown(url, 200)}: leads from address to address without an end")
    if certificate := found(ssl.SSLCertVerificationError):
        return DownloadError(f"{shown(url, 200)}: its certificate is not to be trusted ({certificate.verify_message})")
    if isinstance(error, requests.exceptions.ProxyError):
        return _Again("the proxy that the environment names does not answer, or refuses", unreachable=True)
    if found(NameResolutionError):
        return _Again("its name is not known here, so there may be no internet", unreachable=True)
    if nobody := found(NewConnectionError):
        system = next((one.strerror for one in inside if isinstance(one, OSError) and one.strerror), None)
        return _Again(f"nobody answers ({system or shown(nobody, 120)})", unreachable=True)
    if isinstance(error, requests.ConnectTimeout):
        return _Again(f"no connection in {CONNECT:g} s")
    if found(TimeoutError):
        return _Again(f"nothing came for {STALL:g} s")
    return _Again("the connection broke")


def _inside(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, as requests and urllib3 wrap them."""
    while error is not None:
        yield error
        wrapped = [getattr(error, "reason", None), *error.args, error.__cause__, error.__context__]
        error = next((one for one in wrapped if isinstance(one, BaseException)), None)


def _known(url: str, part: Path) -> Offer | None:
    """What the beginning that is here is of; None where it is of no use."""
    try:
        offer = Offer(**json.loads(_note(part).read_text()))
        usable = offer.url == url and _size(part) > 0 and (offer.size is None or _size(part) <= offer.size)
    except (OSError, ValueError, TypeError):
        return None
    return offer if usable else None


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0
