"""Runs the page in this process until it is interrupted."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection

import uvicorn

from cognateforge.dashboard.app import build
from cognateforge.dashboard.guard import is_loopback
from cognateforge.dashboard.upstream import Upstreams
from cognateforge.exceptions import ClientSetupError

# Streams have no end of their own: who watches connects again.
_DRAIN_S = 2


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
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_S,
    )
    with listening:
        on_ready(url_of(listening))
        uvicorn.Server(config).run(sockets=[listening])
