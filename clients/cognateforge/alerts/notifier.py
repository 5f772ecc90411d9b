"""Tells receivers what is wrong, and that it is over: each at least once, and not again before it is time.

What was told is written down after a receiver has taken it. So a process that is killed in between tells it once more,
and a receiver that is away is told later, also of what is over by then.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from cognateforge.alerts.evaluator import Look
from cognateforge.alerts.message import Message
from cognateforge.alerts.model import KINDS, Severity
from cognateforge.alerts.receivers import Receiver, SendError
from cognateforge.alerts.settings import NotifySettings
from cognateforge.alerts.state import Record, State, StateFile, Told

# One look may fall between two states, for instance while a circuit probes: what is missed once is not over yet.
MISSED_LOOKS = 2
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0


class Looks(Protocol):
    """What finds out: an `Evaluator`."""

    async def look(self, *, failed_since: datetime | None = None) -> Look:
        """Return what is wrong now, jobs that have failed since then among it."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What came of a message. error: empty where the receiver took it."""

    receiver: str
    alertname: str
    service: str
    status: str
    alerts: int
    error: str = ""


@dataclass
class _Pause:
    """How long a receiver that failed is left alone."""

    until: datetime
    next_s: float


class Notifier:
    """Looks, decides, tells, and remembers."""

    def __init__(
        self,
        looks: Looks,
        receivers: Sequence[Receiver],
        settings: NotifySettings,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._looks = looks
        self._receivers = receivers
        self._settings = settings
        self._now = now
        self._file = StateFile(settings.state_file)
        self._state = State()
        self._pauses: dict[str, _Pause] = {}

    async def run(self, stop: asyncio.Event, tell: Callable[[Sent], None]) -> None:
        """Look again and again until `stop` is set. Errors: those of `turn`."""
        with self._file.held():
            self._state = self._file.load()
            while not stop.is_set():
                for sent in await self.turn():
                    tell(sent)
                try:
                    await asyncio.wait_for(stop.wait(), self._settings.interval_s)
                except TimeoutError:
                    continue

    async def once(self) -> list[Sent]:
        """Look once, for those whose scheduler calls this command. Errors: those of `turn`."""
        with self._file.held():
            self._state = self._file.load()
            return await self.turn()

    async def turn(self) -> list[Sent]:
        """Look, and tell who is to be told.

        Errors: ForbiddenError and ClientSetupError, when the services must not or cannot be asked by this caller;
        LocalStorageError, when the state cannot be written, because then nothing could be told only once.
        """
        now = self._now()
        self._set_back(now)
        look = await self._looks.look(failed_since=self._state.looked)
        self._take(look, now)
        if not look.unknown:
            self._state.looked = now
        self._file.save(self._state)
        return [sent for some in await asyncio.gather(*map(self._tell, self._receivers)) for sent in some]

    def _set_back(self, now: datetime) -> None:
        """Hold nothing for later than now: where a clock that ran ahead was set, it would wait for long."""
        state = self._state
        if state.looked is not None:
            state.looked = min(state.looked, now)
        for record in state.records.values():
            record.seen = min(record.seen, now)
            for told in record.told.values():
                told.time = min(told.time, now)
        for pause in self._pauses.values():
            pause.until = min(pause.until, now + timedelta(seconds=LONGEST_PAUSE_S))

    def _take(self, look: Look, now: datetime) -> None:
        found = {alert.key: alert for alert in look.alerts}
        for key, alert in found.items():
            record = self._state.records.get(key)
            if record is None or record.ended:
                told = record.told if record else {}
                record = self._state.records[key] = Record(alert=alert, seen=now, told=told)
            # The start stays, what is said of it may change: how many, how long.
            record.alert = dataclasses.replace(alert, since=min(record.alert.since, alert.since))
            record.missed = 0
            record.firing |= (now - record.seen).total_seconds() >= KINDS[alert.name].hold_s
        for key, record in list(self._state.records.items()):
            if key in found or record.ended or record.alert.service in look.unknown:
                continue
            record.missed += 1
            if not record.firing and not record.told:
                del self._state.records[key]
            elif record.missed >= MISSED_LOOKS:
                record.ended = now
        self._forget()

    def _forget(self) -> None:
        """Drop what is over and known to all who were to know."""
        for key, record in list(self._state.records.items()):
            owed = [one for one in self._receivers if _wants(one, record) and self._due(one, record)]
            if record.ended and not owed:
                del self._state.records[key]

    def _due(self, receiver: Receiver, record: Record) -> bool:
        told = record.told.get(receiver.name)
        if record.ended:
            return told is None or told.status == "firing"
        if not record.firing:
            return False
        if told is None or told.status == "resolved":
            return True
        return self._now() - told.time >= timedelta(seconds=self._settings.repeat_interval_s)

    async def _tell(self, receiver: Receiver) -> list[Sent]:
        pause = self._pauses.get(receiver.name)
        if pause is not None and self._now() < pause.until:
            return []
        groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for record in self._state.records.values():
            told = record.told.get(receiver.name)
            over = record.ended and told is not None and told.status == "resolved"
            if _wants(receiver, record) and (record.firing or record.ended) and not over:
                groups[record.alert.name, record.alert.service].append(record)
        sent: list[Sent] = []
        for records in groups.values():
            if any(self._due(receiver, record) for record in records):
                sent.append(await self._send(receiver, records))
                if sent[-1].error:
                    break  # the others would fare alike, each for the whole of its timeout
        return sent

    async def _send(self, receiver: Receiver, records: Sequence[Record]) -> Sent:
        settings = self._settings
        message = Message(
            receiver=receiver.name,
            records=records,
            link=settings.link,
            runbook_base_url=settings.runbook_base_url,
        )
        error = ""
        try:
            await asyncio.to_thread(receiver.send, message)
        except SendError as failure:
            error = str(failure)
            self._pause(receiver)
        else:
            self._pauses.pop(receiver.name, None)
            for record in records:
                record.told[receiver.name] = Told(status=record.status, time=self._now())
            self._forget()
            self._file.save(self._state)
        return Sent(
            receiver=receiver.name,
            alertname=message.name,
            service=message.service,
            status=message.status,
            alerts=len(records),
            error=error,
        )

    def _pause(self, receiver: Receiver) -> None:
        pause = self._pauses.get(receiver.name)
        pause_s = pause.next_s if pause else FIRST_PAUSE_S
        jittered = pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads calls, guards nothing
        until = self._now() + timedelta(seconds=jittered)
        self._pauses[receiver.name] = _Pause(until=until, next_s=min(2 * pause_s, LONGEST_PAUSE_S))


def _wants(receiver: Receiver, record: Record) -> bool:
    return receiver.min_severity == Severity.WARNING or record.alert.severity is Severity.CRITICAL
