"""The page and the API as an ASGI application: who may ask, how many at once, and what a browser may do with it."""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from ipaddress import ip_address
from urllib.parse import urlsplit

from jinja2 import Environment, StrictUndefined
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xray_fastai import DISCLAIMER
from xray_fastai.inference.model import Model
from xray_fastai.serving.openapi import describe_api
from xray_fastai.serving.predictions import Health, ModelFacts, Prediction, Predictions, Problem, answer
from xray_fastai.serving.uploads import MAX_FILE, read_uploads
from xray_fastai.system.errors import UserError

MAX_REQUESTS = 8
"""Uploads that may be on their way, waiting, or looked at; together they take `uploads.MAX_REQUEST` bytes each."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

PAGE = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}


class Guard:
    """Refuses what a page of another site makes a browser send, and adds `HEADERS` to each answer.

    A site that points its own name at this machine (DNS rebinding) is known by that name in the Host header: here stand
    IP addresses, and names that are this machine's.
    """

    def __init__(
        self,
        app: ASGIApp,
        names: set[str],  # that the server is known by, in lower case
    ):
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self.refusal(scope["method"], Headers(scope=scope))
        await (refusal or self.app)(scope, receive, send_with_headers)

    def refusal(self, method: str, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if not self.is_known(host):
            names = ", ".join(sorted(self.names))
            return _problem(421, f"host {host[:80]!r}: not an address of this server; use its IP address or {names}")
        if method not in ("GET", "HEAD"):
            origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
            if (origin is not None and urlsplit(origin).netloc != host) or site not in ("same-origin", "none"):
                return _problem(403, "sent by a page of another site; only this server's own page may")
        return None

    def is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.names:
                return True
            ip_address(name)
        except ValueError:
            return False
        return True


class Desk:
    """The model, and the one thread that uses it, so that the page answers while the network computes."""

    def __init__(self, model: Model):
        self.model, self.facts = model, ModelFacts.of(model)
        self.thread = ThreadPoolExecutor(1, "predict")
        self.requests = 0

    async def predict(self, request: Request) -> Response:
        wanted = request.query_params.get("heatmap", "true")
        if wanted not in ("true", "false"):
            raise HTTPException(400, f"heatmap={wanted[:80]}: give true or false")
        if self.requests >= MAX_REQUESTS:
            raise HTTPException(503, f"busy: {MAX_REQUESTS} requests wait already; try again", {"Retry-After": "1"})
        self.requests += 1
        try:
            uploads = await read_uploads(request)
            found = []
            while uploads and not await request.is_disconnected():
                name, file = uploads.pop(0)
                found.append(await self.look_at(name, file, wanted == "true"))
        except UserError as error:
            raise HTTPException(503, str(error), {"Retry-After": "5"}) from None
        except ClientDisconnect:
            return Response(status_code=400)
        finally:
            self.requests -= 1
        return _json(Predictions(predictions=found, model=self.facts))

    async def look_at(self, name, file, heatmap: bool) -> Prediction:
        if file.size > MAX_FILE:
            why = f"{name}: {file.size / 1e6:.0f} MB; at most {MAX_FILE // 1_000_000} MB are read"
            return Prediction(file=name, threshold=self.facts.threshold, error=why)
        content = file.file.read()
        file.file.close()
        return await asyncio.get_running_loop().run_in_executor(self.thread, answer, self.model, name, content, heatmap)

    async def health(self, request: Request) -> Response:
        return _json(Health(model=self.facts))

    def close(self) -> None:
        """Wait for the image that is looked at, drop those that wait."""
        self.thread.shutdown(cancel_futures=True)


def create_app(desk: Desk, names: set[str]) -> ASGIApp:
    """The application.

    Args:
        desk: what answers.
        names: the hosts, besides IP addresses, that the server is known by.
    """
    page = Response(_render(desk.facts), media_type="text/html")
    parts = {f"/{name}": Response(_read(name), media_type=kind) for name, kind in PAGE.items()}
    fixed = {"/": page, **parts, "/openapi.json": JSONResponse(describe_api())}
    app = Starlette(
        routes=[
            *(Route(path, response, methods=["GET"]) for path, response in fixed.items()),
            Route("/predict", desk.predict, methods=["POST"]),
            Route("/health", desk.health),
        ],
        exception_handlers={HTTPException: _refuse, Exception: _unexpected},
    )
    return Guard(app, names)


def _read(name: str) -> str:
    return files("xray_fastai.serving").joinpath("page", name).read_text(encoding="utf-8")


def _render(facts: ModelFacts) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_read("page.html.jinja"))
    return template.render(model=facts, disclaimer=DISCLAIMER, max_file=MAX_FILE)


def _json(content: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(content.model_dump_json(), status, headers, "application/json")


def _problem(status: int, error: str, headers: dict[str, str] | None = None) -> Response:
    return _json(Problem(error=error), status, headers)


def _refuse(request: Request, error: HTTPException) -> Response:
    return _problem(error.status_code, error.detail, error.headers)


def _unexpected(request: Request, error: Exception) -> Response:
    text = f"unexpected {type(error).__name__}. This is a bug in xray-fastai: please report it"
    print(f"Error: {text} with what XRAY_FASTAI_DEBUG=1 shows.", file=sys.stderr, flush=True)
    return _problem(500, text)
