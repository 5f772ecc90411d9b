"""Slots that are kept for a time: the calendar, whose turn it is beside it, and jobs that make room when it begins.

ADR 0025. While a reservation runs, its slots are for the jobs that name it. A slot that it does not use stays empty.
Once it has ended or was cancelled, what is left of its jobs waits like any other.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
import structlog

from cognate_server.tables import reservations as r
from cognateforge.exceptions import (
    FieldViolation,
    InvalidFieldError,
    ReservationConflictError,
    ReservationNotFoundError,
)
from training_common.jobs import yielding
from training_common.jobs.queue import is_due
from training_common.jobs.states import HELD
from training_common.jobs.store import AttemptRow, JobRow, JobStore, first_due
from training_common.jobs.verifications import count_running
from training_common.jobs.waits import HeldBack, WaitReason
from training_common.store import tables as t
from training_common.store.database import Database, Turn, now_us

log = structlog.get_logger(__name__)

LONGEST_US = 366 * 86_400 * 1_000_000
_HELD = t.jobs.c.state.in_([state.value for state in HELD])


@dataclass(frozen=True, kw_only=True)
class ReservationRow:
    """A reservation as stored. Times in microseconds since 1970; end_us is no longer part of it."""

    id: int
    name: str
    caller: str
    purpose: str
    slots: int
    start_us: int
    end_us: int
    create_us: int
    cancel_us: int | None


class Calendar:
    """The reservations of a store. slots: those of all its servers."""

    def __init__(self, database: Database, *, slots: int) -> None:
        self.database = database
        self.slots = slots

    def create(
        self, connection: sa.Connection, *, caller: str, slots: int, start_us: int, end_us: int, purpose: str
    ) -> ReservationRow:
        """Keep slots, in the caller's transaction.

        Errors: InvalidFieldError; ReservationConflictError, which names those that are in the way.
        """
        self.database.in_turn(connection, Turn.CAPACITY)
        now = now_us()
        start_us = max(now, start_us)
        self._check(slots, start_us, end_us)
        others = [one for one in self.open(connection, now) if one.start_us < end_us and start_us < one.end_us]
        # The most that is reserved at once is reached where one of them begins.
        for moment in sorted({start_us, *(one.start_us for one in others if one.start_us > start_us)}):
            there = [one for one in others if one.start_us <= moment < one.end_us]
            taken = sum(one.slots for one in there)
            if taken + slots > self.slots:
                names = ", ".join(f"{one.name} ({one.slots} until {_moment(one.end_us)})" for one in there)
                raise ReservationConflictError(
                    f"slots: {slots} are asked for, and at {_moment(moment)} {self.slots - taken} of {self.slots} are "
                    f"left: {names[:1500]}; take fewer, or another time",
                    violations=[FieldViolation(field="slots", description=f"only {self.slots - taken} are left")],
                    metadata={"reservation": there[0].name},
                )
        values = {
            "name": f"reservations/{uuid.uuid4()}",
            "caller": caller,
            "purpose": purpose,
            "slots": slots,
            "start_us": start_us,
            "end_us": end_us,
            "create_us": now,
        }
        return ReservationRow(**connection.execute(sa.insert(r).values(**values).returning(r)).mappings().one())

    def _check(self, slots: int, start_us: int, end_us: int) -> None:
        if slots > self.slots:
            raise _refused("slots", f"only {self.slots} may be reserved (reservations.slots, or the server's own)")
        if end_us <= start_us:
            raise _refused("end_time", "must lie in the future, and after start_time")
        if end_us - start_us > LONGEST_US:
            raise _refused("end_time", "is more than 366 days after start_time; make several reservations")

    def cancel(self, connection: sa.Connection, name: str) -> ReservationRow:
        """End a reservation, in the caller's transaction. Errors: ReservationNotFoundError."""
        now = now_us()
        query = sa.update(r).where(r.c.name == name, _is_open(now)).values(cancel_us=now).returning(r)
        return _one(name, connection.execute(query))

    def require_open(self, connection: sa.Connection, name: str) -> ReservationRow:
        """Return a reservation that has not ended. Errors: ReservationNotFoundError."""
        return _one(name, connection.execute(sa.select(r).where(r.c.name == name, _is_open(now_us()))))

    def page(self, *, include_ended: bool, before_id: int | None, limit: int) -> list[ReservationRow]:
        """Return up to `limit` reservations, newest first, that are older than `before_id`."""
        query = sa.select(r).order_by(r.c.id.desc()).limit(limit)
        if not include_ended:
            query = query.where(_is_open(now_us()))
        if before_id is not None:
            query = query.where(r.c.id < before_id)
        with self.database.read() as connection:
            return [ReservationRow(**row) for row in connection.execute(query).mappings()]

    def open(self, connection: sa.Connection, now: int) -> list[ReservationRow]:
        """Return the reservations that run or are to come, the first to begin first."""
        query = sa.select(r).where(_is_open(now)).order_by(r.c.start_us, r.c.id)
        return [ReservationRow(**row) for row in connection.execute(query).mappings()]

    def next_due(
        self, connection: sa.Connection, *, most: int | None = None, most_nodes: int | None = None
    ) -> JobRow | None:
        """Return the job that is the next to get a worker: of a running reservation, or the first that may have a slot.

        Servers take turns while there are reservations, so that no two of them fill the last slot of one.
        """
        now = now_us()
        open_ = self.open(connection, now)
        if not open_:
            return first_due(connection, most=most, most_nodes=most_nodes)
        if connection.get_execution_options().get("forge_write"):
            self.database.in_turn(connection, Turn.CAPACITY)
        held = self.held(connection)
        for one in running(open_, now):
            job = first_due(
                connection, t.jobs.c.reservation == one.name, most=_least(most, one.slots), most_nodes=most_nodes
            )
            if job is not None and held.get(one.name, 0) + job.slots <= one.slots:
                return job
        # Jobs that need more than reservations leave would stop all others until their ends.
        most = _least(most, self.slots - sum(one.slots for one in running(open_, now)))
        job = first_due(
            connection, t.jobs.c.reservation.not_in([one.name for one in open_]), most=most, most_nodes=most_nodes
        )
        return None if job is None or self.left(open_, held, now) < job.slots else job

    def held_back(self, connection: sa.Connection, jobs: Sequence[JobRow]) -> Mapping[int, HeldBack]:
        """Return which of the waiting jobs reservations keep from free slots: their own, or others."""
        now = now_us()
        open_ = {one.name: one for one in self.open(connection, now)}
        if not open_:
            return {}
        held = self.held(connection)
        left, free = self.left(list(open_.values()), held, now), self.slots - sum(held.values())
        found = {}
        for job in jobs:
            own = open_.get(job.reservation)
            if own is not None and own.start_us > now:
                found[job.id] = _told(f"its {own.name} begins at {_moment(own.start_us)}")
            elif own is not None and held.get(own.name, 0) + job.slots > own.slots:
                taken = held.get(own.name, 0)
                found[job.id] = _told(f"{taken} of the {own.slots} slots of its {own.name} are taken")
            elif own is None and free >= job.slots > left:
                names = ", ".join(
                    f"{one.name} until {_moment(one.end_us)}" for one in running(list(open_.values()), now)
                )
                found[job.id] = _told(f"the slots that are free are kept for {names[:1500]}")
        return found

    def has_room(self, connection: sa.Connection) -> bool:
        """Whether reservations leave a slot to a replay, in the transaction that gives it the slot."""
        now = now_us()
        open_ = self.open(connection, now)
        if not open_:
            return True
        self.database.in_turn(connection, Turn.CAPACITY)
        return self.left(open_, self.held(connection), now) > 0

    def held(self, connection: sa.Connection) -> dict[str, int]:
        """Return how many slots the jobs of every reservation take, by its name; "" for those of none, and replays."""
        query = sa.select(t.jobs.c.reservation, sa.func.sum(t.jobs.c.slots)).where(_HELD).group_by(t.jobs.c.reservation)
        found = {str(name): int(count) for name, count in connection.execute(query)}
        return {**found, "": found.get("", 0) + count_running(connection)}

    def left(self, open_: Sequence[ReservationRow], held: Mapping[str, int], now: int) -> int:
        """Return how many slots are free for jobs of no reservation."""
        kept = sum(max(0, one.slots - held.get(one.name, 0)) for one in running(open_, now))
        return self.slots - sum(held.values()) - kept if kept else self.slots


