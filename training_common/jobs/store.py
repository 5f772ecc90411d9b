"""Jobs, their events, attempts and checkpoints, as rows.

Three parties write here: the servicer (submit and wishes), the scheduler (attempts and their cuts) and the worker.
Everything that a worker writes goes through `AttemptStore` and is conditional on its fencing token, in the statement
that takes the event's sequence. So a worker that was given up can change nothing, and sequences have no gap.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import random
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cognateforge.exceptions import (
    FieldViolation,
    IllegalTransitionError,
    JobDeadlineExceededError,
    JobNotFoundError,
    RequestIdReusedError,
    UnavailableError,
)
from training_common.attempt import AttemptWaits, FencedOutError, Json, StopKind
from training_common.jobs import queue
from training_common.jobs.speed import measured_steps_per_s
from training_common.jobs.states import FINAL, HELD, MAY_WAIT, MOVES, WAITING, JobState
from training_common.store import tables as t
from training_common.store.database import Database, now_us
from training_common.store.one_row import OneRow

MAX_TEXT_CHARS = 2000

# A worker is on its way out for another reason.
STOPPING = frozenset({JobState.PAUSING, JobState.CANCELLING})

_BY_NAME = OneRow(sa.select(t.jobs).where(t.jobs.c.name == sa.bindparam("name")))


@dataclass(frozen=True, kw_only=True)
class JobRow:
    """A job as stored. Times in microseconds since 1970."""

    id: int
    name: str
    state: JobState
    plan: bytes
    caller: str
    wish: str
    attempt: int
    fencing_token: int
    step: int
    total_steps: int
    processes: int
    nodes: int
    slots: int
    last_sequence: int
    observed: bool
    retries_without_progress: int
    kills_without_progress: int
    not_before_us: int
    waits: int
    waiting_since_us: int | None
    waits_for: str
    priority: int
    queue_us: int | None
    start_by_us: int | None
    finish_by_us: int | None
    deadline_us: int | None
    configuration: str
    tenant: str
    cores: int
    memory_bytes: int
    reservation: str
    lease: str
    lease_token: int
    lease_until_us: int | None
    create_us: int
    start_us: int | None
    end_us: int | None
    failure_reason: str
    failure_message: str
    artifact: str
    facts: Mapping[str, str]
    traceparent: str
    first_sequence: int
    files_removed_us: int | None

    @property
    def claims(self) -> bool:
        """Whether another job was asked to make room for this one, which waits."""
        return self.queue_us is not None and self.queue_us < -queue.HOLD_US


@dataclass(frozen=True, kw_only=True)
class EventRow:
    """An event as stored."""

    id: int
    job_id: int
    sequence: int
    time_us: int
    attempt: int
    kind: str
    payload: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AttemptRow:
    """An attempt as stored."""

    id: int
    job_id: int
    number: int
    fencing_token: int
    engine: str
    server: str
    handle: str
    launched: str
    first_step: int
    start_us: int
    heartbeat_us: int
    end_us: int | None
    steps_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class CheckpointRow:
    """A checkpoint as stored. `folder` is relative to the job's checkpoint folder."""

    id: int
    job_id: int
    attempt: int
    step: int
    digest: str
    size_bytes: int
    folder: str
    create_us: int
    available: bool
    pinned: bool
    score: float | None


@dataclass(frozen=True, kw_only=True)
class Loan:
    """Borrowed capacity for one attempt. until_us: when the lease ends on this machine's clock, if not renewed."""

    lease: str
    token: int
    amount: int
    until_us: int


class Loss(enum.StrEnum):
    """Why a worker was lost, by the column that counts such losses."""

    CRASHED = "retries_without_progress"
    KILLED = "kills_without_progress"


# What a job had to wait for is there.
_NO_WAIT: Mapping[str, Any] = {"not_before_us": 0, "waits": 0, "waiting_since_us": None, "waits_for": ""}


def is_wanted() -> sa.ColumnElement[bool]:
    """Whether a checkpoint's files must stay whatever a policy says: it is pinned, or a verification is under way."""
    v = t.verifications
    named = (v.c.from_checkpoint_id == t.checkpoints.c.id) | (v.c.to_checkpoint_id == t.checkpoints.c.id)
    return t.checkpoints.c.pinned | sa.exists().where(named, v.c.end_us.is_(None))


def _may_write(token: int | sa.BindParameter[int], at_us: int | sa.BindParameter[int]) -> sa.ColumnElement[bool]:
    """Whether a worker with this token may write now: the job is still its own, and so is what it runs on."""
    until = t.jobs.c.lease_until_us
    return (t.jobs.c.fencing_token == token) & (until.is_(None) | (until > at_us))


def _job(row: Mapping[str, Any] | sa.RowMapping) -> JobRow:
    # Not through __init__: a frozen class sets its fields one by one, which takes as long as reading the row.
    job = object.__new__(JobRow)
    vars(job).update(row, state=JobState(row["state"]))
    return job


def note_of(kind: str, message: str, facts: Mapping[str, str]) -> dict[str, Json]:
    """Return the payload of a "note" event, its texts bounded."""
    return {"kind": kind, "message": message[:MAX_TEXT_CHARS], "facts": {**facts}}


