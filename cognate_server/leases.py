"""Leases of Cognate's capacity, as rows: who has borrowed what, until when, under which fencing token.

Every change takes a number from one row first, which orders all changes on any database: of those who want the same
capacity at once, each sees what the ones before it have taken. A lease ends at its time whether or not anybody writes
that down: every query compares with the clock, and `end_overdue` only tells those who watch.
"""

from __future__ import annotations

import asyncio
import enum
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

import sqlalchemy as sa
import structlog

from cognate_server import tables as t
from cognateforge.exceptions import CapacityTakenError, LeaseEndedError, LeaseNotFoundError
from training_common.store.database import Database, now_us

log = structlog.get_logger(__name__)

_LOOK_EVERY_S = 0.5


class Resource(enum.StrEnum):
    """What can be borrowed. The names are those of cognateforge.exchange.v1.ResourceKind."""

    CPU = "CPU"
    MEMORY = "MEMORY"
    GPU = "GPU"


class LeaseState(enum.StrEnum):
    """What a lease stands at. The names are those of cognateforge.exchange.v1.LeaseState."""

    ACTIVE = "ACTIVE"
    REVOKING = "REVOKING"
    ENDED = "ENDED"


@dataclass(frozen=True, kw_only=True)
class LeaseRow:
    """A lease as stored. Times in microseconds since 1970."""

    id: int
    name: str
    holder: str
    kind: Resource
    amount: int
    state: LeaseState
    fencing_token: int
    revision: int
    create_us: int
    expire_us: int
    revoke_us: int | None
    end_us: int | None
    end_reason: str

    @property
    def until_us(self) -> int:
        """When it ends unless it is renewed."""
        return self.expire_us if self.revoke_us is None else min(self.expire_us, self.revoke_us)

    def remaining_us(self, now: int) -> int:
        """Return what is left of it."""
        return 0 if self.state is LeaseState.ENDED else max(0, self.until_us - now)


def _row(row: sa.RowMapping) -> LeaseRow:
    return LeaseRow(**{**row, "kind": Resource(row["kind"]), "state": LeaseState(row["state"])})


def _until() -> sa.ColumnElement[int]:
    c = t.leases.c
    return sa.case((c.revoke_us.is_not(None) & (c.revoke_us < c.expire_us), c.revoke_us), else_=c.expire_us)