class RoomForReservations:
    """Asks jobs of a server to let go, where a reservation has begun, its jobs wait, and no slot is free."""

    def __init__(
        self, store: JobStore, calendar: Calendar, *, grace_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._calendar = calendar
        self._patience = yielding.Patience(grace_s, clock)

    def look(self, held: Sequence[tuple[JobRow, AttemptRow]], *, free: int) -> Sequence[tuple[JobRow, AttemptRow, str]]:
        """Ask as many workers to let go as are needed; return those that would not.

        free: slots of this server that nobody takes, too few for the jobs that wait.
        """
        with self._store.database.read() as connection:
            wanted, names = self._wanted(connection)
        if wanted:
            missing = wanted - free - sum(job.slots for job, _ in yielding.being_asked(held))
            for job in yielding.candidates(held):
                if missing <= 0:
                    break
                if job.reservation in names:
                    continue
                missing -= job.slots
                with self._store.database.write() as connection:
                    message = f"makes room for {', '.join(sorted(names))}"[:1500]
                    if yielding.ask(self._store, connection, job, kind="preempted", message=message, facts={}):
                        log.info("job asked to make room", job=job.name)
        return self._patience.spent(held)

    def _wanted(self, connection: sa.Connection) -> tuple[int, set[str]]:
        """Return how many slots of running reservations their jobs wait for, and which reservations run."""
        now = now_us()
        held, wanted, names = self._calendar.held(connection), 0, set()
        for one in running(self._calendar.open(connection, now), now):
            asked = sa.func.coalesce(sa.func.sum(t.jobs.c.slots), 0)
            query = sa.select(asked).where(is_due(), t.jobs.c.reservation == one.name, t.jobs.c.slots <= one.slots)
            wanted += min(max(0, one.slots - held.get(one.name, 0)), int(connection.execute(query).scalar_one()))
            names.add(one.name)
        return wanted, names


def _least(most: int | None, slots: int) -> int:
    return slots if most is None else min(most, slots)


def running(open_: Sequence[ReservationRow], now: int) -> list[ReservationRow]:
    """Return those of the open reservations that have begun."""
    return [one for one in open_ if one.start_us <= now]


def _is_open(now: int) -> sa.ColumnElement[bool]:
    return r.c.cancel_us.is_(None) & (r.c.end_us > now)


def _one(name: str, result: sa.CursorResult[Any]) -> ReservationRow:
    row = result.mappings().one_or_none()
    if row is None:
        raise ReservationNotFoundError(
            f"{name} is no reservation, or it is over; list the reservations to see what there is"
        )
    return ReservationRow(**row)


def _told(message: str) -> HeldBack:
    return HeldBack(reason=WaitReason.RESERVED, message=message)


def _refused(field: str, rule: str) -> InvalidFieldError:
    return InvalidFieldError(f"{field} {rule}", violations=[FieldViolation(field=field, description=rule)])


def _moment(time_us: int) -> str:
    """Return a time to the second, as people and RFC 3339 write it."""
    return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
