"""What the overview shows: both services at one moment, and since when one of them is away."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from cognateforge.alerts import Alert, Evaluator
from cognateforge.cli.plain import enum_word, to_plain
from cognateforge.dashboard.plain import error_json, row_json
from cognateforge.dashboard.upstream import ENDED, OPEN, PAGE, Upstream, Upstreams
from cognateforge.exceptions import ForgeError
from cognateforge.exchange.v1 import resource_pb2
from cognateforge.job.v1 import job_pb2

# Services are asked this often, and only while somebody looks.
LOOK_EVERY_S = 2.0
# What ends is counted less often: it needs every job's row.
_COUNT_EVERY_S = 15.0
_COUNTED_PAGES = 4
# An alert's conditions read the running jobs' events.
_ALERTS_EVERY_S = 10.0
# As many jobs as an overview has room for.
_SHOWN = 8


def alert_json(alert: Alert) -> dict[str, Any]:
    """Return an alert for the pages."""
    return {
        "key": alert.key,
        "name": alert.name,
        "severity": str(alert.severity),
        "service": alert.service,
        "labels": dict(alert.labels),
        "summary": alert.summary,
        "runbook": alert.runbook,
        "since": alert.since.timestamp(),
    }


@dataclass
class ServiceBoard:
    """One service. away_since: when it first did not answer, None while it does."""

    upstream: Upstream
    away_since: float | None = None
    _ended: Counter[str] = field(default_factory=Counter)
    _more: bool = False
    _counted_at: float = float("-inf")

    async def look(self) -> dict[str, Any]:
        """Return what the service tells now, or since when it is away."""
        plain: dict[str, Any] = {
            "service": self.upstream.name,
            "addresses": list(self.upstream.client.addresses),
        }
        try:
            plain |= await self._told()
        except ForgeError as error:
            self.away_since = self.away_since or time.time()
            self._counted_at = float("-inf")
            return {**plain, "health": "AWAY", "away_since": self.away_since, "error": error_json(error)}
        self.away_since = None
        return plain

    async def _told(self) -> dict[str, Any]:
        upstream = self.upstream
        health, info, (open_jobs, token), (newest, _) = await asyncio.gather(
            upstream.client.health(), upstream.info(), upstream.page(OPEN, PAGE), upstream.page((), _SHOWN)
        )
        if time.monotonic() - self._counted_at >= _COUNT_EVERY_S:
            await self._count()
        states = Counter(_word(item.job.state) for item in open_jobs) + self._ended
        rows = [row_json(upstream.name, item) for item in open_jobs if item.job.state != job_pb2.JOB_STATE_QUEUED]
        return {
            "health": health,
            "info": to_plain(info),
            "states": dict(states),
            "more_jobs": bool(token) or self._more,
            "open": rows[:_SHOWN],
            "newest": [row_json(upstream.name, item) for item in newest],
        }

    async def _count(self) -> None:
        counts: Counter[str] = Counter()
        token = ""
        for _ in range(_COUNTED_PAGES):
            jobs, token = await self.upstream.page(ENDED, PAGE, token)
            counts.update(_word(item.job.state) for item in jobs)
            if not token:
                break
        self._ended, self._more, self._counted_at = counts, bool(token), time.monotonic()


def _word(state: int) -> str:
    return enum_word(job_pb2.JobState.DESCRIPTOR, state)


class Board:
    """Both services and what is wrong with them; looked at once, however many pages are open."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams
        self._services = [ServiceBoard(one) for one in upstreams]
        self._evaluator = Evaluator(upstreams.cognate_client, upstreams.agent_client)
        # Absent before the first look: nothing is known then.
        self._alerts: dict[str, Any] = {}
        self._alerts_at = float("-inf")
        self._task: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()
        self._seen: dict[str, Any] = {}
        self._seen_at = float("-inf")

    async def look(self) -> dict[str, Any]:
        """Return what was seen a moment ago, or look anew."""
        async with self._looking:
            if time.monotonic() - self._seen_at >= LOOK_EVERY_S / 2:
                if time.monotonic() - self._alerts_at >= _ALERTS_EVERY_S and (self._task is None or self._task.done()):
                    # Not waited for: conditions read events, and that a service is away shows in the meantime.
                    self._task = asyncio.create_task(self._evaluate())
                *services, capacities = await asyncio.gather(
                    *(one.look() for one in self._services), self._capacities()
                )
                self._seen = {"services": services, "capacities": capacities}
                self._seen_at = time.monotonic()
            return {**self._seen, **self._alerts}

    async def _evaluate(self) -> None:
        try:
            look = await self._evaluator.look()
        except ForgeError as error:
            unknown = [one.name for one in self._upstreams]
            self._alerts = {"alerts": [], "unknown": unknown, "alerts_error": error_json(error)}
        else:
            found = sorted(look.alerts, key=lambda one: (one.severity != "critical", one.since))
            self._alerts = {"alerts": [alert_json(one) for one in found], "unknown": sorted(look.unknown)}
        self._alerts_at = time.monotonic()

    async def close(self) -> None:
        """End what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _capacities(self) -> list[dict[str, Any]]:
        try:
            answer = await self._upstreams.cognate_client.resources.GetAvailability(
                resource_pb2.GetAvailabilityRequest()
            )
        except ForgeError:
            return []  # that Cognate is away is told by its own part
        return [to_plain(one) for one in answer.capacities]

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the board, and again whenever something of it has changed."""
        last: dict[str, Any] | None = None
        while True:
            seen = await self.look()
            if seen != last:
                last = seen
                yield seen
            await asyncio.sleep(LOOK_EVERY_S)
