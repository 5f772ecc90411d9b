"""Where a service is: a fixed list of addresses, or Consul."""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from cognateforge.client.deadline import remaining_budget_s
from cognateforge.exceptions import ClientSetupError, UnavailableError

logger = logging.getLogger(__name__)

_CONSUL = "consul://"
_SERVICE = re.compile(r"[A-Za-z0-9._-]+")
FIRST_ANSWER_S = 10.0

OnChange = Callable[[tuple[str, ...]], None]


class Discovery(Protocol):
    """Finds the addresses of one service, and tells when they change."""

    def addresses(self) -> tuple[str, ...]:
        """Return the addresses now. May block for a first answer; raises UnavailableError when there is none."""

    def subscribe(self, on_change: OnChange) -> Callable[[], None]:
        """Call `on_change` from any thread with every new list. Returns what ends the subscription."""

    def close(self) -> None:
        """Stop looking."""


class StaticDiscovery:
    """A list that does not change."""

    def __init__(self, addresses: Sequence[str] | str) -> None:
        listed = addresses.split(",") if isinstance(addresses, str) else addresses
        self._addresses = tuple(address.strip() for address in listed if address.strip())
        if not self._addresses:
            raise ClientSetupError("give at least one address, for instance 127.0.0.1:7101")

    def addresses(self) -> tuple[str, ...]:
        """Return the list."""
        return self._addresses

    def subscribe(self, on_change: OnChange) -> Callable[[], None]:
        """Return at once: nothing will change."""
        return lambda: None

    def close(self) -> None:
        """Nothing is held."""


class ConsulDiscovery:
    """The passing instances of a service, followed by Consul's blocking queries in one daemon thread.

    A list that turns empty, and a Consul that cannot be reached, leave the last known addresses in place: an instance
    that answers is better than none, and the breaker finds those that do not.
    """

    def __init__(
        self,
        service: str,
        *,
        host: str | None = None,
        port: int | None = None,
        token: str | None = None,
        scheme: str | None = None,
        tag: str | None = None,
        wait_s: float = 30.0,
        first_answer_s: float = FIRST_ANSWER_S,
        retry_s: float = 1.0,
    ) -> None:
        self._service = service
        self._query: dict[str, Any] = {
            "passing": True,
            "wait": f"{max(1, round(wait_s * 1000))}ms",
            "tag": tag,
            "token": token,  # with every query: py-consul prefers CONSUL_HTTP_TOKEN to a client's own
        }
        self._connect: dict[str, Any] = {"host": host, "port": port, "scheme": scheme}
        self._first_answer_s = first_answer_s
        self._retry_s = retry_s
        self._lock = threading.Lock()
        self._addresses: tuple[str, ...] = ()
        self._found = threading.Event()
        # What the last query that failed said; "" once one was answered.
        self._trouble = ""
        self._closed = threading.Event()
        self._subscribers: list[OnChange] = []
        self._thread: threading.Thread | None = None

    def addresses(self) -> tuple[str, ...]:
        """Return the addresses, after waiting for Consul's first answer, but not beyond the caller's deadline."""
        self._start()
        left_s = remaining_budget_s()
        wait_s = self._first_answer_s if left_s is None else max(0.0, min(left_s, self._first_answer_s))
        if not self._found.wait(wait_s):
            why = f": it cannot be asked: {self._trouble[:300]}" if self._trouble else ""
            raise UnavailableError(f"Consul named no passing instance of {self._service} within {wait_s:g} s{why}")
        return self._addresses

    def subscribe(self, on_change: OnChange) -> Callable[[], None]:
        """Call `on_change` from the watching thread with every new list."""
        with self._lock:
            self._subscribers.append(on_change)

        def unsubscribe() -> None:
            with self._lock:
                if on_change in self._subscribers:
                    self._subscribers.remove(on_change)

        return unsubscribe

    def close(self) -> None:
        """Stop after the query that is in flight; its thread holds nothing up."""
        self._closed.set()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                name = f"consul-{self._service}"
                self._thread = threading.Thread(target=self._follow, name=name, daemon=True)
                self._thread.start()

    def _follow(self) -> None:
        import consul

        client, index, last = consul.Consul(**self._connect), None, 0
        # A redirect would carry the token to whoever it names.
        client.http.session.max_redirects = 0
        while not self._closed.is_set():
            asked_s, before = time.monotonic(), index
            try:
                answer, nodes = client.health.service(self._service, index=index, **self._query)
                # An index that goes back, after a Consul restart, must not be waited on.
                last, index = int(answer), (answer if int(answer) >= last else None)
                self._trouble = ""
                self._publish(tuple(sorted({_address(node) for node in nodes})))
                # Whoever answers in the middle may not hold queries: nothing new is no reason to ask again at once.
                if index is not None and index == before and time.monotonic() - asked_s < self._retry_s:
                    self._closed.wait(self._retry_s)
            except Exception as error:  # whatever a proxy answers must not end the watch
                if repr(error) != self._trouble:
                    logger.warning("consul query failed", extra={"service": self._service, "error": repr(error)})
                self._trouble = repr(error)
                index = None
                self._closed.wait(self._retry_s * random.uniform(0.5, 1.5))  # noqa: S311 - spreads clients

    def _publish(self, addresses: tuple[str, ...]) -> None:
        if not addresses or addresses == self._addresses or self._closed.is_set():
            return
        self._addresses = addresses
        self._found.set()
        with self._lock:
            subscribers = list(self._subscribers)
        for on_change in subscribers:
            try:
                on_change(addresses)
            except Exception:
                logger.exception("new addresses refused", extra={"service": self._service, "addresses": addresses})


def _address(node: dict[str, Any]) -> str:
    host = node["Service"]["Address"] or node["Node"]["Address"]
    return f"[{host}]:{node['Service']['Port']}" if ":" in host else f"{host}:{node['Service']['Port']}"


def discovery_for(where: str | Sequence[str] | Discovery, *, first_answer_s: float = FIRST_ANSWER_S) -> Discovery:
    """Return a Discovery for addresses or "consul://SERVICE", or the one that was given.

    Errors: ClientSetupError.
    """
    if isinstance(where, str) and where.startswith(_CONSUL):
        return _consul_discovery(where, first_answer_s)
    return StaticDiscovery(where) if isinstance(where, (str, Sequence)) else where


def _consul_discovery(url: str, first_answer_s: float) -> ConsulDiscovery:
    parts = urlsplit(url)
    query = parse_qs(parts.query, keep_blank_values=True)
    tags = query.pop("tag", [])
    fits = _SERVICE.fullmatch(parts.netloc) and parts.path in ("", "/") and not query and not parts.fragment
    if not fits or len(tags) > 1 or "" in tags:
        raise ClientSetupError(
            f"{url!r} names no service: write consul://SERVICE or consul://SERVICE?tag=TAG; where Consul is stands in "
            "CONSUL_HTTP_ADDR"
        )
    return ConsulDiscovery(parts.netloc, tag=tags[0] if tags else None, first_answer_s=first_answer_s)