class LeaseStore:
    """What becomes of leases. Methods that take a connection are part of the caller's transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def acquire(
        self, connection: sa.Connection, *, holder: str, kind: Resource, amount: int, available: int, ttl_us: int
    ) -> LeaseRow:
        """Lend an amount. available: idle and lendable, before anything that is lent. Errors: CapacityTakenError."""
        revision, now = self._next(connection), now_us()
        lent = self.lent(connection, kind, now)
        free = max(0, available - lent)
        if amount > free:
            raise CapacityTakenError(
                f"{amount} of {kind} cannot be borrowed now, but {free}: GetAvailability tells when there is more",
                metadata={"available": str(free)},
            )
        values = {
            "name": f"leases/{uuid.uuid4()}",
            "holder": holder,
            "kind": kind.value,
            "amount": amount,
            "state": LeaseState.ACTIVE.value,
            "fencing_token": revision,
            "revision": revision,
            "create_us": now,
            "expire_us": now + ttl_us,
        }
        return _row(connection.execute(sa.insert(t.leases).values(**values).returning(t.leases)).mappings().one())

    def renew(self, connection: sa.Connection, name: str, *, holder: str, token: int, ttl_us: int) -> LeaseRow:
        """Keep a lease for longer. One that is being revoked stays as it is.

        Errors: LeaseNotFoundError, LeaseEndedError.
        """
        revision, now = self._next(connection), now_us()
        lease = self._own(connection, name, holder=holder, token=token, now=now)
        if lease.state is LeaseState.ENDED:
            raise _ended(lease)
        if lease.state is LeaseState.REVOKING:
            return lease
        # A shorter ttl than what is left shortens nothing: another renewal may be on its way.
        return self._change(connection, lease, revision, expire_us=max(lease.expire_us, now + ttl_us))

    def release(self, connection: sa.Connection, name: str, *, holder: str, token: int) -> LeaseRow:
        """End a lease. One that has ended stays as it is. Errors: LeaseNotFoundError; LeaseEndedError, wrong token."""
        revision, now = self._next(connection), now_us()
        lease = self._own(connection, name, holder=holder, token=token, now=now)
        if lease.state is LeaseState.ENDED:
            return lease
        return self._change(
            connection, lease, revision, state=LeaseState.ENDED.value, end_us=now, end_reason="released"
        )

    def find(self, name: str, holder: str) -> LeaseRow:
        """Return a lease of a holder. Errors: LeaseNotFoundError."""
        with self.database.read() as connection:
            return self._as_of(self._of(connection, name, holder), now_us())

    def active(self, connection: sa.Connection, kind: Resource, now: int) -> list[LeaseRow]:
        """Return what is lent of a resource, newest first."""
        query = (
            sa.select(t.leases)
            .where(t.leases.c.kind == kind.value, t.leases.c.state != LeaseState.ENDED.value, _until() > now)
            .order_by(t.leases.c.id.desc())
        )
        return [_row(row) for row in connection.execute(query).mappings()]

    def lent(self, connection: sa.Connection, kind: Resource, now: int) -> int:
        """Return how much of a resource is lent."""
        return sum(lease.amount for lease in self.active(connection, kind, now))

    def revoke(self, connection: sa.Connection, lease: LeaseRow, *, grace_us: int) -> LeaseRow:
        """Ask for a lease back. Its borrower has the grace to let go, or what is left of the lease if that is less."""
        revoke = now_us() + grace_us
        return self._change(
            connection, lease, self._next(connection), state=LeaseState.REVOKING.value, revoke_us=revoke
        )

    def end_overdue(self) -> int:
        """Write down which leases have ended by now, for those who watch. Returns how many."""
        due = (t.leases.c.state != LeaseState.ENDED.value) & (_until() <= now_us())
        with self.database.read() as connection:
            if connection.execute(sa.select(t.leases.c.id).where(due).limit(1)).first() is None:
                return 0
        with self.database.write() as connection:
            revision = self._next(connection)
            rows = [_row(row) for row in connection.execute(sa.select(t.leases).where(due)).mappings()]
            for lease in rows:
                reason = "expired" if lease.state is LeaseState.ACTIVE else "revoked"
                self._change(
                    connection, lease, revision, state=LeaseState.ENDED.value, end_us=lease.until_us, end_reason=reason
                )
            return len(rows)

    def progress(self) -> int:
        """Return a number that changes when any lease may have changed."""
        with self.database.read() as connection:
            newest = connection.execute(sa.select(sa.func.max(t.leases.c.revision))).scalar() or 0
            return self.database.progress(connection, newest)

    def _own(self, connection: sa.Connection, name: str, *, holder: str, token: int, now: int) -> LeaseRow:
        lease = self._of(connection, name, holder)
        if lease.fencing_token != token:
            raise LeaseEndedError(
                f"fencing token {token} is not that of {name}, and nothing was changed: give AcquireLease's own"
            )
        return self._as_of(lease, now)

    @staticmethod
    def _as_of(lease: LeaseRow, now: int) -> LeaseRow:
        """Return a lease as ENDED when its time is over, whether or not that has been written down."""
        if lease.state is not LeaseState.ENDED and lease.until_us <= now:
            return replace(lease, state=LeaseState.ENDED)
        return lease

    @staticmethod
    def _of(connection: sa.Connection, name: str, holder: str) -> LeaseRow:
        query = sa.select(t.leases).filter_by(name=name, holder=holder)
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise LeaseNotFoundError(f"{holder} has no lease {name}: acquire one, and give its name as it was returned")
        return _row(row)

    @staticmethod
    def _next(connection: sa.Connection) -> int:
        """Take the next number, and with it the turn: others wait until this transaction has ended."""
        statement = sa.update(t.lease_clock).values(revision=t.lease_clock.c.revision + 1)
        return int(connection.execute(statement.returning(t.lease_clock.c.revision)).scalar_one())

    @staticmethod
    def _change(connection: sa.Connection, lease: LeaseRow, revision: int, **values: object) -> LeaseRow:
        statement = sa.update(t.leases).filter_by(id=lease.id).values(revision=revision, **values)
        return _row(connection.execute(statement.returning(t.leases)).mappings().one())


def _ended(lease: LeaseRow) -> LeaseEndedError:
    return LeaseEndedError(
        f"{lease.name} has ended: stop using its {lease.amount} of {lease.kind}, and acquire another one"
    )


async def end_leases(leases: LeaseStore, wake: Callable[[], None]) -> None:
    """Write down ended leases, until cancelled, and wake what may wait for their capacity."""
    while True:
        try:
            if await leases.database.run_write(leases.end_overdue):
                wake()
        except Exception as error:  # the store is away or busy: health tells, and the next round tries again
            log.warning("leases not looked at", error=f"{type(error).__name__}: {error}")
        await asyncio.sleep(_LOOK_EVERY_S)
