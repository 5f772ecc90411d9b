"""Verifications: replays of some steps of a job between two of its checkpoints, and the receipts of what came of them.

A verification is claimed like a job: by a try with a number of its own, and a try that was given up writes nothing. It
changes nothing of its job, and until it is done retention leaves both checkpoints alone.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from cognateforge.exceptions import (
    CheckpointGoneError,
    CheckpointNotFoundError,
    IllegalTransitionError,
    PreconditionError,
    VerificationOpenError,
)
from training_common.attempt import FencedOutError
from training_common.jobs.states import FINAL, JobState
from training_common.jobs.store import MAX_TEXT_CHARS, AttemptRow, CheckpointRow, JobRow, JobStore
from training_common.store import tables as t
from training_common.store.database import Database, now_us

v = t.verifications


class VerificationState(enum.StrEnum):
    """Where a verification stands. The names are those of cognateforge.job.v1.VerificationState."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"


@dataclass(frozen=True, kw_only=True)
class VerificationRow:
    """A verification as stored. Times in microseconds since 1970."""

    id: int
    name: str
    job_id: int
    caller: str
    state: VerificationState
    from_checkpoint_id: int
    to_checkpoint_id: int
    tries: int
    server: str
    handle: str
    launched: str
    heartbeat_us: int
    create_us: int
    start_us: int | None
    end_us: int | None
    failure: str
    receipt: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a worker that replays needs to know."""

    row: VerificationRow
    job: JobRow
    start: CheckpointRow
    target: CheckpointRow


class VerificationStore:
    """The verifications of one service's jobs."""

    def __init__(self, jobs: JobStore) -> None:
        self.database: Database = jobs.database
        self._jobs = jobs

    # --- servicer

    def submit(
        self, connection: sa.Connection, job_name: str, *, from_step: int, to_step: int, caller: str
    ) -> VerificationRow:
        """Store a new verification of a job that holds no worker. 0 means the newest, and the one before it.

        Errors: JobNotFoundError, IllegalTransitionError, CheckpointNotFoundError, CheckpointGoneError,
        VerificationOpenError.
        """
        job = self._jobs.lock(job_name, connection)
        if job.state not in FINAL and job.state is not JobState.PAUSED:
            raise IllegalTransitionError(
                f"{job.name} is {job.state}: pause it or wait for its end, then verify",
                metadata={"state": job.state, "allowed": ", ".join(sorted({*FINAL, JobState.PAUSED}))},
            )
        if job.processes > 1:
            raise PreconditionError(
                f"{job.name} trained in {job.processes} processes; a replay runs in one, which rounds otherwise: "
                "verify a job of one process"
            )
        if connection.execute(sa.select(v.c.id).where(v.c.job_id == job.id, is_open())).first() is not None:
            raise VerificationOpenError(f"a verification of {job.name} is under way: wait for its receipt")
        start, target = _chosen(connection, job.id, from_step, to_step)
        values = {
            "name": f"verifications/{uuid.uuid4()}",
            "job_id": job.id,
            "caller": caller,
            "state": VerificationState.QUEUED.value,
            "from_checkpoint_id": start.id,
            "to_checkpoint_id": target.id,
            "create_us": now_us(),
        }
        return _row(connection.execute(sa.insert(v).values(**values).returning(v)).mappings().one())

    def of_job(self, connection: sa.Connection, job_id: int, limit: int) -> list[Claim]:
        """Return a job's verifications, newest first."""
        query = sa.select(v).where(v.c.job_id == job_id).order_by(v.c.id.desc()).limit(limit)
        rows = [_row(row) for row in connection.execute(query).mappings()]
        return [self.claim_of(connection, row) for row in rows]

    @staticmethod
    def claim_of(connection: sa.Connection, row: VerificationRow) -> Claim:
        """Return a verification with its job and checkpoints."""
        job = connection.execute(sa.select(t.jobs).where(t.jobs.c.id == row.job_id)).mappings().one()
        return Claim(
            row=row,
            job=JobRow(**{**job, "state": JobState(job["state"])}),
            start=_checkpoint(connection, row.from_checkpoint_id),
            target=_checkpoint(connection, row.to_checkpoint_id),
        )

    # --- scheduler

    def running(self) -> list[VerificationRow]:
        """Return every verification that a worker holds."""
        query = sa.select(v).where(v.c.state == VerificationState.RUNNING.value).order_by(v.c.id)
        with self.database.read() as connection:
            return [_row(row) for row in connection.execute(query).mappings()]

    def begin(
        self, server: str, *, may_start: Callable[[sa.Connection], bool] = lambda _connection: True
    ) -> Claim | None:
        """Take the oldest one that waits, or return None. Those that another server is just taking are passed over.

        may_start: asked in the transaction that takes it; it waits where the answer is no.
        """
        waiting = sa.select(v.c.id).where(v.c.state == VerificationState.QUEUED.value).order_by(v.c.id).limit(1)
        with self.database.read() as connection:
            if connection.execute(waiting).first() is None:
                return None
        with self.database.write() as connection:
            found = connection.execute(waiting.with_for_update(skip_locked=True)).scalar()
            if found is None or not may_start(connection):
                return None
            now = now_us()
            changes = {
                "state": VerificationState.RUNNING.value,
                "tries": v.c.tries + 1,
                "server": server,
                "handle": "",
                "launched": "",
                "start_us": sa.func.coalesce(v.c.start_us, now),
                "heartbeat_us": now,
            }
            statement = sa.update(v).where(v.c.id == found).values(**changes).returning(v)
            return self.claim_of(connection, _row(connection.execute(statement).mappings().one()))

    def set_launched(self, row: VerificationRow, handle: str) -> None:
        """Store by which handle a worker was started, for a server that is started after this one."""
        with self.database.write() as connection:
            connection.execute(sa.update(v).where(_held(row.id, row.tries)).values(launched=handle))

    def give_up(self, row: VerificationRow, message: str, *, most_tries: int) -> None:
        """Take a verification from a worker that was lost: it is queued again, or fails after so many tries."""
        changes: dict[str, Any] = {"state": VerificationState.QUEUED.value, "tries": row.tries}
        if row.tries >= most_tries:
            changes = {"state": VerificationState.FAILED.value, "failure": message[:MAX_TEXT_CHARS], "end_us": now_us()}
        with self.database.write() as connection:
            connection.execute(sa.update(v).where(_held(row.id, row.tries)).values(**changes))

    # --- worker

    def claimed(self, name: str, number: int) -> Claim:
        """Return what a worker was started for. Errors: FencedOutError."""
        with self.database.read() as connection:
            row = connection.execute(sa.select(v).where(v.c.name == name)).mappings().one_or_none()
            found = None if row is None else _row(row)
            if found is None or (found.state, found.tries) != (VerificationState.RUNNING, number):
                raise FencedOutError(f"{name}: try {number} is not current")
            return self.claim_of(connection, found)

    def attempt_of(self, claim: Claim) -> AttemptRow:
        """Return the job's last attempt."""
        row = self._jobs.attempt_row(claim.job.id, claim.job.attempt)
        if row is None:
            raise CheckpointGoneError(f"{claim.job.name} has had no attempt")
        return row

    def beat(self, row: VerificationRow, handle: str) -> None:
        """Give a sign of life. Errors: FencedOutError."""
        self._change(row, handle=handle, heartbeat_us=now_us())

    def finish(self, row: VerificationRow, receipt: dict[str, Any]) -> None:
        """Store the receipt. Errors: FencedOutError."""
        self._change(row, state=VerificationState.DONE.value, receipt=receipt, end_us=now_us())

    def fail(self, row: VerificationRow, message: str) -> None:
        """Tell that there will be no receipt. Errors: FencedOutError."""
        failure = message[:MAX_TEXT_CHARS]
        self._change(row, state=VerificationState.FAILED.value, failure=failure, end_us=now_us())

    def _change(self, row: VerificationRow, **changes: Any) -> None:
        with self.database.write() as connection:
            if connection.execute(sa.update(v).where(_held(row.id, row.tries)).values(**changes)).rowcount == 0:
                raise FencedOutError(f"{row.name}: try {row.tries} is no longer current")


