"""Running jobs that make room for waiting ones of a clearly higher priority.

ADR 0025. The running job with the lowest priority is asked to save a checkpoint and let go, and goes back to its place
in the queue. What it makes room for is marked and goes first until it has a worker: otherwise the stopped job, which
may be the older one, would take its slot again. One waiting job stops one running job, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import sqlalchemy as sa
import structlog

from agent_server.resources import AgentResourceManager, Amounts
from agent_server.settings import PreemptionSettings
from training_common.attempt import StopKind
from training_common.jobs.queue import is_due
from training_common.jobs.states import WAITING, JobState
from training_common.jobs.store import AttemptRow, JobRow, JobStore
from training_common.store import tables as t

log = structlog.get_logger(__name__)

# One that validates is about to end, and others are on their way out already.
_CAN_LET_GO = frozenset({JobState.PREPARING, JobState.RUNNING})
# Waiting jobs that are looked at: behind them none has a better claim.
_FIRST = 32


class Preemption:
    """Looks after the workers of one server."""

    def __init__(
        self,
        store: JobStore,
        resources: AgentResourceManager,
        settings: PreemptionSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._resources = resources
        self._settings = settings
        self._clock = clock
        # Since when workers are known to have been asked, by attempt id. After a restart they get the time anew.
        self._asked_s: dict[int, float] = {}

    def look(
        self, held: Sequence[tuple[JobRow, AttemptRow]], *, full: bool
    ) -> Sequence[tuple[JobRow, AttemptRow, str]]:
        """Ask one worker to let go where that makes room for a job that matters more; return those that would not."""
        candidates = [job for job, _ in held if not job.lease and not job.wish and job.state in _CAN_LET_GO]
        if full and candidates:
            self._ask_one(candidates)
        return self._that_would_not(held)

    def _ask_one(self, running: Sequence[JobRow]) -> None:
        with self._store.database.read() as connection:
            if self._pair(connection, running) is None:
                return
        with self._store.database.write() as connection:
            self._resources.in_turn(connection)
            pair = self._pair(connection, running)
            if pair is not None:
                self._ask(connection, *pair)

    def _pair(self, connection: sa.Connection, running: Sequence[JobRow]) -> tuple[JobRow, JobRow] | None:
        """Return a waiting job and the running one that it stops, or None."""
        # Of those alike the one that was started last: it has least to lose.
        lowest_first = sorted(running, key=lambda job: (job.priority, -(job.start_us or 0), -job.id))
        least = lowest_first[0].priority + self._settings.least_difference
        waiting = self._waiting(connection, least)
        held: Mapping[str, Amounts] = self._resources.held(connection) if waiting else {}
        for job in waiting:
            for other in lowest_first:
                if job.priority - other.priority < self._settings.least_difference:
                    break
                if self._resources.may_replace(job, other, held):
                    return job, other
        return None

    def _waiting(self, connection: sa.Connection, least: int) -> list[JobRow]:
        query = (
            sa.select(t.jobs.c.name)
            .where(is_due(), t.jobs.c.priority >= least, t.jobs.c.claim.is_(False))
            .order_by(t.jobs.c.priority.desc(), t.jobs.c.queue_us, t.jobs.c.id)
            .limit(_FIRST)
        )
        return [self._store.get(name, connection) for name in connection.execute(query).scalars()]

    def _ask(self, connection: sa.Connection, waiting: JobRow, running: JobRow) -> None:
        # In the order in which a worker that goes on locks them: its own job, then those that wait.
        asked = connection.execute(
            sa.update(t.jobs)
            .where(t.jobs.c.id == running.id, t.jobs.c.attempt == running.attempt, t.jobs.c.wish == "")
            .where(t.jobs.c.state.in_([state.value for state in _CAN_LET_GO]))
            .values(wish=StopKind.YIELD.value)
        ).rowcount
        if not asked:
            return
        marked = connection.execute(
            sa.update(t.jobs)
            .where(t.jobs.c.id == waiting.id, t.jobs.c.claim.is_(False))
            .where(t.jobs.c.state.in_([state.value for state in WAITING]))
            .values(claim=True)
        ).rowcount
        if not marked:
            connection.rollback()
            return
        message = f"makes room for {waiting.name} of priority {waiting.priority}, its own being {running.priority}: a "
        message += "checkpoint, then the queue"
        self._store.note(connection, running.id, "preempted", message, {"by": waiting.name})
        message = f"{running.name} of priority {running.priority} was asked to make room"
        self._store.note(connection, waiting.id, "preempts", message, {"job": running.name})
        log.info("job asked to make room", job=running.name, waiting=waiting.name)

    def _that_would_not(self, held: Sequence[tuple[JobRow, AttemptRow]]) -> Sequence[tuple[JobRow, AttemptRow, str]]:
        now = self._clock()
        asked = [(job, attempt) for job, attempt in held if not job.lease and job.wish == StopKind.YIELD]
        self._asked_s = {attempt.id: self._asked_s.get(attempt.id, now) for _, attempt in asked}
        message = "attempt {}: had not made room {:g} s after it was asked to"
        return [
            (job, attempt, message.format(attempt.number, self._settings.grace_s))
            for job, attempt in asked
            if now - self._asked_s[attempt.id] > self._settings.grace_s
        ]
