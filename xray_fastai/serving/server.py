"""Runs `xray-fastai serve`: opens the export, listens on a port, and runs the application until it is stopped."""

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
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.export.reader import why_chosen
from xray_fastai.inference.model import open_model
from xray_fastai.inference.rows import RowBuilder
from xray_fastai.serving.app import Predictor, create_app
from xray_fastai.serving.connections import MAX_CONNECTIONS, Connection
from xray_fastai.system.device import describe
from xray_fastai.system.errors import UserError
from xray_fastai.system.signals import sigterm_raises

CLOSE_SECONDS = 5
"""An idle connection is closed after this time. Requests that are running at Ctrl-C have this time to finish."""


def serve(
    model: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    config: PredictConfig,
    open: bool = False,
) -> None:
    """Serve the page and the API until Ctrl-C or SIGTERM.

    Args:
        model: an export's folder; None takes the newest in ./exports.
        host: the address to listen on, or its name.
        port: the port to listen on; 0 takes a free one.
        config: of its options, `prevalence`, `gate`, `abstain` and `device` count; the server computes in fp32.
        open: open the page in the browser.

    Raises:
        UserError: there is no export, or it is damaged; the device is missing; the address or port cannot be used; or
            `prevalence` or `abstain` was given for a model of more than two classes.
    """
    with sigterm_raises(), listen(host, port) as listener:
        opened = open_model(model, config.device, "fp32").at_prevalence(config.prevalence)
        predictor = Predictor(RowBuilder(opened, config))
        if "XRAY_FASTAI_DEBUG" not in os.environ:
            logging.disable()  # the log of a library may contain what a client sent
        try:
            with suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has ended
                _run(predictor, listener, host, why_chosen(model), show=open)
            print("\nStopped.", flush=True)
        finally:
            predictor.close()
            logging.disable(logging.NOTSET)


def _run(predictor: Predictor, listener: socket.socket, host: str, why: str, show: bool) -> None:
    port = listener.getsockname()[1]
    local, on_all_addresses = _is_local(listener), host in ("0.0.0.0", "::")
    address = f"http://{'localhost' if on_all_addresses else f'[{host}]' if ':' in host else host}:{port}"
    model = predictor.builder.model
    lines = {
        "device": f"{describe(model.device)}, precision fp32",
        "warning": "" if local else "other machines can reach this server; it has no login and no encryption",
        "page": address,
        "API": f"{address}/openapi.json",
    }
    print(DISCLAIMER)
    print(f"{'model':<14}{model.path}{why}")
    print(predictor.builder)
    print("\n".join(f"{name:<14}{text}" for name, text in lines.items() if text))
    print("Images stay in memory and are never written to disk. Press Ctrl-C to stop.", flush=True)
    names = {"localhost", host.lower()} | (set() if local else {socket.gethostname().lower()})
    config = uvicorn.Config(
        create_app(predictor, names),
        # the same on every machine, even if uvicorn's faster parts are installed; h11 limits the size of the head
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=CLOSE_SECONDS,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    if show:
        webbrowser.open(address)
    uvicorn.Server(config).run([listener])


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; a client that connects before the model is loaded waits.

    Raises:
        UserError: the port is in use or needs more rights, or this machine does not have the address.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (socket.gaierror, UnicodeError):
        option, message = "host", "unknown name or address; give 127.0.0.1, or 0.0.0.0 to listen on all addresses"
    except OSError as error:
        option, message = _fault_of(error, port)
    raise UserError(message, option=option, value=host if option == "host" else port)


def _fault_of(error: OSError, port: int) -> tuple[str, str]:
    """Return the option that is wrong, and the message about it."""
    match error.errno:
        case errno.EADDRINUSE:
            return "port", "already in use; stop the program that uses it, or give another (port=0 takes a free one)"
        case errno.EACCES:
            return "port", "no permission to listen on it; give a port of 1024 or more"
        case errno.EADDRNOTAVAIL:
            return "host", "not an address of this machine; give 127.0.0.1, or 0.0.0.0 to listen on all addresses"
    return "host", f"cannot listen on port {port} ({error.strerror}); give another address"


def _is_local(listener: socket.socket) -> bool:
    return ip_address(listener.getsockname()[0]).is_loopback
