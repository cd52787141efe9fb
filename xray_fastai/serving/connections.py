"""Limits what one client can hold: connections without a request, and its share of all connections."""

import asyncio
from collections import Counter
from ipaddress import ip_address, ip_network
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 200
"""Open connections, idle ones included; further requests get status 503. A browser opens up to six."""
MAX_OF_CLIENT = MAX_CONNECTIONS // 4
"""Open connections of one client on another machine; further ones are closed. Programs on this machine, and those that
come by `ssh -L`, share one address and have no such limit."""
HEAD_SECONDS = 10.0
"""The head of a request must arrive within this time, the first one from the opening of the connection on."""

_connections: Counter[str] = Counter()  # open ones by client


def client_of(address: str | None) -> str | None:
    """Return whom a client's address belongs to: an IPv4 address, or an IPv6 network; None for this machine.

    One machine may have all addresses of an IPv6 network of 64 bits.
    """
    try:
        ip = ip_address(address or "")
    except ValueError:  # a socket of the operating system
        return None
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback:
        return None
    return str(ip if ip.version == 4 else ip_network(f"{ip}/64", strict=False))


class Connection(H11Protocol):
    """Adds both limits to uvicorn's connection, which limits only the time between two requests.

    `conn`, h11's connection, is a name that uvicorn does not document; `tests/serving` looks at both limits.
    """

    transport: asyncio.Transport

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.owner = client_of((transport.get_extra_info("peername") or [None])[0])
        self.head_timer: asyncio.TimerHandle | None = None
        self.watch_head()
        if self.owner is not None:
            _connections[self.owner] += 1
            if _connections[self.owner] > MAX_OF_CLIENT:
                transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_watching()
        if self.owner is not None:
            _connections[self.owner] -= 1
            if not _connections[self.owner]:
                del _connections[self.owner]
        super().connection_lost(exc)

    def watch_head(self) -> None:
        """Start to wait for the rest of a request's head, or stop it where the head is complete."""
        if self.conn.their_state is not h11.IDLE:
            self.stop_watching()
        elif self.head_timer is None:
            self.head_timer = asyncio.get_running_loop().call_later(HEAD_SECONDS, self.transport.abort)

    def stop_watching(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None
