"""Workers that are asked to save a checkpoint and let go, because another job needs their slot."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import sqlalchemy as sa

from training_common.attempt import StopKind
from training_common.jobs.states import JobState
from training_common.jobs.store import AttemptRow, JobRow, JobStore
from training_common.store import tables as t

# One that validates is about to end, and others are on their way out already.
_CAN_LET_GO = frozenset({JobState.PREPARING, JobState.RUNNING})


def candidates(held: Sequence[tuple[JobRow, AttemptRow]]) -> list[JobRow]:
    """Return the jobs in slots of a server that can be asked: the lowest priority first, and of equals the youngest.

    The one that was started last has least to lose.
    """
    jobs = [job for job, _ in held if not job.lease and can_let_go(job)]
    return sorted(jobs, key=lambda job: (job.priority, -(job.start_us or 0), -job.id))


def can_let_go(job: JobRow) -> bool:
    """Whether a held job's worker can be asked, and was not yet."""
    return not job.wish and job.state in _CAN_LET_GO


def ask(
    store: JobStore, connection: sa.Connection, job: JobRow, *, kind: str, message: str, facts: Mapping[str, str]
) -> bool:
    """Ask a job's worker to let go, once, and say so. Returns whether it was asked now."""
    asked = connection.execute(
        sa.update(t.jobs)
        .where(t.jobs.c.id == job.id, t.jobs.c.attempt == job.attempt, t.jobs.c.wish == "")
        .where(t.jobs.c.state.in_([state.value for state in _CAN_LET_GO]))
        .values(wish=StopKind.YIELD.value)
    ).rowcount
    if asked:
        store.note(connection, job.id, kind, f"{message}: a checkpoint, then the queue", facts)
    return bool(asked)


def being_asked(held: Sequence[tuple[JobRow, AttemptRow]]) -> list[tuple[JobRow, AttemptRow]]:
    """Return those that were asked and have not let go yet."""
    return [(job, attempt) for job, attempt in held if not job.lease and job.wish == StopKind.YIELD]


class Patience:
    """How long workers get to let go. After a restart of the server they get the time anew."""

    def __init__(self, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace_s = grace_s
        self._clock = clock
        # Since when they are known to have been asked, by attempt id.
        self._asked_s: dict[int, float] = {}

    def spent(self, held: Sequence[tuple[JobRow, AttemptRow]]) -> list[tuple[JobRow, AttemptRow, str]]:
        """Return those that had the time and are still there, and what to say of them."""
        now, asked = self._clock(), being_asked(held)
        self._asked_s = {attempt.id: self._asked_s.get(attempt.id, now) for _, attempt in asked}
        return [
            (job, attempt, f"attempt {attempt.number}: had not made room {self._grace_s:g} s after it was asked to")
            for job, attempt in asked
            if now - self._asked_s[attempt.id] > self._grace_s
        ]
