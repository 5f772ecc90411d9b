"""What the store says of a service at this moment, read in one transaction for each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import sqlalchemy as sa

from training_common.store.database import Database
from training_common.telemetry.instruments import Instruments
from training_common.telemetry.job_events import JobEvents
from training_common.telemetry.readings import Reading

# Reads one part of a service's state.
Part = Callable[[sa.Connection], Iterable[Reading]]


class StoreState:
    """Reads the parts, and counts on the way what has happened to jobs. One call at a time."""

    def __init__(self, database: Database, instruments: Instruments, parts: Sequence[Part]) -> None:
        self._database = database
        self._instruments = instruments
        self._events = JobEvents(database, instruments)
        self._parts = parts

    def read(self) -> list[Reading]:
        """Return all parts' readings. Errors: those of a store that is away."""
        self._database.ping()  # SQLite goes on with an open file that is gone
        if not self._instruments.store_takes_writes:
            self._try_to_write()
        with self._database.read() as connection:
            self._events.count_new(connection)
            return [reading for part in self._parts for reading in part(connection)]

    def _try_to_write(self) -> None:
        """Write a row as it is: where nothing else is written, nobody would learn that the store takes writes again."""
        revision = sa.table("alembic_version", sa.column("version_num"))
        with self._database.write() as connection:
            connection.execute(sa.update(revision).values(version_num=revision.c.version_num))
