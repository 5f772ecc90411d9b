"""Runs the page in this process until it is interrupted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection
from typing import cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cognateforge.dashboard.app import build
from cognateforge.dashboard.guard import is_loopback
from cognateforge.dashboard.upstream import Upstreams
from cognateforge.exceptions import ClientSetupError

# Streams have no end of their own: who watches connects again.
_DRAIN_S = 2
# A browser asks at once, and has a handful of connections beside its streams. Above the bound one that asks nothing
# gives way: whoever holds connections open takes the page from nobody.
REQUEST_S = 10.0
CONNECTIONS = 512


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Errors: ClientSetupError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise ClientSetupError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from error
    listening.listen()
    return listening


def url_of(listening: socket.socket) -> str:
    """Return where a browser finds what listens."""
    host, port, *_ = listening.getsockname()
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class Impatient(H11Protocol):
    """A connection that is closed where it asks nothing, or not to the end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            others = (cast("Impatient", one) for one in self.connections if one is not self)
            next((one for one in others if one.is_idle and not one.transport.is_closing()), self).transport.abort()
        self.loop.call_later(REQUEST_S, self._give_up)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _give_up(self) -> None:
        if self.cycle is None:
            self.transport.abort()


def serve(
    upstreams: Upstreams,
    *,
    host: str,
    port: int,
    actions: bool,
    names: Collection[str],
    on_ready: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM. port: 0 for any. names: hosts besides addresses and localhost.

    Errors: ClientSetupError; also for actions where others than this machine reach the page.
    """
    if actions and not is_loopback(host):
        raise ClientSetupError(
            f"--actions on {host} would let everybody who reaches it act as you: the page has no sign-in. Keep it on "
            "127.0.0.1, and reach it from elsewhere through ssh -L"
        )
    listening = listen(host, port)
    config = uvicorn.Config(
        build(upstreams, actions=actions, names=[*names, host]),
        http=Impatient,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_S,
    )
    with listening:
        on_ready(url_of(listening))
        uvicorn.Server(config).run(sockets=[listening])
