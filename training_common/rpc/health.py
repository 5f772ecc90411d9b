"""Health that reports what the service can do: it follows the store, the scheduler and the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog
from grpc_health.v1 import health, health_pb2

from training_common.jobs.scheduler import Scheduler
from training_common.rpc.audit import AuditLog
from training_common.store.database import Database

log = structlog.get_logger(__name__)

# A store that does not answer in this time cannot serve calls whose deadlines are of the same size.
_PING_TIMEOUT_S = 5.0
_INTERVAL_S = 1.0
# Two rounds that both wait for a slow store. Who has not checked for longer does not know.
_STALE_AFTER_S = 2 * (_PING_TIMEOUT_S + _INTERVAL_S)


class HealthMonitor:
    """Keeps the standard health service true.

    Every service needs the store. Training services also need an engine that can start workers: their last launch must
    not have failed. The empty name stands for all of them.
    """

    def __init__(
        self, database: Database, scheduler: Scheduler, *, training: Sequence[str], other: Sequence[str]
    ) -> None:
        self.servicer = health.aio.HealthServicer()
        self._database = database
        self._scheduler = scheduler
        self._training = training
        self._other = other
        self._given_up = False
        self._draining = False
        self._ready = self._serving = False
        self._checked = 0.0
        self._audit: AuditLog | None = None

    @property
    def serving(self) -> bool:
        """Whether the last check found everything well, and was lately. May be read from any thread."""
        return self._serving and not self._stale

    @property
    def ready(self) -> bool:
        """Whether calls can be served, though workers may not start. May be read from any thread."""
        return self._ready and not self._stale

    @property
    def alive(self) -> bool:
        """Whether this process goes on by itself. A store that is away is no reason to start it anew."""
        return self._draining or not self._given_up

    @property
    def _stale(self) -> bool:
        return time.monotonic() - self._checked >= _STALE_AFTER_S

    @property
    def word(self) -> str:
        """The service's own word, as its health service answers for the empty name. May be read from any thread."""
        return "SERVING" if self.serving else "NOT_SERVING"

    def watch_audit(self, audit: AuditLog) -> None:
        """Report NOT_SERVING while the audit log cannot be written."""
        self._audit = audit

    async def run(self) -> None:
        """Check and report, until cancelled."""
        while True:
            await self.check()
            await asyncio.sleep(_INTERVAL_S)

    async def check(self) -> None:
        """Look once and set every service's status."""
        audited = self._audit is None or self._audit.check()
        answers = audited and not self._given_up and await self._store_answers()
        store = answers and not self._given_up  # a drain may have begun while the store was asked
        training = store and not self._scheduler.last_launch_failed
        for service in self._training:
            await self._set(service, training)
        for service in self._other:
            await self._set(service, store)
        await self._set("", store and training)
        self._ready, self._serving, self._checked = store, store and training, time.monotonic()

    async def give_up(self) -> None:
        """Report NOT_SERVING from now on: a part of this process has ended that only a restart brings back."""
        self._given_up = True
        await self.check()

    async def drain(self) -> None:
        """Tell clients to go elsewhere, for good."""
        self._given_up = self._draining = True
        self._ready = self._serving = False
        await self.servicer.enter_graceful_shutdown()

    async def _store_answers(self) -> bool:
        try:
            async with asyncio.timeout(_PING_TIMEOUT_S):
                await self._database.check()
        except Exception as error:
            log.warning("store does not answer", error=type(error).__name__)
            return False
        return True

    async def _set(self, service: str, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self.servicer.set(service, status.SERVING if serving else status.NOT_SERVING)
