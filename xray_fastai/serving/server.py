"""`xray-fastai serve`: a page to drop images on and an API, by Starlette and uvicorn, until it is stopped."""

import errno
import logging
import os
import socket
import webbrowser
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import uvicorn

from xray_fastai import DISCLAIMER
from xray_fastai.inference.model import open_model
from xray_fastai.serving.app import Desk, create_app
from xray_fastai.system.device import describe
from xray_fastai.system.errors import UserError
from xray_fastai.system.signals import sigterm_raises

MAX_CONNECTIONS = 200
"""Of browsers and programs, idle ones too; more are answered 503. A browser holds up to six."""
PATIENCE = 5
"""Seconds: an idle connection is kept so long, and what is under way at Ctrl-C has so long to end."""


def serve(
    model: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    device: str = "auto",
    open: bool = False,
) -> None:
    """Answer until Ctrl-C or SIGTERM.

    Args:
        model: an export; None takes the newest in ./exports.
        host: the address to listen on, or a name of it.
        port: 0 takes a free one.
        device: auto, cpu, cuda or mps.
        open: show the page in the browser.

    Raises:
        UserError: no export, a damaged one, no such device, or an address or port that can't be listened on.
    """
    with sigterm_raises(), listen(host, port) as listener:
        opened = open_model(model, device, "fp32")
        desk = Desk(opened)
        if "XRAY_FASTAI_DEBUG" not in os.environ:
            logging.disable()  # what libraries log may tell of what was sent
        try:
            with suppress(KeyboardInterrupt):  # uvicorn ended well, and tells of the signal once more
                _run(desk, listener, host, newest=model is None, show=open)
            print("\nStopped.", flush=True)
        finally:
            desk.close()
            logging.disable(logging.NOTSET)


def _run(desk: Desk, listener: socket.socket, host: str, newest: bool, show: bool) -> None:
    facts, port = desk.facts, listener.getsockname()[1]
    local, everywhere = _is_local(listener), host in ("0.0.0.0", "::")
    address = f"http://{'localhost' if everywhere else f'[{host}]' if ':' in host else host}:{port}"
    rule = "the most probable is called"
    if facts.threshold is not None:
        rule = f"{facts.positive} from a probability of {facts.threshold:.4g}"
    lines = {
        "model": f"{desk.model.path}" + (" (the newest in ./exports)" if newest else ""),
        "classes": f"{', '.join(facts.classes)}; {rule}",
        "trained on": "X-rays that this program drew itself: it knows nothing of patients" if facts.rehearsal else "",
        "device": f"{describe(desk.model.learn.dls.device)}, precision fp32",
        "warning": "" if local else "other machines reach this too; there is no login, and nothing is encrypted",
        "page": address,
        "API": f"{address}/openapi.json",
    }
    print(DISCLAIMER)
    print("\n".join(f"{name:<14}{text}" for name, text in lines.items() if text))
    print("Images are held in memory, never on disk. Ctrl-C ends it.", flush=True)
    names = {"localhost", host.lower()} | (set() if local else {socket.gethostname().lower()})
    config = uvicorn.Config(
        create_app(desk, names),
        # the same on every machine, whichever of uvicorn's faster parts are installed; h11 bounds a request's head
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=PATIENCE,
        timeout_graceful_shutdown=PATIENCE,
    )
    if show:
        webbrowser.open(address)
    uvicorn.Server(config).run([listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; who connects before the model is loaded waits.

    Raises:
        UserError: the port is taken, or there is no such address or right.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (socket.gaierror, UnicodeError):
        raise UserError(
            "no such name or address; give 127.0.0.1, or 0.0.0.0 for all", option="host", value=host
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                "in use; end what uses it, or give another (--port 0 takes a free one)", option="port", value=port
            ) from None
        if error.errno == errno.EACCES:
            raise UserError("no permission to listen there; give one from 1024 on", option="port", value=port) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(
                "no address of this machine; give 127.0.0.1, or 0.0.0.0 for all", option="host", value=host
            ) from None
        raise UserError(
            f"cannot listen on port {port} ({error.strerror}); give another address", option="host", value=host
        ) from None


def _is_local(listener: socket.socket) -> bool:
    return ip_address(listener.getsockname()[0]).is_loopback
