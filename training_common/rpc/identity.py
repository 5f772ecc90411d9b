"""Who calls: the SPIFFE id of a client's certificate, or this machine's own "local" where there is no TLS.

gRPC sets `peer_spiffe_id` only where a certificate has exactly one URI and that one is a well-formed SPIFFE id. A DNS
name that looks like one does not count, and neither does the subject.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc

from cognateforge.exceptions import IdentityMissingError

_SPIFFE = "peer_spiffe_id"
LOCAL = "local"
# What the store's column for a caller holds.
MAX_NAME_CHARS = 255
# Trust domain and path as in the SPIFFE-ID standard, without empty or relative segments.
SPIFFE_ID = re.compile(r"spiffe://[a-z0-9._-]{1,255}(/(?!\.{1,2}(/|$))[A-Za-z0-9._-]+)+")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who calls, and which parts the caller plays."""

    name: str
    roles: frozenset[str]


_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Return the caller of the RPC that is being served."""
    return _caller.get()


def set_caller(caller: Caller) -> None:
    """Make a caller the one of the RPC that is being served."""
    _caller.set(caller)


class Callers:
    """Tells the caller of a call.

    roles: parts by SPIFFE id, for a server with TLS. A caller that is not among them plays no part.
    local_roles: the parts of everybody where there is no TLS, which is on loopback and Unix sockets only.
    """

    def __init__(self, roles: Mapping[str, Sequence[str]], *, local_roles: Sequence[str], tls: bool) -> None:
        self._tls = tls
        self._known = {name: Caller(name=name, roles=frozenset(played)) for name, played in roles.items()}
        self._local = Caller(name=LOCAL, roles=frozenset(local_roles))

    def any(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        """Return who calls, or a caller without name and roles: for what is open to everybody."""
        try:
            return self.of(context)
        except IdentityMissingError:
            return Caller(name="", roles=frozenset())

    def of(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        """Return who calls. Errors: IdentityMissingError, for a certificate without one SPIFFE id."""
        if not self._tls:
            return self._local
        ids = list(context.auth_context().get(_SPIFFE, ()))
        if len(ids) != 1:
            raise IdentityMissingError()
        name = ids[0].decode("utf-8", "replace")
        return self._known.get(name) or Caller(name=name, roles=frozenset())