def append_event(
    connection: sa.Connection,
    job_id: int,
    kind: str,
    payload: Mapping[str, Any],
    *,
    only_token: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> JobRow:
    """Change a job and record the event that tells of it, in the caller's transaction.

    Errors: FencedOutError, when `only_token` is given and no longer the job's. Nothing is written then.
    """
    changes = changes or {}
    of = {"of_job": job_id, **{_new(name): value for name, value in changes.items()}}
    if only_token is not None:
        of |= {"token": only_token, "at_us": now_us()}
    row = connection.execute(_telling(tuple(changes), only_token is not None), of).mappings().one_or_none()
    if row is None:
        raise FencedOutError(f"job {job_id}: fencing token {only_token} is no longer current")
    job = _job(row)
    event = {"job_id": job_id, "sequence": job.last_sequence, "time_us": now_us(), "attempt": job.attempt, "kind": kind}
    connection.execute(_INSERT_EVENT, {**event, "payload": dict(payload)})
    return job


# Statements are built once, which takes longer than running them, and a worker tells of every step.
_INSERT_EVENT = sa.insert(t.events)


@functools.cache
def _telling(changed: tuple[str, ...], guarded: bool) -> sa.Executable:
    """Return the change of a job that comes with an event. guarded: only by the worker whose token is current."""
    condition = t.jobs.c.id == sa.bindparam("of_job")
    if guarded:
        condition &= _may_write(sa.bindparam("token"), sa.bindparam("at_us"))
    values: dict[str, Any] = {name: sa.bindparam(_new(name)) for name in changed}
    return (
        sa.update(t.jobs)
        .where(condition)
        .values(last_sequence=t.jobs.c.last_sequence + 1, **values)
        .returning(*t.jobs.c)
    )


def _new(name: str) -> str:
    """Return what a column's new value is called: its own name stands for the column."""
    return f"new_{name}"


def move(
    connection: sa.Connection,
    job: JobRow,
    to: JobState,
    *,
    message: str = "",
    only_token: int | None = None,
    lost: bool = False,
    **changes: Any,
) -> JobRow:
    """Move a job to another state and record it, in the caller's transaction.

    lost: whether it moves because its worker was lost, for those who count such events.

    Errors: IllegalTransitionError, with the moves that its state allows; FencedOutError.
    """
    if to not in MOVES[job.state]:
        allowed = ", ".join(sorted(MOVES[job.state])) or "none: it has ended"
        description = f"{job.name} is {job.state} and cannot become {to}; from here it can become {allowed}"
        raise IllegalTransitionError(
            description,
            violations=[FieldViolation(field="name", description=description)],
            metadata={"state": job.state, "allowed": allowed},
        )
    if to in FINAL:
        changes = {"end_us": now_us(), "wish": "", "observed": True, "deadline_us": None, **changes}
    if to is JobState.RUNNING:
        changes = {**_NO_WAIT, **changes}
        if job.waits:  # what it waited for is there, for the others too
            connection.execute(_others_that_wait(job.waits_for, None).values(not_before_us=0))
    payload: dict[str, Json] = {"from": job.state.value, "to": to.value, "message": message[:MAX_TEXT_CHARS]}
    if lost:
        payload["lost"] = True
    place = queue.place_us(job.create_us, job.priority) if to in WAITING else None
    changes = {"state": to.value, "queue_us": place, **changes}
    return append_event(connection, job.id, "state_change", payload, only_token=only_token, changes=changes)


def once(
    connection: sa.Connection,
    *,
    caller: str,
    request_id: str,
    method: str,
    payload: bytes,
    work: Callable[[], bytes],
) -> bytes:
    """Run `work` once for a request id and return its answer; replay the answer for the same id and payload.

    The answer is stored in the caller's transaction, so change and answer are one.
    Errors: RequestIdReusedError, when the id came before with another method or payload.
    """
    key = {"caller": caller, "request_id": request_id.lower()}
    # The row comes first: whoever brings the same id at the same time waits for it, and then finds the answer.
    values = {**key, "method": method, "payload_sha256": hashlib.sha256(payload).hexdigest(), "answer": b""}
    if not _insert_if_absent(connection, t.requests, {**values, "create_us": now_us()}):
        answer = answer_to(connection, caller=caller, request_id=request_id, method=method, payload=payload)
        return cast("bytes", answer)
    answer = work()
    connection.execute(sa.update(t.requests).filter_by(**key).values(answer=answer))
    return answer


def answer_to(connection: sa.Connection, *, caller: str, request_id: str, method: str, payload: bytes) -> bytes | None:
    """Return the answer that a request id has had, None where it is new.

    Errors: RequestIdReusedError, when the id came before with another method or payload.
    """
    query = sa.select(t.requests).filter_by(caller=caller, request_id=request_id.lower())
    seen = connection.execute(query).mappings().one_or_none()
    if seen is None:
        return None
    if (seen["method"], seen["payload_sha256"]) != (method, hashlib.sha256(payload).hexdigest()):
        raise reused(request_id, seen["method"])
    return cast("bytes", seen["answer"])


def reused(request_id: str, method: str) -> RequestIdReusedError:
    """Return the error of an id that came before for this method, with another payload."""
    return RequestIdReusedError(
        f"request_id {request_id} was used before for {method} with another payload: use a new UUID"
    )


def _insert_if_absent(connection: sa.Connection, table: sa.Table, values: Mapping[str, Any]) -> bool:
    """Insert a row unless its key is there, and return whether it was inserted. Waits for whoever inserts it now."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = insert(table).values(**values).on_conflict_do_nothing().returning(sa.literal(1))
    return connection.execute(statement).first() is not None


class Picking(Protocol):
    """Decides which of the waiting jobs is the next, where that is not the first of the queue."""

    def next_due(
        self, connection: sa.Connection, *, most: int | None = None, most_nodes: int | None = None
    ) -> JobRow | None:
        """Return the job that is the next to get a worker, by `first_due`."""


def first_due(
    connection: sa.Connection,
    *conditions: sa.ColumnElement[bool],
    most: int | None = None,
    most_nodes: int | None = None,
) -> JobRow | None:
    """Return the first job of the queue that fulfils the conditions, and takes no more slots and nodes than these.

    In a transaction that writes it is locked, and those that another server is just taking are passed over.
    """
    query = sa.select(t.jobs).where(queue.is_due(), *conditions).order_by(*queue.ORDER).limit(1)
    if most is not None:
        query = query.where(t.jobs.c.slots <= most)
    if most_nodes is not None:
        query = query.where(t.jobs.c.nodes <= most_nodes)
    if connection.get_execution_options().get("forge_write"):
        query = query.with_for_update(skip_locked=True)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else _job(row)


class JobStore:
    """What servicer and scheduler do with jobs. Every method is one transaction unless it takes a connection.

    picking: decides which job is the next; by default the first of the queue is.
    """

    def __init__(self, database: Database, picking: Picking | None = None) -> None:
        self.database = database
        self._picking = picking

    # --- servicer

    def submit(
        self,
        connection: sa.Connection,
        *,
        plan: bytes,
        total_steps: int,
        caller: str,
        scheduling: queue.Scheduling = queue.USUAL,
        configuration: str = "",
        demand: queue.Demand = queue.NOBODYS,
        reservation: str = "",
        traceparent: str = "",
    ) -> JobRow:
        """Store a new QUEUED job and its first event.

        configuration: digest of what decides how fast its steps are. traceparent: the place in a trace that it is
        submitted at.
        """
        now = now_us()
        values: dict[str, Any] = {
            "name": f"jobs/{uuid.uuid4()}",
            "state": JobState.QUEUED.value,
            "plan": plan,
            "caller": caller,
            "total_steps": total_steps,
            "create_us": now,
            "configuration": configuration,
            "facts": {},
            "reservation": reservation,
            "traceparent": traceparent,
            **asdict(demand),
            "slots": demand.slots,
            **scheduling.columns(now),
        }
        job_id = connection.execute(sa.insert(t.jobs).values(**values).returning(t.jobs.c.id)).scalar_one()
        payload = {"from": "", "to": JobState.QUEUED.value, "message": "submitted"}
        return append_event(connection, job_id, "state_change", payload)

    def lock(self, name: str, connection: sa.Connection) -> JobRow:
        """Return one job that nobody else changes until the transaction ends. Errors: JobNotFoundError."""
        connection.execute(sa.select(t.jobs.c.id).filter_by(name=name).with_for_update())
        return self.get(name, connection)

    def get(self, name: str, connection: sa.Connection | None = None) -> JobRow:
        """Return one job. Errors: JobNotFoundError."""
        if connection is None:
            with self.database.read() as own:
                return self.get(name, own)
        row = _BY_NAME.read(connection, name=name)
        if row is None:
            raise JobNotFoundError(f"no job {name}; list the jobs to see what there is")
        return _job(row)

    def page(self, *, states: Collection[JobState], before_id: int | None, limit: int) -> list[JobRow]:
        """Return up to `limit` jobs, newest first, that are older than `before_id`."""
        query = sa.select(t.jobs).order_by(t.jobs.c.id.desc()).limit(limit)
        if states:
            query = query.where(t.jobs.c.state.in_([state.value for state in states]))
        if before_id is not None:
            query = query.where(t.jobs.c.id < before_id)
        with self.database.read() as connection:
            return [_job(row) for row in connection.execute(query).mappings()]

    def pause(self, connection: sa.Connection, name: str) -> JobRow:
        """Ask for a pause: at once where no worker holds the job, otherwise by a wish that its worker sees."""
        job = self.lock(name, connection)
        if job.state in WAITING:
            return move(connection, job, JobState.PAUSED, message="paused while it held no worker")
        return move(connection, job, JobState.PAUSING, message="pause requested", wish="pause")

    def cancel(self, connection: sa.Connection, name: str) -> JobRow:
        """Ask for the end: at once where no worker holds the job, otherwise by a wish that its worker sees."""
        job = self.lock(name, connection)
        if job.state in WAITING or job.state is JobState.PAUSED:
            return move(connection, job, JobState.CANCELLED, message="cancelled while it held no worker")
        return move(connection, job, JobState.CANCELLING, message="cancel requested", wish="cancel")

    def resume(self, connection: sa.Connection, name: str) -> JobRow:
        """Queue a paused job again. What it waited for before the pause is tried at once."""
        job = self.lock(name, connection)
        return move(connection, job, JobState.QUEUED, message="resume requested", wish="", **_NO_WAIT)

    def events_after(self, job_id: int, sequence: int, limit: int, *, progress_every: int = 1) -> list[EventRow]:
        """Return up to `limit` events of a job after `sequence`, in order.

        progress_every: progress is left out but where its sequence is a multiple of this.
        """
        query = (
            sa.select(t.events)
            .where(t.events.c.job_id == job_id, t.events.c.sequence > sequence)
            .order_by(t.events.c.sequence)
            .limit(limit)
        )
        if progress_every > 1:
            query = query.where((t.events.c.kind != "progress") | (t.events.c.sequence % progress_every == 0))
        with self.database.read() as connection:
            return [EventRow(**row) for row in connection.execute(query).mappings()]

    def progress_after(self, job_id: int, sequence: int, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """Return up to `limit` progress events of a job after `sequence`, in order: their sequences and payloads."""
        # Long jobs have very many of them, so that no more is read than is needed.
        query = (
            sa.select(t.events.c.sequence, t.events.c.payload)
            .where(t.events.c.job_id == job_id, t.events.c.kind == "progress", t.events.c.sequence > sequence)
            .order_by(t.events.c.sequence)
            .limit(limit)
        )
        with self.database.read() as connection:
            return [(row[0], row[1]) for row in connection.execute(query)]

    def progress(self) -> int:
        """Return a number that changes when any job may have a new event. Cheap: it is the primary key's end."""
        with self.database.read() as connection:
            newest = connection.execute(sa.select(sa.func.max(t.events.c.id))).scalar() or 0
            return self.database.progress(connection, newest)

    def checkpoints(self, job_id: int, limit: int = 1000) -> list[CheckpointRow]:
        """Return a job's checkpoints, newest first."""
        query = (
            sa.select(t.checkpoints)
            .filter_by(job_id=job_id)
            .order_by(t.checkpoints.c.step.desc(), t.checkpoints.c.id.desc())
            .limit(limit)
        )
        with self.database.read() as connection:
            return [CheckpointRow(**row) for row in connection.execute(query).mappings()]

    def counts(self, connection: sa.Connection, states: Collection[JobState]) -> dict[JobState, int]:
        """Return how many jobs are in each of the states that has any."""
        wanted = t.jobs.c.state.in_([state.value for state in states])
        query = sa.select(t.jobs.c.state, sa.func.count()).where(wanted).group_by(t.jobs.c.state)
        return {JobState(state): count for state, count in connection.execute(query)}

    def attempt_row(self, job_id: int, number: int) -> AttemptRow | None:
        """Return one attempt of a job, or None where it has had none of that number."""
        with self.database.read() as connection:
            row = connection.execute(sa.select(t.attempts).filter_by(job_id=job_id, number=number)).mappings().first()
        return None if row is None else AttemptRow(**row)

    def due(self, connection: sa.Connection) -> int:
        """Return how many jobs wait for nothing but a worker."""
        query = sa.select(sa.func.count()).select_from(t.jobs).where(queue.is_due())
        return connection.execute(query).scalar_one()

    def first_in_queue(self, connection: sa.Connection, limit: int) -> list[JobRow]:
        """Return up to `limit` jobs that wait for nothing but a worker, in the queue's order."""
        query = sa.select(t.jobs).where(queue.is_due()).order_by(*queue.ORDER).limit(limit)
        return [_job(row) for row in connection.execute(query).mappings()]

    def held_slots(self, connection: sa.Connection) -> int:
        """Return how many slots are taken by jobs that a worker holds."""
        return self._slots(connection, t.jobs.c.state.in_([state.value for state in HELD]))

    def due_slots(self, connection: sa.Connection) -> int:
        """Return how many slots the jobs want that wait for nothing but a worker."""
        return self._slots(connection, queue.is_due())

    @staticmethod
    def _slots(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> int:
        query = sa.select(sa.func.coalesce(sa.func.sum(t.jobs.c.slots), 0)).where(condition)
        return int(connection.execute(query).scalar_one())

    def next_due(
        self, connection: sa.Connection, *, most: int | None = None, most_nodes: int | None = None
    ) -> JobRow | None:
        """Return the job that is the next to get a worker. Those that another server is just taking are passed over.

        most, most_nodes: jobs of more slots or nodes are for other servers.
        """
        if self._picking is None:
            return first_due(connection, most=most, most_nodes=most_nodes)
        return self._picking.next_due(connection, most=most, most_nodes=most_nodes)

    def held_handles(self, connection: sa.Connection) -> list[str]:
        """Return the handles of the workers that hold a job."""
        query = (
            sa.select(t.attempts.c.handle)
            .join(t.jobs, (t.attempts.c.job_id == t.jobs.c.id) & (t.attempts.c.number == t.jobs.c.attempt))
            .where(t.jobs.c.state.in_([state.value for state in HELD]))
        )
        return list(connection.execute(query).scalars())

    def note(self, connection: sa.Connection, job_id: int, kind: str, message: str, facts: Mapping[str, str]) -> None:
        """Record a note of the service itself in a job."""
        append_event(connection, job_id, "note", note_of(kind, message, facts))

    # --- scheduler

    def overdue(self) -> list[JobRow]:
        """Return the jobs that somebody must look at because of a deadline, the first ones of them."""
        # In the order of the index, and not by id: the whole table would be looked through twice a second.
        query = sa.select(t.jobs).where(t.jobs.c.deadline_us <= now_us()).order_by(t.jobs.c.deadline_us).limit(100)
        with self.database.read() as connection:
            return [_job(row) for row in connection.execute(query).mappings()]

    def pass_deadline(self, name: str, *, grace_s: float) -> JobRow | None:
        """End a job that is past a deadline, or ask its worker to; return it where its worker has used up the grace.

        A job that is being paused or cancelled is left to that: paused, it is looked at again.
        """
        with self.database.write() as connection:
            job, now = self.lock(name, connection), now_us()
            if job.deadline_us is None or job.deadline_us > now or job.state in STOPPING:
                return None
            if job.state not in HELD:
                started = job.start_us is not None or job.start_by_us is None or job.start_by_us > now
                failure = past_finish_by(job) if started else _past_start_by(job)
                move(connection, job, JobState.FAILED, message=failure["failure_message"], **failure)
                return None
            if job.wish == StopKind.DEADLINE:
                return job
            message = f"{past_finish_by(job)['failure_message']}: its worker is asked to save a checkpoint and let go"
            connection.execute(
                sa.update(t.jobs)
                .filter_by(id=job.id)
                .values(wish=StopKind.DEADLINE.value, deadline_us=now + round(grace_s * 1e6))
            )
            self.note(connection, job.id, "deadline_passed", message, {"grace_s": f"{grace_s:g}"})
            return None

    def held(self) -> list[tuple[JobRow, AttemptRow]]:
        """Return every job that a worker holds, with its current attempt."""
        query = (
            sa.select(t.jobs, t.attempts)
            .join(t.attempts, (t.attempts.c.job_id == t.jobs.c.id) & (t.attempts.c.number == t.jobs.c.attempt))
            .where(t.jobs.c.state.in_([state.value for state in HELD]))
            .order_by(t.jobs.c.id)
        )
        with self.database.read() as connection:
            rows = connection.execute(query).all()
        width = len(t.jobs.c)
        return [
            (
                _job(cast("sa.RowMapping", dict(zip(t.jobs.c.keys(), row[:width], strict=True)))),
                AttemptRow(**dict(zip(t.attempts.c.keys(), row[width:], strict=True))),
            )
            for row in rows
        ]

    def begin_attempt(
        self,
        engine: str,
        server: str = "",
        loan: Loan | None = None,
        *,
        most: int | None = None,
        free: int | None = None,
        most_nodes: int | None = None,
        may_start: Callable[[sa.Connection, JobRow], bool] = lambda _connection, _job: True,
    ) -> JobRow | None:
        """Take the first job of the queue for a new attempt, or return None.

        The worker is launched after the commit. server: who looks after it. loan: borrowed capacity that it runs on.
        most, free: slots that the server has, and of these, those that nobody takes. A job that would fit into the
        first but not yet into the second waits, and those behind it do too: small ones would never let it have a turn.
        most_nodes: machines that one worker can be spread over.
        may_start: asked about that very job, in the transaction that takes it; it waits where the answer is no.
        """
        with self.database.write() as connection:
            job = self.next_due(connection, most=most, most_nodes=most_nodes)
            if job is None:
                return None
            if free is not None and job.slots > free:
                held = sa.update(t.jobs).where(t.jobs.c.id == job.id, t.jobs.c.queue_us >= 0)
                connection.execute(held.values(queue_us=t.jobs.c.queue_us - queue.HOLD_US))
                return None
            if not may_start(connection, job):
                return None
            number, token, now = job.attempt + 1, job.fencing_token + 1, now_us()
            job = move(
                connection,
                job,
                JobState.PREPARING,
                attempt=number,
                fencing_token=token,
                start_us=job.start_us or now,
                observed=True,
                deadline_us=job.finish_by_us,
                lease=loan.lease if loan else "",
                lease_token=loan.token if loan else 0,
                lease_until_us=loan.until_us if loan else None,
            )
            connection.execute(
                sa.insert(t.attempts).values(
                    job_id=job.id,
                    number=number,
                    fencing_token=token,
                    engine=engine,
                    server=server,
                    first_step=self._newest_step(connection, job.id),
                    start_us=now,
                    heartbeat_us=now,
                )
            )
            return append_event(connection, job.id, "attempt_started", {"attempt": number, "engine": engine})

    def cut(
        self,
        job: JobRow,
        attempt: AttemptRow,
        *,
        message: str,
        loss: Loss | None = None,
        most: int = 0,
        lost: bool = False,
    ) -> JobRow | None:
        """Take a job away from a worker that was lost, and settle what becomes of it.

        A job that was pausing or being cancelled is PAUSED or CANCELLED. Otherwise it recovers, unless more than `most`
        attempts in a row were lost alike without a new checkpoint: then it is FAILED. loss: None does not count.
        lost: whether the platform ended the worker, and not this server for a reason of its own.
        Returns None when the worker had let go itself.
        """
        with self.database.write() as connection:
            current = self.lock(job.name, connection)
            if current.fencing_token != attempt.fencing_token or current.state not in HELD:
                return None
            self._end_attempt(connection, attempt.id)
            stuck = self._newest_step(connection, job.id) <= attempt.first_step
            counts = {column.value: getattr(current, column) if stuck else 0 for column in Loss}
            if loss is not None and stuck:
                counts[loss] += 1
            changes: dict[str, Any] = {"fencing_token": current.fencing_token + 1, "wish": "", "observed": True}
            changes |= {"lost": lost}
            if current.state is JobState.CANCELLING:
                return move(connection, current, JobState.CANCELLED, message=message, **changes)
            if current.state is JobState.PAUSING:
                return move(connection, current, JobState.PAUSED, message=message, **changes)
            if current.wish == StopKind.DEADLINE:
                return move(connection, current, JobState.FAILED, message=message, **changes, **past_finish_by(current))
            if loss is not None and counts[loss] > most:
                spent = f"{counts[loss]} attempts in a row were lost without a new checkpoint; last: {message}"
                failure: dict[str, Any] = {"failure_reason": "RETRY_BUDGET_SPENT", "failure_message": spent}
                return move(connection, current, JobState.FAILED, message=message, **changes, **failure)
            if loss is Loss.KILLED and counts[loss] > 1:
                # A machine that ends workers, for want of memory for instance, is not pressed.
                pause_us = round(_pause_s(counts[loss] - 2) * 1e6)
                changes |= {"not_before_us": now_us() + pause_us, "waits_for": ""}
            return move(connection, current, JobState.RECOVERING, message=message, **changes, **dict[str, Any](counts))

    def set_launched(self, attempt_id: int, handle: str) -> None:
        """Store by which handle an attempt's worker was started, for a server that is started after this one."""
        with self.database.write() as connection:
            connection.execute(sa.update(t.attempts).filter_by(id=attempt_id).values(launched=handle))

    def set_observed(self, job: JobRow, observed: bool) -> None:
        """Record whether the job's worker was seen lately. The state stays."""
        with self.database.write() as connection:
            connection.execute(sa.update(t.jobs).filter_by(id=job.id).values(observed=observed))

    def beat_for(self, attempt: AttemptRow) -> None:
        """Give a sign of life for a worker that waits for capacity and cannot give one itself."""
        with self.database.write() as connection:
            connection.execute(sa.update(t.attempts).filter_by(id=attempt.id).values(heartbeat_us=now_us()))

    def extend_lease(self, job: JobRow, until_us: int) -> None:
        """Let the worker of a job on borrowed capacity write until then, if the job still has that lease."""
        with self.database.write() as connection:
            connection.execute(sa.update(t.jobs).filter_by(id=job.id, lease=job.lease).values(lease_until_us=until_us))

    def ask_back(self, job: JobRow, message: str) -> bool:
        """Ask the worker of a job on borrowed capacity to yield, once, and say so. Returns whether it was asked now."""
        with self.database.write() as connection:
            asked = connection.execute(
                sa.update(t.jobs).filter_by(id=job.id, lease=job.lease, wish="").values(wish="yield")
            ).rowcount
            if asked:
                self.note(connection, job.id, "capacity_asked_back", message, {"lease": job.lease})
            return bool(asked)

    def attempt(self, name: str, number: int, fencing_token: int) -> AttemptStore:
        """Return the worker's view of one attempt. Errors: JobNotFoundError, FencedOutError."""
        with self.database.read() as connection:
            job = self.get(name, connection)
            query = sa.select(t.attempts).filter_by(job_id=job.id, number=number, fencing_token=fencing_token)
            row = connection.execute(query).mappings().one_or_none()
        if row is None or job.fencing_token != fencing_token:
            raise FencedOutError(f"{name}: attempt {number} with fencing token {fencing_token} is not current")
        return AttemptStore(self.database, job, AttemptRow(**row))

    @staticmethod
    def _newest_step(connection: sa.Connection, job_id: int) -> int:
        query = sa.select(sa.func.max(t.checkpoints.c.step)).filter_by(job_id=job_id, available=True)
        return connection.execute(query).scalar() or 0

    @staticmethod
    def _end_attempt(connection: sa.Connection, attempt_id: int) -> None:
        connection.execute(sa.update(t.attempts).filter_by(id=attempt_id).values(end_us=now_us()))


def past_finish_by(job: JobRow) -> dict[str, Any]:
    """Return the failure of a job that has not ended by its finish_by."""
    return _failure(f"did not end by its deadline finish_by {_moment(job.finish_by_us or 0)}")


def _past_start_by(job: JobRow) -> dict[str, Any]:
    return _failure(f"had no worker by its deadline start_by {_moment(job.start_by_us or 0)}")


def _failure(message: str) -> dict[str, Any]:
    return {"failure_reason": JobDeadlineExceededError.reason_name(), "failure_message": message}


def _moment(time_us: int) -> str:
    """Return a time to the second, as people and RFC 3339 write it."""
    return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _others_that_wait(what: str, until_us: int | None) -> sa.Update:
    """Return an update of the jobs that wait for what is away, and would not wait as long as that."""
    waiting = (t.jobs.c.state == JobState.QUEUED.value) & (t.jobs.c.waits > 0) & (t.jobs.c.waits_for == what)
    return sa.update(t.jobs).where(waiting if until_us is None else waiting & (t.jobs.c.not_before_us < until_us))


def _pause_s(waits: int) -> float:
    longest = min(queue.LONGEST_WAIT_S, queue.FIRST_WAIT_S * 2.0 ** min(waits, 10))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads jobs, guards nothing


class AttemptStore:
    """What the worker of one attempt writes. Every write is refused once its fencing token is no longer current."""

    def __init__(self, database: Database, job: JobRow, attempt: AttemptRow) -> None:
        self.database = database
        self.job = job
        self.attempt = attempt
        # The newest step that this attempt has told of. Progress and checkpoints come from two threads.
        self._told_step = -1
        self._step_lock = threading.Lock()

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Open a transaction of this attempt. Errors: FencedOutError, also when its lease ends before the commit.

        A worker that is stopped between a statement and the commit would otherwise write after the end.
        """
        with self.database.write() as connection:
            yield connection
            if self.job.lease:
                self._check(connection)

    def register(self, handle: str) -> bool:
        """Tell the scheduler by which handle it can see this worker. Errors: FencedOutError.

        Returns False where a worker has registered before: a cluster has started the attempt anew, and the first one,
        whose fencing token is the same, may still be at work somewhere.
        """
        with self.writing() as connection:
            self._check(connection)
            fresh = sa.update(t.attempts).filter_by(id=self.attempt.id, handle="")
            return bool(connection.execute(fresh.values(handle=handle, heartbeat_us=now_us())).rowcount)

    def heartbeat(self) -> str:
        """Give a sign of life and return the wish: a StopKind's value, or nothing. Errors: FencedOutError."""
        with self.writing() as connection:
            job = self._check(connection)
            connection.execute(sa.update(t.attempts).filter_by(id=self.attempt.id).values(heartbeat_us=now_us()))
            return job.wish

    def append(self, kind: str, payload: Mapping[str, Json], **changes: Any) -> JobRow:
        """Record an event, with changes of the job. Errors: FencedOutError."""
        with self.writing() as connection:
            return append_event(
                connection,
                self.job.id,
                kind,
                payload,
                only_token=self.attempt.fencing_token,
                changes=changes,
            )

    def note_at_work(self, kind: str, message: str, facts: Mapping[str, str]) -> bool:
        """Record a note, unless the job holds no worker any more: an end is a job's last event.

        Returns whether it was recorded. Errors: FencedOutError.
        """
        with self.writing() as connection:
            if self._check(connection).state not in HELD:
                return False
            token = self.attempt.fencing_token
            append_event(connection, self.job.id, "note", note_of(kind, message, facts), only_token=token)
            return True

    def progress(self, *, step: int, payload: Mapping[str, Json]) -> None:
        """Record that training went on. Errors: FencedOutError."""
        with self._step_lock:
            self._told_step = step
            self.append("progress", payload, step=step)

    def move(self, to: JobState, *, message: str = "", **changes: Any) -> JobRow:
        """Move the job. Errors: FencedOutError, IllegalTransitionError."""
        with self.writing() as connection:
            return self.move_in(connection, to, message=message, **changes)

    def move_in(self, connection: sa.Connection, to: JobState, *, message: str = "", **changes: Any) -> JobRow:
        """Move the job in the caller's transaction; a state that holds no worker ends the attempt too."""
        job = self._check(connection)
        if to is JobState.VALIDATING and not job.lease:  # borrowed capacity is no measure of this server
            measured = measured_steps_per_s(connection, job.id, self.attempt.number)
            connection.execute(sa.update(t.attempts).filter_by(id=self.attempt.id).values(steps_per_s=measured))
        if to not in HELD:
            JobStore._end_attempt(connection, self.attempt.id)
            changes = {"wish": "", **changes}
        return move(connection, job, to, message=message, only_token=self.attempt.fencing_token, **changes)

    def wait(self, wait: AttemptWaits) -> JobRow:
        """Give the job back to the queue until later and end the attempt, or fail the job when its patience is spent.

        The retry budget is not touched. Errors: FencedOutError; IllegalTransitionError, when the owner wished for a
        stop meanwhile.
        """
        with self.writing() as connection:
            job, now = self._check(connection), now_us()
            if job.state not in MAY_WAIT:
                raise IllegalTransitionError(f"{job.name} is {job.state} and cannot wait for {wait.what}")
            fresh = wait.progressed or job.waiting_since_us is None
            since, waits = (now, 0) if fresh else (job.waiting_since_us or now, job.waits)
            patience_us = since + round(wait.give_up_after_s * 1e6) - now if wait.give_up_after_s else None
            if patience_us is not None and patience_us <= 0:
                message = f"waited {(now - since) / 1e6:.0f} s for {wait.what}: {wait.message}"[:MAX_TEXT_CHARS]
                failure = {"failure_reason": UnavailableError.reason_name(), "failure_message": message}
                return self.move_in(connection, JobState.FAILED, message=message, **failure)
            pause_us = round(_pause_s(waits) * 1e6)
            until = now + (pause_us if patience_us is None else min(pause_us, patience_us))
            moment = _moment(until)
            message = f"waits for {wait.what} and is not tried again before {moment}: {wait.message}"
            token = self.attempt.fencing_token
            facts = {"until": moment, "waits": str(waits + 1)}
            note = note_of(f"waiting_for_{wait.what.lower().replace(' ', '_')}", message, facts)
            append_event(connection, job.id, "note", note, only_token=token)
            JobStore._end_attempt(connection, self.attempt.id)
            # This attempt has looked for all that wait: however many they are, slots are spent on one look at a time.
            connection.execute(_others_that_wait(wait.what, until).values(not_before_us=until))
            payload = {"from": job.state.value, "to": JobState.QUEUED.value, "message": f"waits for {wait.what}"}
            changes = {
                "state": JobState.QUEUED.value,
                "queue_us": queue.place_us(job.create_us, job.priority),
                "not_before_us": until,
                "waits": waits + 1,
                "waiting_since_us": since,
                "waits_for": wait.what[:64],
            }
            return append_event(connection, job.id, "state_change", payload, only_token=token, changes=changes)

    def write_too(self, work: Callable[[sa.Connection], None]) -> None:
        """Do other writes that belong to the job. Errors: FencedOutError, and those of `work`."""
        with self.writing() as connection:
            self._check(connection)
            work(connection)

    def set_facts(self, facts: Mapping[str, str]) -> None:
        """Add facts that the service tells about the job."""
        with self.writing() as connection:
            job = self._check(connection)
            merged = {**job.facts, **facts}
            connection.execute(sa.update(t.jobs).filter_by(id=self.job.id).values(facts=merged))

    def add_checkpoint(
        self, *, step: int, digest: str, size_bytes: int, folder: str, score: float | None = None
    ) -> None:
        """Record a durable checkpoint and its event."""
        now = now_us()
        payload: dict[str, Json] = {"step": step, "digest": digest, "size_bytes": size_bytes, "create_us": now}
        with self._step_lock, self.writing() as connection:
            job = append_event(
                connection,
                self.job.id,
                "checkpoint",
                payload,
                only_token=self.attempt.fencing_token,
                # A checkpoint may come between two reports of progress, and it is where the job will go on. Of one that
                # was saved in the background later steps may be known already.
                changes={"step": step} if step >= self._told_step else {},
            )
            connection.execute(
                sa.insert(t.checkpoints).values(
                    job_id=job.id,
                    attempt=self.attempt.number,
                    step=step,
                    digest=digest,
                    size_bytes=size_bytes,
                    folder=folder,
                    create_us=now,
                    score=score,
                )
            )

    def earlier_seconds(self) -> float:
        """Return how long the job's attempts before this one have run."""
        query = sa.select(sa.func.sum(t.attempts.c.end_us - t.attempts.c.start_us)).where(
            t.attempts.c.job_id == self.job.id, t.attempts.c.number < self.attempt.number
        )
        with self.database.read() as connection:
            return float(connection.execute(query).scalar() or 0) / 1e6

    def checkpoints(self) -> Sequence[CheckpointRow]:
        """Return the job's checkpoints whose files are there, newest first."""
        query = (
            sa.select(t.checkpoints)
            .filter_by(job_id=self.job.id, available=True)
            .order_by(t.checkpoints.c.step.desc(), t.checkpoints.c.id.desc())
        )
        with self.database.read() as connection:
            return [CheckpointRow(**row) for row in connection.execute(query).mappings()]

    def checkpoint_folders(self) -> frozenset[str]:
        """Return the folders of all checkpoints that were ever recorded for the job."""
        with self.database.read() as connection:
            return frozenset(
                connection.execute(sa.select(t.checkpoints.c.folder).filter_by(job_id=self.job.id)).scalars()
            )

    def drop_checkpoint(self, row: CheckpointRow, *, kind: str, message: str) -> None:
        """Mark a checkpoint's files as damaged, and tell so."""
        with self.writing() as connection:
            self._drop(connection, row, kind, message)

    def retire_checkpoint(self, row: CheckpointRow, *, kind: str, message: str) -> bool:
        """Mark a checkpoint's files as gone, and tell so.

        Returns False, and does nothing, when it is pinned or a verification needs it.
        """
        with self.writing() as connection:
            query = sa.select(t.checkpoints.c.id).where(
                t.checkpoints.c.id == row.id, t.checkpoints.c.available, ~is_wanted()
            )
            if connection.execute(query.with_for_update()).first() is None:
                return False
            self._drop(connection, row, kind, message)
            return True

    def _drop(self, connection: sa.Connection, row: CheckpointRow, kind: str, message: str) -> None:
        payload = note_of(kind, message, {"step": str(row.step)})
        append_event(connection, self.job.id, "note", payload, only_token=self.attempt.fencing_token)
        connection.execute(sa.update(t.checkpoints).filter_by(id=row.id).values(available=False))

    def _check(self, connection: sa.Connection) -> JobRow:
        query = sa.select(t.jobs).where(t.jobs.c.id == self.job.id, _may_write(self.attempt.fencing_token, now_us()))
        row = connection.execute(query.with_for_update()).mappings().one_or_none()
        if row is None:
            token = self.attempt.fencing_token
            raise FencedOutError(f"{self.job.name}: fencing token {token} is not current, or its lease has ended")
        return _job(row)
