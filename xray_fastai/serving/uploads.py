"""Files that come in by a form: into memory, never onto disk, and no more than there is room for."""

import asyncio

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

MAX_FILE, MAX_REQUEST, MAX_FILES = 50_000_000, 100_000_000, 32
"""Bytes of a file and of a request, files of a request. The largest X-ray detectors have some 20 million pixels, which
uncompressed take 40 MB."""
UPLOAD_SECONDS = 60
"""For a request's files to arrive in."""


class InMemoryParser(MultiPartParser):
    """Starlette's, which would put a file of more than 1 MB into the folder of temporary files."""

    spool_max_size = 2 * MAX_REQUEST  # more than there can be


async def read_uploads(request: Request) -> list[tuple[str, UploadFile]]:
    """The files of a `multipart/form-data` request, by name, in their order.

    Raises:
        HTTPException: another content type (415), no form that can be read, no file in it (400), too large (413), too
            slow (408).
        ClientDisconnect: nobody waits for the answer any more.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise HTTPException(415, f"content type {kind[:80] or 'none'}: send files as multipart/form-data")
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            parser = InMemoryParser(
                request.headers, _bounded(request), max_files=MAX_FILES, max_fields=4, max_part_size=1000
            )
            form = await parser.parse()
    except TimeoutError:
        raise HTTPException(408, f"the files took more than {UPLOAD_SECONDS} s to arrive; send fewer at once") from None
    except MultiPartException as error:
        raise HTTPException(400, f"the form can't be read ({error.message.rstrip('.')})") from None
    files = [(part.filename or "unnamed", part) for _, part in form.multi_items() if isinstance(part, UploadFile)]
    if len(files) < len(form.multi_items()):
        raise HTTPException(400, "a form field that is no file: send files alone; options go into the address")
    if not files:
        raise HTTPException(400, "no file in the form: send one or several under the name 'file'")
    return files


async def _bounded(request: Request):
    "The request's body, for as long as it is no larger than it may be."
    too_large = HTTPException(413, f"more than {MAX_REQUEST // 1_000_000} MB in one request; send fewer files at once")
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told) > MAX_REQUEST:
        raise too_large
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_REQUEST:
            raise too_large
        yield chunk
