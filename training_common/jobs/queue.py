"""The order in which waiting jobs get workers.

A job's place is the moment of its submission, moved forward by an hour for each point of priority. So the place never
changes, and nothing waits for ever: jobs that come later than the difference of the priorities cannot pass.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from training_common.compute import share_of
from training_common.store import tables as t
from training_common.store.database import now_us

# Pauses of a job that waits for something, or whose workers are ended again and again: 2, 4, 8 s and so on, each
# shortened by up to half so that jobs do not come back together. A minute is about what the start of a worker is worth:
# torch alone takes seconds to import.
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 60.0
# What a point of priority is worth: an hour of waiting.
POINT_US = 3_600_000_000
ORDER = (t.jobs.c.queue_us, t.jobs.c.id)
# A job that another one makes room for goes first until it has a worker: its place is before every usual one, all of
# which are above 0, and among such jobs as before.
CLAIM_US = 1 << 60
# So does one whose turn came while too few slots were free for its processes: small ones would pass it for ever. It may
# still have others make room, and stands behind those that have.
HOLD_US = 1 << 59


def place_us(create_us: int, priority: int) -> int:
    """Return the place of a job that waits. The lowest goes first."""
    return create_us - priority * POINT_US


@dataclass(frozen=True, kw_only=True)
class Scheduling:
    """When a job runs, beside the others. Times in microseconds since 1970; None where there is no deadline."""

    priority: int = 0
    start_by_us: int | None = None
    finish_by_us: int | None = None

    def columns(self, create_us: int) -> dict[str, int | None]:
        """Return what a new job's row says of it."""
        deadlines = [time for time in (self.start_by_us, self.finish_by_us) if time is not None]
        return {
            "priority": self.priority,
            "queue_us": place_us(create_us, self.priority),
            "start_by_us": self.start_by_us,
            "finish_by_us": self.finish_by_us,
            "deadline_us": min(deadlines, default=None),
        }


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a job takes while it runs, and whose share that counts for. cores, memory_bytes: of its server's machine."""

    tenant: str = ""
    processes: int = 1
    nodes: int = 1
    cores: int = 0
    memory_bytes: int = 0

    @property
    def slots(self) -> int:
        """Each process on the server's machine takes a slot."""
        return share_of(self.processes, self.nodes, 0)


USUAL = Scheduling()
NOBODYS = Demand()


def latest_pause_us(now: int) -> int:
    """Return a moment beyond which nothing waits: what is later was written before the clock was set back."""
    return now + round(2e6 * LONGEST_WAIT_S)


def is_due() -> sa.ColumnElement[bool]:
    """Whether a job waits for nothing but a worker."""
    now = now_us()
    not_before = t.jobs.c.not_before_us
    in_time = (not_before <= now) | (not_before > latest_pause_us(now))
    return t.jobs.c.queue_us.is_not(None) & in_time


def positions(connection: sa.Connection, ids: Collection[int]) -> dict[int, int]:
    """Return the places in the queue, from 1, of those of the jobs that are in it.

    Jobs of one tenant are counted among themselves, and so are those of one reservation: others do not stand before
    them.
    """
    queues = (t.jobs.c.tenant, t.jobs.c.reservation)
    place = sa.func.row_number().over(partition_by=queues, order_by=ORDER).label("place")
    queue = sa.select(t.jobs.c.id, place).where(is_due()).subquery()
    rows = connection.execute(sa.select(queue.c.id, queue.c.place).where(queue.c.id.in_(ids)))
    return {row.id: row.place for row in rows}
