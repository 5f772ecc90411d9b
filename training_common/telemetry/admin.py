"""The admin listener: /metrics for Prometheus and the pages of probes, over plain HTTP, and nothing else.

It speaks just enough HTTP for a scraper, a probe and curl: one request a connection, without a body.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path

import structlog

from training_common.rpc.address import require_free

log = structlog.get_logger(__name__)

# A scraper's request is a few hundred bytes, and comes at once.
_REQUEST_BYTES = 16 << 10
_REQUEST_S = 5.0
_ANSWER_S = 30.0
# Scrapers and probes are a handful. Above it the oldest of those that ask nothing gives way, or else the oldest of all:
# whoever holds connections open keeps nobody from the service's health.
_MOST_CONNECTIONS = 32
_TEXT = "text/plain; charset=utf-8"

# Takes the value of the Accept header; returns the page and its content type.
Metrics = Callable[[str], Awaitable[tuple[bytes, str]]]


class AdminListener:
    """Serves the pages. probes: by path, returns whether what it asks for is so, and the word for it."""

    def __init__(self, address: str, *, metrics: Metrics, probes: Mapping[str, Callable[[], tuple[bool, str]]]) -> None:
        self._wanted = address
        self._metrics = metrics
        self._probes = probes
        self._server: asyncio.Server | None = None
        # In the order in which they came; whether each has asked.
        self._open: dict[asyncio.StreamWriter, bool] = {}
        self.address = ""

    async def start(self) -> None:
        """Listen. `address` then holds the real port. Errors: RuntimeError, when the address cannot be used."""
        require_free(self._wanted)
        try:
            if self._wanted.startswith("unix:"):
                _remove(self._wanted)  # nobody listens there
                path = self._wanted.removeprefix("unix:")
                self._server = await asyncio.start_unix_server(self._serve, path, limit=_REQUEST_BYTES)
                self.address = self._wanted
                return
            host, _, port = self._wanted.rpartition(":")
            self._server = await asyncio.start_server(self._serve, host.strip("[]"), int(port), limit=_REQUEST_BYTES)
        except (OSError, ValueError, OverflowError) as error:
            raise RuntimeError(
                f"telemetry.address {self._wanted!r} cannot be used: {error}; set another, or leave it out"
            ) from error
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Listen no longer. A page that is on its way is sent to its end, or for a moment."""
        if self._server is None:
            return
        self._server.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._server.wait_closed()
        if self.address.startswith("unix:"):
            _remove(self.address)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= _MOST_CONNECTIONS:
            gives_way = next((one for one, asked in self._open.items() if not asked), next(iter(self._open)))
            del self._open[gives_way]
            gives_way.transport.abort()
        self._open[writer] = False
        try:
            await self._answer_one(reader, writer)
            # What was written is still on its way: a reader that does not read it would be kept for ever.
            writer.close()
            async with asyncio.timeout(_ANSWER_S):
                await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            pass  # whoever asked has gone, or never asked, or does not read
        except Exception:
            log.exception("admin page failed")
        finally:
            self._open.pop(writer, None)
            writer.transport.abort()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(_REQUEST_S):
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.LimitOverrunError:
                await _send(writer, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, b"the request is too long\n")
                return
        if writer in self._open:
            self._open[writer] = True
        async with asyncio.timeout(_ANSWER_S):
            await self._answer(head, writer)

    async def _answer(self, head: bytes, writer: asyncio.StreamWriter) -> None:
        line, *fields = head.decode("latin-1").split("\r\n")
        words = line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            await _send(writer, HTTPStatus.BAD_REQUEST, b"this is no HTTP/1.1 request\n")
            return
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            await _send(writer, HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD\n", {"Allow": "GET, HEAD"})
            return
        bodiless, path = method == "HEAD", target.partition("?")[0]
        if path == "/metrics":
            body, kind = await self._metrics(_accepted(fields))
            await _send(writer, HTTPStatus.OK, body, {"Content-Type": kind}, bodiless=bodiless)
        elif path in self._probes:
            well, word = self._probes[path]()
            status = HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
            await _send(writer, status, f"{word}\n".encode(), bodiless=bodiless)
        else:
            there = f"there are /metrics, {', '.join(self._probes)}\n"
            await _send(writer, HTTPStatus.NOT_FOUND, there.encode(), bodiless=bodiless)


def _remove(address: str) -> None:
    Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def _accepted(fields: list[str]) -> str:
    values = [
        value.strip() for name, _, value in (field.partition(":") for field in fields) if name.lower() == "accept"
    ]
    return ",".join(values)


async def _send(
    writer: asyncio.StreamWriter,
    status: HTTPStatus,
    body: bytes,
    headers: Mapping[str, str] | None = None,
    *,
    bodiless: bool = False,
) -> None:
    lines = {
        "Content-Type": _TEXT,
        **(headers or {}),
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(f"HTTP/1.1 {status.value} {status.phrase}\r\n{head}\r\n".encode("latin-1"))
    if not bodiless:
        writer.write(body)
    await writer.drain()
