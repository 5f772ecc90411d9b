"""A server's entry in Consul: there while it serves, critical while it is ill, gone when it drains.

py-consul is synchronous, so a thread of its own does the work. Consul is never needed for serving: while it is away,
the thread warns and tries again, and neither the server nor its health takes notice.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

from training_common.settings import ConsulSettings

log = structlog.get_logger(__name__)

# A third of the TTL: two beats may be lost before Consul calls the server critical.
_BEATS_PER_TTL = 3
# Health is looked at this often, so that a change reaches Consul before the next beat. It is one read of a variable.
_LOOK_S = 0.2
# Consul's agent is on this machine: what it does not answer in this time it will not answer.
_TIMEOUT_S = 2.0
# Tries again while Consul is away: 0.5, 1, 2 s and so on, each longer by up to half. Many servers may lose one Consul.
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.5, 15.0


def advertised(settings: ConsulSettings, address: str) -> tuple[str, int]:
    """Return host and port to register, for a server that listens on `address`."""
    bound_host, _, bound_port = address.rpartition(":")
    host, port = settings.advertise or bound_host, ""
    if settings.advertise and not settings.advertise.endswith("]") and settings.advertise.count(":") == 1:
        host, _, port = settings.advertise.partition(":")
    elif "]:" in settings.advertise:
        host, _, port = settings.advertise.rpartition(":")
    return host.strip("[]"), int(port or bound_port)


class Registration:
    """One instance of a service in Consul, with a TTL check that follows `serving`.

    The id is made of name, host and port: a server that starts again on its address takes its old entry's place.
    """

    def __init__(
        self, settings: ConsulSettings, *, host: str, port: int, serving: Callable[[], bool], look_s: float = _LOOK_S
    ) -> None:
        self._settings = settings
        self._host, self._port = host, port
        self._serving = serving
        self._look_s = look_s
        self.id = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{settings.service}-{host}-{port}").strip("-")
        self._check_id = f"service:{self.id}"
        self._registered = False
        self._failures = 0
        self._closed = threading.Event()
        self._agent = _agent(settings)
        # Given with every call: py-consul prefers CONSUL_HTTP_TOKEN to a client's own token.
        self._token = settings.token or None
        self._thread = threading.Thread(target=self._follow, name=f"consul-{self.id}", daemon=True)

    def start(self) -> None:
        """Register and keep the check true, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Take the entry out of Consul. Blocks for a few seconds at most; Consul drops what it was not told of."""
        self._closed.set()
        self._thread.join(2 * _TIMEOUT_S)
        try:
            known = self._agent.service.deregister(self.id, token=self._token)
            log.info("deregistered from consul", id=self.id, known=known)
        except Exception as error:
            log.warning("consul was not told of the drain", id=self.id, error=_said(error))

    def _follow(self) -> None:
        told: bool | None = None
        beat_at = 0.0
        while not self._closed.is_set():
            now, serving = time.monotonic(), self._serving()
            if serving is told and now < beat_at:
                self._closed.wait(self._look_s)
                continue
            if self._tell(serving):
                told, beat_at = serving, now + self._settings.ttl_s / _BEATS_PER_TTL
            else:
                told = None
                self._closed.wait(self._retry_s())

    def _tell(self, serving: bool) -> bool:
        """Bring one state to Consul, and return whether it is there. What Consul has lost is registered anew."""
        try:
            if not self._registered:
                self._register()
            if not self._beat(serving):
                log.warning("consul has lost this instance", id=self.id)
                self._register()
                if not self._beat(serving):
                    raise RuntimeError("the check is unknown right after it was registered")
        except Exception as error:  # whatever a proxy in between answers must not end the beats
            # What became of the entry is not known: the next try registers it, which changes nothing if it is there.
            self._registered = False
            self._failures += 1
            log.warning("consul was not told", id=self.id, serving=serving, tries=self._failures, error=_said(error))
            return False
        self._failures = 0
        return True

    def _register(self) -> None:
        if self._closed.is_set():
            raise RuntimeError("the server drains")
        settings = self._settings
        check = {
            "CheckID": self._check_id,
            "Name": "health of the server, told by itself",
            "TTL": f"{settings.ttl_s:g}s",
            "DeregisterCriticalServiceAfter": f"{settings.deregister_critical_after_s:g}s",
        }
        done = self._agent.service.register(
            settings.service,
            service_id=self.id,
            address=self._host,
            port=self._port,
            tags=list(settings.tags),
            check=check,
            token=self._token,
            replace_existing_checks=True,
        )
        if not done:
            raise RuntimeError("the registration was refused")
        self._registered = True
        log.info("registered with consul", id=self.id, address=f"{self._host}:{self._port}", tags=settings.tags)

    def _beat(self, serving: bool) -> bool:
        tell = self._agent.check.ttl_pass if serving else self._agent.check.ttl_fail
        notes = "SERVING" if serving else "NOT_SERVING"
        return bool(tell(self._check_id, notes=notes, token=self._token))

    def _retry_s(self) -> float:
        pause_s: float = min(_LONGEST_RETRY_S, self._settings.ttl_s, _FIRST_RETRY_S * 2 ** min(self._failures - 1, 10))
        return pause_s * random.uniform(1.0, 1.5)  # noqa: S311 - spreads servers, guards nothing


def register(settings: ConsulSettings, address: str, serving: Callable[[], bool]) -> Registration | None:
    """Start the registration of a server that listens on `address`, where a service name is set."""
    if not settings.service:
        return None
    host, port = advertised(settings, address)
    registration = Registration(settings, host=host, port=port, serving=serving)
    registration.start()
    return registration


def _agent(settings: ConsulSettings) -> Any:
    import consul  # takes a tenth of a second, and most servers have no Consul

    # What is left out py-consul takes from CONSUL_HTTP_ADDR, or from Consul's defaults.
    where = {"host": settings.host or None, "port": settings.port or None, "scheme": settings.scheme or None}
    client = consul.Consul(**where, connections_timeout=_TIMEOUT_S)
    # A redirect would carry the token to whoever it names.
    client.http.session.max_redirects = 0
    return client.agent


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
