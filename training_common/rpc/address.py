"""Whether an address is free to listen on, told before gRPC tries: it answers with a page of its own log."""

from __future__ import annotations

import errno
import socket


def require_free(address: str) -> None:
    """Refuse a host:port or unix:PATH where somebody listens. What else speaks against it is left to gRPC.

    Errors: RuntimeError.
    """
    if address.startswith("unix:"):
        if _answers(address.removeprefix("unix:")):
            raise RuntimeError(f"{address} is in use: stop the server that listens there, or set another address")
        return
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return
    for family, kind, protocol, _, place in found:
        if not _can_bind(family, kind, protocol, place):
            raise RuntimeError(
                f"port {port} of {host} is in use: stop the server that listens there, or set another address"
            )


def _answers(path: str) -> bool:
    # gRPC removes a socket that it finds, also a living one's.
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def _can_bind(family: int, kind: int, protocol: int, place: tuple[object, ...]) -> bool:
    try:
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does: connections of a server that has just ended are no reason to wait.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True
