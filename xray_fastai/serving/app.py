"""The page and the API as an ASGI application: who may ask, how many requests at once, the headers of answers."""

import asyncio
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from ipaddress import ip_address
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from jinja2 import Environment, StrictUndefined
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xray_fastai import DISCLAIMER, __version__
from xray_fastai.inference.rows import RowBuilder
from xray_fastai.serving.connections import client_of
from xray_fastai.serving.decoding import Decoder
from xray_fastai.serving.predictions import (
    Health,
    ModelFacts,
    Options,
    Prediction,
    Predictions,
    Problem,
    predict_file,
    unreadable,
)
from xray_fastai.serving.uploads import MAX_FILE, MAX_FILES, MAX_REQUEST, UPLOAD_SECONDS, read_uploads
from xray_fastai.system.errors import UserError
from xray_fastai.system.text import FORMULA

MAX_REQUESTS = 8
"""Requests to `/predict` at once, arriving, waiting or running. Each holds up to `uploads.MAX_REQUEST` bytes."""
MAX_OF_CLIENT = MAX_REQUESTS // 2
"""Those of one client on another machine."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

CLOSE = {"Connection": "close"}

SCRIPTS = ("page.js", "requests.js", "results.js", "enlarged.js", "save.js", "facts.js")
PAGE = {"page.css": "text/css", "icon.svg": "image/svg+xml"} | dict.fromkeys(SCRIPTS, "text/javascript")

TELEMETRY = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI records requests by OpenTelemetry where that is configured; versions without it ignore this setting."""

REFUSALS = {
    400: "The form cannot be read, is cut short, has no file or too many files; or an option is wrong.",
    403: "A page of another site sent the request.",
    408: f"The files did not arrive within {UPLOAD_SECONDS} s, or too slowly.",
    413: f"The request has more than {MAX_REQUEST:,} bytes.",
    415: "The request is not `multipart/form-data`.",
    421: "The Host header is not an address of this server.",
    500: "A bug: please report it.",
    503: "The server is busy, was stopped, or its device is out of memory.",
    "default": "Any other error.",
}

FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_FILES,
            "items": {"type": "string", "contentMediaType": "application/octet-stream"},
            "description": f"One or several images, each of at most {MAX_FILE:,} bytes.",
        }
    },
}
"""The body of `POST /predict`. `uploads` reads it, because FastAPI would write large files to the disk."""


def _true_or_false(text: str) -> bool:
    if text not in ("true", "false"):
        raise PydanticCustomError("true_or_false", "give true or false")
    return text == "true"


Heatmap = Annotated[
    bool,
    BeforeValidator(_true_or_false),
    Query(
        description="Whether to add pictures to each prediction: the image as it was read, as the network sees it, and "
        "its heat map."
    ),
]


WINDOW = r"-?\d{1,9}(\.\d{1,6})?,\d{1,9}(\.\d{1,6})?"


def _centre_and_width(text: str) -> str:
    if not re.fullmatch(WINDOW, text, re.ASCII):
        raise PydanticCustomError("window", "give the centre and the width of a window, such as 40,400")
    return text


Window = Annotated[
    str | None,
    BeforeValidator(_centre_and_width),
    Query(
        description="Centre and width of the window that shows DICOM files, in their own units, in place of their own "
        "window or VOI LUT. A file that cannot have it is not read.",
        examples=["40,400"],
        json_schema_extra={"pattern": f"^{WINDOW}$"},
    ),
]


class Guard:
    """Refuses requests that a page of another site makes a browser send, and adds `HEADERS` to each answer.

    A foreign site may point its own name at this machine (DNS rebinding). The Host header then holds that name, so only
    IP addresses and this machine's names are accepted there.
    """

    def __init__(
        self,
        app: ASGIApp,
        names: set[str],  # this server's host names, in lower case
    ):
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                started = True
            await send(message)

        refusal = self.refusal(scope["method"], Headers(scope=scope))
        try:
            await (refusal or self.app)(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            if not started:
                stopped = _problem(503, "the server was stopped before it had answered", CLOSE)
                await stopped(scope, receive, send_with_headers)
            raise

    def refusal(self, method: str, headers: Headers) -> Response | None:
        """Return the answer to a request that is refused, or None."""
        if "content-length" in headers and "transfer-encoding" in headers:  # RFC 9112, 6.1
            return _problem(400, "Content-Length and Transfer-Encoding exclude each other; send one of them", CLOSE)
        host = headers.get("host", "")
        if not self.is_known(host):
            names = ", ".join(sorted(self.names))
            return _problem(421, f"host {host[:80]!r}: not an address of this server; use its IP address or {names}")
        if method not in ("GET", "HEAD"):
            origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
            if (origin is not None and urlsplit(origin).netloc != host) or site not in ("same-origin", "none"):
                return _problem(403, "sent by a page of another site; only this server's own page may do that")
        return None

    def is_known(self, host: str) -> bool:
        """Return whether a Host header holds an IP address or one of this server's names."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.names:
                return True
            ip_address(name)
        except ValueError:
            return False
        return True


class Predictor:
    """Answers the API's requests by one model, in one thread, so that the page responds while the network computes."""

    def __init__(self, builder: RowBuilder):
        self.builder, self.facts = builder, ModelFacts.of(builder)
        self.thread, self.decoder = ThreadPoolExecutor(1, "predict"), Decoder()
        self.decoder.start()
        self.requests: Counter[str | None] = Counter()  # by client

    async def predict(self, request: Request, heatmap: Heatmap = True, window: Window = None) -> Predictions:
        centre_and_width = None if window is None else tuple(map(float, window.split(",")))
        options = Options(heatmap, centre_and_width)
        client = client_of(request.client.host if request.client else None)
        if self.requests.total() >= MAX_REQUESTS or (client and self.requests[client] >= MAX_OF_CLIENT):
            message = f"the server is busy: {self.requests.total()} requests are waiting; try again"
            raise HTTPException(503, message, {"Retry-After": "1"})
        self.requests[client] += 1
        try:
            uploads = await read_uploads(request)
            predictions = []
            while uploads and not await request.is_disconnected():
                name, file = uploads.pop(0)
                predictions.append(await self._predict(name, file, options))
        except UserError as error:
            raise HTTPException(503, error.message, {"Retry-After": "5"}) from None
        except ClientDisconnect:
            raise HTTPException(400, "the client closed the connection") from None
        finally:
            self.requests -= Counter([client])  # leaves no client without a request
        return Predictions(predictions=predictions, model=self.facts)

    async def _predict(self, name: str, file: UploadFile, options: Options) -> Prediction:
        if file.size > MAX_FILE:
            reason = f"{file.size / 1e6:.0f} MB; the maximum is {MAX_FILE // 1_000_000} MB"
            return unreadable(self.builder, name, reason)
        content = file.file.read()
        file.file.close()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.thread, predict_file, self.builder, self.decoder, name, content, options)

    async def health(self) -> Health:
        return Health(model=self.facts)

    def close(self) -> None:
        """Wait for the prediction that is running, but not for a file's decoding, and cancel those that wait."""
        self.decoder.close()
        self.thread.shutdown(cancel_futures=True)


