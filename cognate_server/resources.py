"""What this host has, what of it Cognate's jobs hold, and what is lent while they leave it idle.

ADR 0005: this capacity is Cognate's own. The other service sees it through the exchange only, borrows what is idle, and
gives it back when a job of ours needs it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import sqlalchemy as sa
import structlog

from cognate_server.leases import LeaseRow, LeaseState, LeaseStore, Resource
from cognate_server.settings import LendingSettings
from training_common.engines.processes import find
from training_common.jobs.states import HELD
from training_common.jobs.store import JobRow, JobStore
from training_common.jobs.verifications import count_running
from training_common.settings import WorkerSettings
from training_common.store.database import Turn, now_us

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """One resource, in cores, bytes or devices.

    total: what this host has. held: by our jobs and verifications. lent: by leases that have not ended. available: what
    a lease can have now, which is neither held, nor lent, nor about to be taken by a waiting job, nor kept back by the
    settings.
    """

    kind: Resource
    total: int
    held: int
    lent: int
    available: int


@dataclass(frozen=True, kw_only=True)
class Availability:
    """This host's resources, and how many jobs use or want them."""

    amounts: tuple[Amounts, ...]
    running_jobs: int
    queued_jobs: int


class CognateResourceManager:
    """The capacity of Cognate's host."""

    def __init__(
        self, store: JobStore, leases: LeaseStore, *, workers: WorkerSettings, lending: LendingSettings
    ) -> None:
        self.database = store.database
        self.leases = leases
        self._store = store
        self._workers = workers
        self._lending = lending
        self._keep = {
            Resource.CPU: lending.keep_cores,
            Resource.MEMORY: lending.keep_memory_bytes,
            Resource.GPU: lending.keep_gpus,
        }

    def availability(self) -> Availability:
        """Measure now. Cores held are those that workers were given; memory is what their processes occupy."""
        now = now_us()
        with self.database.read() as connection:
            amounts = []
            for kind in Resource:
                lent = self.leases.lent(connection, kind, now)
                amounts.append(
                    Amounts(
                        kind=kind,
                        total=self._total(kind),
                        held=self._own(connection, kind),
                        lent=lent,
                        available=max(0, self._lendable(connection, kind) - lent),
                    )
                )
            running, waiting = self._running(connection), self._store.due(connection)
        return Availability(
            amounts=tuple(amount for amount in amounts if amount.total), running_jobs=running, queued_jobs=waiting
        )

    def acquire(self, connection: sa.Connection, *, holder: str, kind: Resource, amount: int, ttl_s: float) -> LeaseRow:
        """Lend an amount that is idle, in the caller's transaction. Errors: CapacityTakenError."""
        self.database.in_turn(connection, Turn.CAPACITY)
        return self.leases.acquire(
            connection,
            holder=holder,
            kind=kind,
            amount=amount,
            available=self._lendable(connection, kind),
            ttl_us=self._ttl_us(ttl_s),
        )

    def renew(self, connection: sa.Connection, name: str, *, holder: str, token: int, ttl_s: float) -> LeaseRow:
        """Keep a lease for longer, in the caller's transaction. Errors: LeaseNotFoundError, LeaseEndedError."""
        return self.leases.renew(connection, name, holder=holder, token=token, ttl_us=self._ttl_us(ttl_s))

    def make_room(self, connection: sa.Connection, job: JobRow) -> str:
        """Return what keeps a job from a free slot, in words, or nothing; in the transaction that gives it the slot.

        While what it needs is lent, ask for it back, and say so in the job.
        """
        self.database.in_turn(connection, Turn.CAPACITY)
        now = now_us()
        lent = self.leases.active(connection, Resource.CPU, now)
        missing = self._missing(connection, lent, job.slots)
        if missing <= 0:
            return ""
        wanted = f"{missing} cores are missing, which are lent to {', '.join(sorted({one.holder for one in lent}))}"
        missing -= sum(one.amount for one in lent if one.state is LeaseState.REVOKING)
        for lease in lent:
            if missing <= 0:
                break
            if lease.state is LeaseState.ACTIVE:
                revoked = self.leases.revoke(connection, lease, grace_us=round(self._lending.grace_s * 1e6))
                missing -= lease.amount
                self._tell(connection, job.id, revoked, now)
        return f"{wanted}, and were asked back"

    def has_room(self, connection: sa.Connection) -> bool:
        """Whether a replay finds its cores, in the transaction that gives it a slot. None are asked back for it."""
        self.database.in_turn(connection, Turn.CAPACITY)
        return self._missing(connection, self.leases.active(connection, Resource.CPU, now_us()), 1) <= 0

    def _missing(self, connection: sa.Connection, lent: Sequence[LeaseRow], slots: int) -> int:
        """Return how many of the cores that so many slots take are lent; none or fewer where nothing is missing."""
        if not lent:
            return 0
        total = self._total(Resource.CPU)
        free = total - self._own(connection, Resource.CPU) - sum(one.amount for one in lent)
        return min(total, slots * self._cores_per_slot()) - free

    def _tell(self, connection: sa.Connection, job_id: int, lease: LeaseRow, now: int) -> None:
        left_s = max(0.0, (lease.until_us - now) / 1e6)
        message = f"waits up to {left_s:.0f} s for {lease.amount} cores that are lent to {lease.holder}"
        self._store.note(connection, job_id, "waiting_for_capacity", message, {"lease": lease.name})
        log.info("lease revoked", lease=lease.name, holder=lease.holder, grace_s=self._lending.grace_s)

    def _lendable(self, connection: sa.Connection, kind: Resource) -> int:
        """Return what could be lent if nothing were lent yet."""
        own = self._own(connection, kind) + self._wanted(connection, kind)
        return self._total(kind) - self._keep[kind] - own

    def _ttl_us(self, ttl_s: float) -> int:
        return round(min(ttl_s, self._lending.longest_ttl_s) * 1e6)

    def _total(self, kind: Resource) -> int:
        if kind is Resource.CPU:
            return os.cpu_count() or 1
        if kind is Resource.MEMORY:
            return int(psutil.virtual_memory().total)
        return found_gpus() if self._lending.gpus is None else self._lending.gpus

    def _cores_per_slot(self) -> int:
        if self._workers.engine != "local":
            return 0  # of this host
        return self._workers.threads or self._total(Resource.CPU)

    def _running(self, connection: sa.Connection) -> int:
        return sum(self._store.counts(connection, HELD).values())

    def _slots_used(self, connection: sa.Connection) -> int:
        return self._store.held_slots(connection) + count_running(connection)

    def _own(self, connection: sa.Connection, kind: Resource) -> int:
        """Return what our jobs hold. They use no graphics processor: the trainer runs on processor cores."""
        if kind is Resource.CPU:
            return min(self._total(kind), self._slots_used(connection) * self._cores_per_slot())
        if kind is Resource.MEMORY:
            return sum(_resident_bytes(handle) for handle in self._store.held_handles(connection))
        return 0

    def _wanted(self, connection: sa.Connection, kind: Resource) -> int:
        """Return what our waiting jobs are about to take. Memory is known only once they run."""
        if kind is not Resource.CPU:
            return 0
        free_slots = max(0, self._workers.slots - self._slots_used(connection))
        return min(free_slots, self._store.due_slots(connection)) * self._cores_per_slot()


def found_gpus() -> int:
    """Return how many graphics processors the kernel shows."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _resident_bytes(handle: str) -> int:
    """Return what a worker's processes occupy; 0 for one that ended meanwhile or has not registered yet."""
    process = find(handle) if handle else None
    if process is None:
        return 0
    try:
        processes = [process, *process.children(recursive=True)]
        return sum(one.memory_info().rss for one in processes)
    except psutil.NoSuchProcess:
        return 0
