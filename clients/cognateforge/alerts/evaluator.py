"""Looks at both services, once or again and again."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from cognateforge.alerts.conditions import Limits, conditions
from cognateforge.alerts.model import Alert
from cognateforge.alerts.observe import Observer, agent_source, cognate_source

if TYPE_CHECKING:
    from cognateforge.client import AsyncAgentClient, AsyncCognateClient


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is wrong now. unknown: services that could not be asked, so that nothing about their jobs is known."""

    alerts: tuple[Alert, ...]
    unknown: frozenset[str]


class Evaluator:
    """Keeps between looks what was read, so that an event is read once, and since when something is wrong."""

    def __init__(
        self,
        cognate: AsyncCognateClient | None = None,
        agent: AsyncAgentClient | None = None,
        *,
        limits: Limits | None = None,
    ) -> None:
        sources = [cognate_source(cognate)] if cognate is not None else []
        sources += [agent_source(agent)] if agent is not None else []
        self._observers = [Observer(source) for source in sources]
        self._limits = limits or Limits()
        self._since: dict[str, datetime] = {}

    async def look(self, *, failed_since: datetime | None = None) -> Look:
        """Ask both services at the same time.

        failed_since: the last look of an evaluator before this one, so that no failure in between is missed.
        Errors: ForbiddenError, when the caller may not read; ClientSetupError. A service that does not answer is an
        alert and no error.
        """
        seen = await asyncio.gather(*(observer.look() for observer in self._observers))
        found = [alert for one in seen for alert in conditions(one, self._limits, failed_since=failed_since)]
        unique = {alert.key: alert for alert in found}
        self._since = {key: min(self._since.get(key, alert.since), alert.since) for key, alert in unique.items()}
        return Look(
            alerts=tuple(dataclasses.replace(alert, since=self._since[key]) for key, alert in unique.items()),
            unknown=frozenset(one.service for one in seen if one.trouble),
        )


async def evaluate(
    cognate: AsyncCognateClient | None = None,
    agent: AsyncAgentClient | None = None,
    *,
    limits: Limits | None = None,
) -> list[Alert]:
    """Return what is wrong now, by one look. Who looks again and again keeps an `Evaluator`, which reads less."""
    return list((await Evaluator(cognate, agent, limits=limits).look()).alerts)