def create_app(predictor: Predictor, names: set[str]) -> ASGIApp:
    """Return the application.

    Args:
        predictor: answers the requests of the API.
        names: the host names of this server; its IP addresses are accepted, too.
    """
    app = FastAPI(
        title="xray-fastai",
        version=__version__,
        description=f"A chest X-ray classifier. {DISCLAIMER} The server keeps no file that it receives.",
        license_info={"name": "Apache 2.0", "identifier": "Apache-2.0"},
        servers=[{"url": "/"}],
        docs_url=None,  # these two pages load scripts from another server
        redoc_url=None,
        telemetry=TELEMETRY,
        exception_handlers={
            HTTPException: _refuse,
            RequestValidationError: _refuse_option,
            Exception: _unexpected,
        },
    )
    _add_page(app, predictor)
    app.add_api_route(
        "/predict",
        predictor.predict,
        methods=["POST"],
        operation_id="predict",
        summary="Predict one or several images.",
        description="A file that cannot be read has its `error` in the answer, whose status is 200.",
        response_description="One prediction for each file.",
        responses=_refusals(*REFUSALS),
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}},
    )
    app.add_api_route(
        "/health",
        predictor.health,
        operation_id="health",
        summary="Check that the server is running, and which model it uses.",
        response_description="The server is running.",
        responses=_refusals(421),
    )
    app.add_api_route("/health", predictor.health, methods=["HEAD"], include_in_schema=False)
    return Guard(app, names)


def _add_page(app: FastAPI, predictor: Predictor) -> None:
    fixed = {f"/{name}": Response(_read(name), media_type=kind) for name, kind in PAGE.items()}
    fixed["/"] = Response(_render(predictor), media_type="text/html")
    for path, response in fixed.items():
        app.add_route(path, response, methods=["GET"], include_in_schema=False)


def _read(name: str) -> str:
    return files("xray_fastai.serving").joinpath("page", name).read_text(encoding="utf-8")


def _render(predictor: Predictor) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_read("page.html.jinja"))
    columns = [{"name": column.name, "isNumber": column.type is float} for column in predictor.builder.columns]
    return template.render(
        model=predictor.facts,
        facts=predictor.facts.model_dump_json(),
        columns=columns,
        disclaimer=DISCLAIMER,
        max_file=MAX_FILE,
        formula=FORMULA,
    )


def _refusals(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    """Return the error answers of an operation, as FastAPI's `responses` takes them."""
    responses = {status: {"model": Problem, "description": REFUSALS[status]} for status in statuses}
    if 503 in responses:
        retry = {"description": "Wait this many seconds before the next try.", "schema": {"type": "integer"}}
        responses[503]["headers"] = {"Retry-After": retry}
    return responses


def _problem(status: int, error: str, headers: dict[str, str] | None = None) -> Response:
    return Response(Problem(error=error).model_dump_json(), status, headers, "application/json")


def _refuse(request: Request, error: HTTPException) -> Response:
    return _problem(error.status_code, error.detail, error.headers)


def _refuse_option(request: Request, error: RequestValidationError) -> Response:
    fault = error.errors()[0]
    return _problem(400, f"{fault['loc'][-1]}={str(fault['input'])[:80]}: {fault['msg']}")


def _unexpected(request: Request, error: Exception) -> Response:
    text = f"unexpected {type(error).__name__}. This is a bug in xray-fastai: please report it"
    print(f"Error: {text} with the output of XRAY_FASTAI_DEBUG=1.", file=sys.stderr, flush=True)
    return _problem(500, text)
