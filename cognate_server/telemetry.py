"""What Cognate tells of itself beside what both services tell: leases of its capacity, and its outbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import sqlalchemy as sa

from cognate_server import tables as t
from cognate_server.leases import LeaseState, LeaseStore, Resource
from cognate_server.recovery import LADDER
from training_common.recovery import RETURN
from training_common.store.database import now_us
from training_common.store.tables import artifact_events
from training_common.telemetry.readings import Reading

# What the recovery manager may do about what.
RECOVERIES = (*((str(d), str(a)) for d, actions in LADDER.items() for a in dict.fromkeys(actions)), ("", RETURN))
_HOW = ("released", "expired", "revoked")


class LeaseReadings:
    """Leases as they stand, and how those ended that ended since the start."""

    def __init__(self, leases: LeaseStore) -> None:
        self._leases = leases
        # Revisions are taken one after the other, so none appears before an earlier one.
        self._after: int | None = None
        self._ended = dict.fromkeys(_HOW, 0)

    def read(self, connection: sa.Connection) -> Iterator[Reading]:
        """Yield what there is to tell."""
        now = now_us()
        for kind in Resource:
            active = self._leases.active(connection, kind, now)
            yield Reading("forge_leases", len(active), (kind.value,))
            yield Reading("forge_leased", sum(lease.amount for lease in active), (kind.value,))
        self._count_ended(connection)
        for how, count in self._ended.items():
            yield Reading("forge_leases_ended_total", count, (how,))

    def _count_ended(self, connection: sa.Connection) -> None:
        c = t.leases.c
        newest = int(connection.execute(sa.select(t.lease_clock.c.revision)).scalar_one())
        if self._after is not None:
            query = (
                sa.select(c.end_reason, sa.func.count())
                .where(c.revision > self._after, c.revision <= newest, c.state == LeaseState.ENDED.value)
                .group_by(c.end_reason)
            )
            for how, count in connection.execute(query):
                self._ended[how] += count
        self._after = newest


def outbox(slowest: Callable[[], int | None]) -> Callable[[sa.Connection], Iterator[Reading]]:
    """Return what reads the outbox. slowest: returns what the slowest watcher has been sent, None without watchers."""

    def read(connection: sa.Connection) -> Iterator[Reading]:
        sequence = artifact_events.c.sequence
        newest, oldest = connection.execute(sa.select(sa.func.max(sequence), sa.func.min(sequence))).one()
        yield Reading("forge_outbox_events", newest - oldest + 1 if newest else 0)
        sent = slowest()
        yield Reading("forge_outbox_lag_events", 0 if sent is None else max(0, (newest or 0) - sent))

    return read
