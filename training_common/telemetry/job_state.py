"""What the store says of jobs at this moment: how many there are, what they wait for, how training goes.

Every query reads rows that an index leads to, and a bounded number of them: a scrape must not become a load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import sqlalchemy as sa

from training_common.jobs.states import FINAL, HELD, JobState
from training_common.jobs.store import JobStore
from training_common.jobs.waits import Bounds, Standing, WaitReason, paused_for, waits
from training_common.store import tables as t
from training_common.store.database import now_us
from training_common.telemetry.readings import Reading

OPEN = tuple(state for state in JobState if state not in FINAL)
# What keeps them is looked up for so many waiting jobs, the first of the queue. Those behind wait for a slot at least.
_ASKED = 200
# Progress events that are read of a job the first time: the newest value of a metric that only validations tell is
# usually among them.
_EVENTS = 50
# Metrics of a job that have series, and how long their names may be: what a progress event may hold by the contract.
# Code that an operator has installed trains, too, and what it reports must not become the monitoring system's load.
_MOST_METRICS, _NAME_CHARS = 64, 64
# Names beyond them that are remembered, to be counted once each.
_MOST_LEFT_OUT = 1000


@dataclass
class _Training:
    """The newest values of a job that runs."""

    sequence: int = 0
    time_us: int = 0
    values: dict[str, float] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    def take(self, name: str, value: object) -> None:
        """Keep what can be a series: the first names, while there is room. What is no number was not measured."""
        number = _finite(value)
        if number is None:
            return
        if name in self.values or (
            len(self.values) < _MOST_METRICS and len(name) <= _NAME_CHARS and _is_encodable(name)
        ):
            self.values[name] = number
        elif len(self.left_out) < _MOST_LEFT_OUT:
            self.left_out.add(name[: 2 * _NAME_CHARS])


def _finite(value: object) -> float | None:
    """Return a number as a gauge has it; None for a histogram, which is a row of shares, and what is not finite."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def _is_encodable(name: str) -> bool:
    """Whether a page of UTF-8 can hold a name: half of a character would keep the whole page from being sent."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class JobReadings:
    """Reads the state of jobs. training_jobs: how many of the newest running ones have series of their own."""

    def __init__(
        self, store: JobStore, standing: Callable[[], Standing], *, bounds: Bounds | None, training_jobs: int
    ) -> None:
        self._store = store
        self._standing = standing
        self._bounds = bounds
        self._training_jobs = training_jobs
        self._seen: dict[int, _Training] = {}

    def read(self, connection: sa.Connection) -> Iterator[Reading]:
        """Yield what there is to tell."""
        counts = self._store.counts(connection, OPEN)
        for state in OPEN:
            yield Reading("forge_jobs", counts.get(state, 0), (state.value,))
        held = t.jobs.c.state.in_([state.value for state in HELD])
        unobserved = sa.select(sa.func.count()).select_from(t.jobs).where(held, t.jobs.c.observed.is_(False))
        yield Reading("forge_jobs_unobserved", connection.execute(unobserved).scalar_one())
        first = sa.select(sa.func.min(t.jobs.c.create_us)).filter_by(state=JobState.QUEUED.value, attempt=0)
        oldest = connection.execute(first).scalar()
        yield Reading("forge_queue_oldest_seconds", 0.0 if oldest is None else max(0, now_us() - oldest) / 1e6)
        yield from self._waiting(connection)
        if self._training_jobs:
            yield from self._training(connection)

    def _waiting(self, connection: sa.Connection) -> Iterator[Reading]:
        found = dict.fromkeys(WaitReason, 0)
        for reason, count in paused_for(connection).items():
            found[reason] += count
        due = self._store.first_in_queue(connection, _ASKED)
        asked = waits(connection, due, self._standing(), self._bounds)
        for wait in asked.values():
            found[wait.reason] += 1
        found[WaitReason.SLOT] += max(0, self._store.due(connection) - len(due))
        for reason, count in found.items():
            yield Reading("forge_jobs_waiting", count, (reason.value,))

    def _training(self, connection: sa.Connection) -> Iterator[Reading]:
        j, a = t.jobs.c, t.attempts.c
        query = (
            sa.select(j.id, j.name, j.step, j.total_steps, a.start_us)
            .join(t.attempts, (a.job_id == j.id) & (a.number == j.attempt))
            .where(j.state.in_([state.value for state in HELD]))
            .order_by(j.id.desc())
            .limit(self._training_jobs)
        )
        rows = connection.execute(query).all()
        self._seen = {row.id: self._seen.get(row.id, _Training()) for row in rows}
        for row in rows:
            seen = self._seen[row.id]
            self._look(connection, row.id, seen)
            labels = (row.name,)
            yield Reading("forge_training_step", row.step, labels)
            yield Reading("forge_training_total_steps", row.total_steps, labels)
            since = max(seen.time_us, row.start_us)
            yield Reading("forge_training_progress_age_seconds", max(0, now_us() - since) / 1e6, labels)
            for name, value in seen.values.items():
                yield Reading("forge_training_metric", value, (row.name, name))
            yield Reading("forge_training_metrics_left_out", len(seen.left_out), labels)

    @staticmethod
    def _look(connection: sa.Connection, job_id: int, seen: _Training) -> None:
        """Take in what a job has told since the last look."""
        e = t.events.c
        query = (
            sa.select(e.sequence, e.time_us, e.payload)
            .where(e.job_id == job_id, e.kind == "progress", e.sequence > seen.sequence)
            .order_by(e.sequence.desc())
            .limit(_EVENTS)
        )
        for event in reversed(connection.execute(query).all()):
            seen.sequence, seen.time_us = event.sequence, event.time_us
            for name, value in event.payload["metrics"].items():
                seen.take(name, value)