def is_open() -> sa.ColumnElement[bool]:
    """Whether a verification is not done yet."""
    return v.c.state.in_([VerificationState.QUEUED.value, VerificationState.RUNNING.value])


def count_running(connection: sa.Connection) -> int:
    """Return how many verifications hold a slot."""
    query = sa.select(sa.func.count()).select_from(v).where(v.c.state == VerificationState.RUNNING.value)
    return connection.execute(query).scalar_one()


def _held(row_id: int, number: int) -> sa.ColumnElement[bool]:
    return (v.c.id == row_id) & (v.c.tries == number) & (v.c.state == VerificationState.RUNNING.value)


def _row(row: sa.RowMapping) -> VerificationRow:
    return VerificationRow(**{**row, "state": VerificationState(row["state"])})


def _checkpoint(connection: sa.Connection, checkpoint_id: int) -> CheckpointRow:
    query = sa.select(t.checkpoints).where(t.checkpoints.c.id == checkpoint_id)
    return CheckpointRow(**connection.execute(query).mappings().one())


def _chosen(
    connection: sa.Connection, job_id: int, from_step: int, to_step: int
) -> tuple[CheckpointRow, CheckpointRow]:
    """Return the checkpoints to begin with and to compare with, locked until the transaction ends."""
    query = sa.select(t.checkpoints).filter_by(job_id=job_id).order_by(t.checkpoints.c.step, t.checkpoints.c.id)
    rows = [CheckpointRow(**row) for row in connection.execute(query.with_for_update()).mappings()]
    target = _pick(rows, to_step, before=None)
    return _pick(rows, from_step, before=target.step), target


def _pick(rows: list[CheckpointRow], step: int, *, before: int | None) -> CheckpointRow:
    earlier = "" if before is None else f" before step {before}"
    found = [row for row in rows if (step in (0, row.step)) and (before is None or row.step < before)]
    if not found:
        wanted = f"of step {step}" if step else "at all"
        raise CheckpointNotFoundError(f"the job has no checkpoint {wanted}{earlier}; list them to see which")
    there = [row for row in found if row.available]
    if not there:
        raise CheckpointGoneError(f"the files of the checkpoint that is wanted{earlier} are gone; choose others")
    return there[-1]
