"""Running jobs that make room for waiting ones of a clearly higher priority.

ADR 0025. The running job with the lowest priority is asked to save a checkpoint and let go, and goes back to its place
in the queue. What it makes room for is marked and goes first until it has a worker: otherwise the stopped job, which
may be the older one, would take its slot again. One waiting job stops one running job, once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

import sqlalchemy as sa
import structlog

from agent_server.resources import AgentResourceManager, Amounts
from agent_server.settings import PreemptionSettings
from training_common.jobs import yielding
from training_common.jobs.queue import CLAIM_US, HOLD_US, is_due
from training_common.jobs.store import AttemptRow, JobRow, JobStore
from training_common.store import tables as t

log = structlog.get_logger(__name__)

# Waiting jobs that are looked at: behind them none has a better claim.
_FIRST = 32


class _GoneError(Exception):
    """The job that room is made for waits no more: nothing is to be written."""


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
        self._least = settings.least_difference
        self._patience = yielding.Patience(settings.grace_s, clock)

    def look(self, held: Sequence[tuple[JobRow, AttemptRow]], *, free: int) -> Sequence[tuple[JobRow, AttemptRow, str]]:
        """Ask one worker to let go where that makes room for a job that matters more; return those that would not.

        free: slots of this server that nobody takes, too few for the job.
        """
        candidates = yielding.candidates(held)
        if candidates:
            self._ask_one(candidates, free)
        return self._patience.spent(held)

    def _ask_one(self, running: Sequence[JobRow], free: int) -> None:
        with self._store.database.read() as connection:
            if self._pair(connection, running, free) is None:
                return
        with contextlib.suppress(_GoneError), self._store.database.write() as connection:
            self._resources.in_turn(connection)
            pair = self._pair(connection, running, free)
            if pair is not None:
                self._ask(connection, *pair)

    def _pair(self, connection: sa.Connection, running: Sequence[JobRow], free: int) -> tuple[JobRow, JobRow] | None:
        """Return a waiting job and the running one that it stops, or None."""
        waiting = self._waiting(connection, running[0].priority + self._least)
        held: Mapping[str, Amounts] = self._resources.held(connection) if waiting else {}
        for job in waiting:
            for other in running:
                if job.priority - other.priority < self._least:
                    break
                fits = free < job.slots <= free + other.slots
                if fits and self._resources.may_replace(job, other, held):
                    return job, other
        return None

    def _waiting(self, connection: sa.Connection, least: int) -> list[JobRow]:
        query = (
            sa.select(t.jobs.c.name)
            .where(is_due(), t.jobs.c.priority >= least, t.jobs.c.queue_us >= -HOLD_US)
            .order_by(t.jobs.c.priority.desc(), t.jobs.c.queue_us, t.jobs.c.id)
            .limit(_FIRST)
        )
        return [self._store.get(name, connection) for name in connection.execute(query).scalars()]

    def _ask(self, connection: sa.Connection, waiting: JobRow, running: JobRow) -> None:
        # In the order in which a worker that goes on locks them: its own job, then those that wait.
        message = f"makes room for {waiting.name} of priority {waiting.priority}, its own being {running.priority}"
        if not yielding.ask(
            self._store, connection, running, kind="preempted", message=message, facts={"by": waiting.name}
        ):
            return
        marked = connection.execute(
            sa.update(t.jobs)
            .where(t.jobs.c.id == waiting.id, t.jobs.c.queue_us >= -HOLD_US)
            .values(queue_us=t.jobs.c.queue_us - CLAIM_US)
        ).rowcount
        if not marked:  # cancelled or taken at this moment
            raise _GoneError()
        message = f"{running.name} of priority {running.priority} was asked to make room"
        self._store.note(connection, waiting.id, "preempts", message, {"job": running.name})
        log.info("job asked to make room", job=running.name, waiting=waiting.name)
