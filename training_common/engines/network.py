"""Which of this machine's addresses and interfaces lead to another machine."""

from __future__ import annotations

import errno
import socket

import psutil

# Nothing is sent: the kernel only says which way it would go.
_ANY_PORT = 9


def listen(host: str) -> socket.socket:
    """Return a socket that listens on a free port of this machine's address. Errors: OSError, where it has no such."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.bind(address)
        listening.listen()
    except OSError:
        listening.close()
        raise
    return listening


def interface_to(host: str) -> str:
    """Return the name of the interface that leads to a host. Errors: OSError, where none does."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as asking:
        asking.connect(address)
        own = asking.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == own for one in addresses):
            return name
    raise OSError(errno.EADDRNOTAVAIL, f"no interface has the address {own}, by which {host} is reached")
