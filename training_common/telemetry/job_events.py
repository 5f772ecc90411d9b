"""Counts what the events of jobs tell: jobs that ended, workers that were lost, recoveries, waits in the queue.

Workers write events themselves, so a server learns of them by reading. Each server counts every event of the store that
it has seen since it started, whoever wrote it, once.
"""

from __future__ import annotations

import sqlalchemy as sa

from training_common.jobs.states import FINAL
from training_common.store import tables as t
from training_common.store.database import Database, now_us
from training_common.telemetry.instruments import Instruments

_KINDS = ("state_change", "attempt_started", "note")
_BATCH = 1000
# Where several transactions write at once, a key may become visible after a higher one. A transaction that does nothing
# for 30 s is ended by the store; those of events take milliseconds.
_LATE_US = 60_000_000


class JobEvents:
    """Reads events on from where it stands. One call at a time."""

    def __init__(self, database: Database, instruments: Instruments) -> None:
        self._database = database
        self._instruments = instruments
        # All up to this key have been counted, and of the later ones those that are in `_counted`.
        self._after: int | None = None
        self._counted: dict[int, int] = {}

    def start(self, connection: sa.Connection) -> None:
        """Stand at the store's newest event: what was before is not counted."""
        newest = sa.select(sa.func.coalesce(sa.func.max(t.events.c.id), 0))
        self._after = int(connection.execute(newest).scalar_one())

    def count_new(self, connection: sa.Connection) -> None:
        """Count what is new."""
        if self._after is None:
            self.start(connection)
            return
        newest = int(connection.execute(sa.select(sa.func.coalesce(sa.func.max(t.events.c.id), 0))).scalar_one())
        after = self._after
        while rows := self._read(connection, after):
            for row in rows:
                after = row["id"]
                if after not in self._counted:
                    self._counted[after] = row["time_us"]
                    self._count(row)
        self._move_on(connection, newest)

    def _read(self, connection: sa.Connection, after: int) -> list[sa.RowMapping]:
        e, j = t.events.c, t.jobs.c
        query = (
            sa.select(e.id, e.time_us, e.kind, e.payload, j.create_us, j.failure_reason)
            .join(t.jobs, j.id == e.job_id)
            .where(e.id > after, e.kind.in_(_KINDS))
            .order_by(e.id)
            .limit(_BATCH)
        )
        return list(connection.execute(query).mappings())

    def _move_on(self, connection: sa.Connection, newest: int) -> None:
        """Forget what no late event can stand before any more."""
        if connection.dialect.name == "sqlite":  # one writer at a time: keys come in the order of the commits
            self._after, self._counted = newest, {}
            return
        before = now_us() - _LATE_US
        e = t.events.c
        # The newest one of those that are old enough; an index of keys is read backwards up to it.
        query = sa.select(e.id).where(e.id > (self._after or 0), e.time_us < before).order_by(e.id.desc()).limit(1)
        settled = connection.execute(query).scalar()
        if settled is not None:
            self._after = int(settled)
            self._counted = {key: time_us for key, time_us in self._counted.items() if key > settled}

    def _count(self, row: sa.RowMapping) -> None:
        facts = row["payload"]
        if row["kind"] == "attempt_started":
            if facts["attempt"] == 1:
                self._instruments.queue_left(max(0, row["time_us"] - row["create_us"]) / 1e6)
        elif row["kind"] == "note":
            if facts["kind"] == "recovery":
                self._instruments.recovered(facts["facts"].get("detector", ""), facts["facts"].get("action", ""))
        else:
            if facts.get("lost"):
                self._instruments.attempt_lost()
            if facts["to"] in FINAL:
                reason = row["failure_reason"] if facts["to"] == "FAILED" else ""
                self._instruments.job_ended(facts["to"], reason)
