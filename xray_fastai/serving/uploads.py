"""Reads the files of an upload into memory, never onto the disk, with limits on sizes, numbers and time."""

import asyncio
from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

MAX_FILE, MAX_REQUEST, MAX_FILES = 50_000_000, 100_000_000, 32
"""Bytes of a file, bytes of a request, and files of a request. The largest X-ray detectors have some 20 million pixels,
which take 40 MB uncompressed."""
UPLOAD_SECONDS = 60
"""The files of a request must arrive within this time."""
MIN_RATE, FIRST_SECONDS = 20_000, 5
"""Bytes a second that must arrive on average, from `FIRST_SECONDS` on."""


class InMemoryParser(MultiPartParser):
    """Keeps every file in memory, where Starlette's parser writes a file of more than 1 MB to a temporary file."""

    spool_max_size = 2 * MAX_REQUEST  # larger than any request
    ended = False  # whether the form's last boundary arrived

    def on_end(self) -> None:
        self.ended = True


async def read_uploads(request: Request) -> list[tuple[str, UploadFile]]:
    """Return the files of a `multipart/form-data` request with their names, in the order of the request.

    Raises:
        HTTPException: another content type (415), a broken form or one without a file (400), too large (413), or too
            slow (408).
        ClientDisconnect: the client closed the connection.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise HTTPException(415, f"content type {content_type[:80] or 'none'}: send files as multipart/form-data")
    try:
        async with asyncio.timeout(min(FIRST_SECONDS, UPLOAD_SECONDS)) as timeout:
            parser = InMemoryParser(
                request.headers, _bounded(request, timeout), max_files=MAX_FILES, max_fields=4, max_part_size=1000
            )
            form = await parser.parse()
    except TimeoutError:
        message = (
            f"the files did not arrive within {UPLOAD_SECONDS} s, or with less than {MIN_RATE // 1000} kB/s; "
            "send fewer files in one request"
        )
        raise HTTPException(408, message, {"Connection": "close"}) from None
    except (MultiPartException, FormParserError) as error:  # Starlette 1.0 passes on the parser's own
        raise HTTPException(400, f"the form cannot be read ({str(error).rstrip('.')})") from None
    if not parser.ended:
        raise HTTPException(400, "the form is cut short: its last boundary is missing; send it again")
    files = [(part.filename or "unnamed", part) for _, part in form.multi_items() if isinstance(part, UploadFile)]
    if len(files) < len(form.multi_items()):
        raise HTTPException(400, "a field of the form is not a file; send files only, and options in the address")
    if not files:
        raise HTTPException(400, "the form has no file; send one or several under the name 'file'")
    return files


async def _bounded(request: Request, timeout: asyncio.Timeout) -> AsyncIterator[bytes]:
    """Yield the request's body; stop with status 413 once it is larger than `MAX_REQUEST`.

    Each byte that arrives moves `timeout`, as `UPLOAD_SECONDS` and `MIN_RATE` say.
    """
    too_large = HTTPException(413, f"more than {MAX_REQUEST // 1_000_000} MB in one request; send fewer files at once")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > MAX_REQUEST:
        raise too_large
    size, start = 0, asyncio.get_running_loop().time()
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_REQUEST:
            raise too_large
        timeout.reschedule(start + min(UPLOAD_SECONDS, max(FIRST_SECONDS, size / MIN_RATE)))
        yield chunk
