"""Who may speak to the page: hosts that name this machine, and for actions only the page itself."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_HEADER = "x-forge-token"  # noqa: S105 - a header's name

# Everything is a file of this server: no inline script, no other host, no frame around it.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host's address."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _host_of(header: str) -> str:
    """Return the host of a Host header, without its port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] or header if header.count(":") == 1 else header


class HostGuard:
    """Refuses a Host that another site can make point here, and sets the headers that every answer has.

    A page of another site whose name suddenly resolves to this machine sends that name (DNS rebinding). An IP address
    cannot be made to point elsewhere, so each one is taken; names must be known. What a page of another site asks of
    the API is refused, as browsers tell it.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = _host_of(Headers(scope=scope).get("host", "")).lower()
        if host not in self._names and not _is_address(host):
            text = f"unknown host {host[:200]!r}: open the page by its address, or start it with --allow-host\n"
            await PlainTextResponse(text, status_code=421)(scope, receive, send)
            return

        site = Headers(scope=scope).get("sec-fetch-site", "none")
        if scope["path"].startswith("/api/") and site not in ("same-origin", "none"):
            # It could not read the answer, but keep streams open here, each with one to a service behind it.
            await PlainTextResponse("another site sent this request\n", status_code=403)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, send_with_headers)


@dataclass(frozen=True)
class ActionGuard:
    """Lets actions through that the page itself sends. token: known to nobody who cannot read the page."""

    allowed: bool
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    def refusal(self, request: Request) -> str:
        """Return why a request to change something is not passed on, "" where it is."""
        if not self.allowed:
            return "this dashboard only shows: start it with `forge dashboard --actions` to steer jobs"
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return "another site sent this request"
        if not secrets.compare_digest(request.headers.get(TOKEN_HEADER, "").encode(), self.token.encode()):
            return "the request does not bear this dashboard's token: load the page again"
        return ""
