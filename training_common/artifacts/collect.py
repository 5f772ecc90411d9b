"""Removing what is no longer kept: versions first, as rows, then the stored bytes that no version names any more.

A collected version keeps its row, so its name is not given again. Its bytes go afterwards, a few in each transaction:
whoever publishes takes the same turn and looks there whether the bytes that it found stored still are. What a cut
leaves behind is found by the next pass: bytes are kept because a version names them, and for no other reason.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sa
import structlog

from training_common.artifacts.blobs import StoredBlob
from training_common.artifacts.keeping import ArtifactKeeper, LiveFiles
from training_common.artifacts.registry import ArtifactRow
from training_common.jobs.age_clock import AgeClock
from training_common.store import tables as t
from training_common.store.database import Turn, now_us

log = structlog.get_logger(__name__)
T = TypeVar("T")

# The contract's bound on CollectArtifactsResponse.collected.
MOST = 100
# Nothing is due to the minute. The first pass waits until a server that has just started is at rest.
INTERVAL_S, FIRST_S = 3600.0, 60.0
_DAY_US, _HOUR_US = 86_400 * 10**6, 3600 * 10**6
# Files that are removed in one transaction: publishers wait meanwhile, some milliseconds with a folder.
_REMOVED = 16


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a collection starts from. versions: those that retention keeps no longer, with why. old_blobs: old bytes."""

    versions: tuple[tuple[ArtifactRow, str], ...]
    files: LiveFiles
    old_blobs: tuple[StoredBlob, ...]


@dataclass(kw_only=True)
class Collected:
    """What was removed by this server since its start."""

    versions: int = 0
    blobs: int = 0
    size_bytes: int = 0
    manifests: int = 0


class ArtifactCollector:
    """Applies the retention of artifacts.

    clock: microseconds since 1970, or None while nobody can tell; by default the wall clock, doubted when it jumps.
    """

    def __init__(self, keeper: ArtifactKeeper, *, clock: Callable[[], int | None] | None = None) -> None:
        self._keeper = keeper
        self._registry = keeper.registry
        self._database = keeper.registry.database
        self._settings = keeper.settings
        self._clock = AgeClock(self._database) if clock is None else clock
        self._stop = threading.Event()
        self.collected = Collected()

    async def run(self) -> None:
        """Apply it now and then, until cancelled. What cannot be removed is tried again by the next pass."""
        await asyncio.sleep(FIRST_S)
        try:
            while True:
                try:
                    await asyncio.to_thread(self.apply)
                except Exception as error:  # the store is away or busy
                    log.warning("artifacts not looked after", error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(INTERVAL_S)
        finally:
            self._stop.set()

    def apply(self) -> None:
        """Archive and collect what the settings say, and bring bytes to where they belong."""
        now = self._clock()
        if now is not None:
            if self._settings.archive_after_days and self._registry.blobs.archives:
                self._keeper.archive_old(now - round(self._settings.archive_after_days * _DAY_US))
            while (chosen := self._expired(now)) and not self._stop.is_set():
                with self._database.write() as connection:
                    gone = self.mark(connection, chosen)
                self.told(gone)
                if not gone:
                    break
            self.sweep()
        self._keeper.settle()

    # --- versions

    def plan(self, *, versions: bool = True) -> Plan:
        """Look for what to remove, and remove nothing. versions: whether to look for what retention keeps no longer."""
        now = self._clock()
        return Plan(
            versions=tuple(self._expired(now)) if versions else (),
            files=LiveFiles(self._registry),
            old_blobs=tuple(self._old_blobs(now)),
        )

    def _expired(self, now: int | None) -> list[tuple[ArtifactRow, str]]:
        """Return up to MOST versions that retention keeps no longer, oldest first, with why."""
        days = self._settings.collect_after_days
        if now is None or not days:
            return []
        why = f"it is older than {days:g} days (setting artifacts.collect_after_days) and nothing depends on it"
        older = self._keeper.older(now - round(days * _DAY_US))
        return [(row, why) for row in itertools.islice(older, MOST)]

    def mark(self, connection: sa.Connection, versions: Sequence[tuple[ArtifactRow, str]]) -> list[ArtifactRow]:
        """Collect versions on which nothing depends, in the caller's transaction, and return them.

        What came to depend on one since it was chosen keeps it.
        """
        self._database.in_turn(connection, Turn.PUBLISH)
        keys = [row.id for row, _ in versions]
        query = sa.select(t.artifacts).where(t.artifacts.c.id.in_(keys), t.artifacts.c.collect_us.is_(None))
        rows = [ArtifactRow(**row) for row in connection.execute(query.order_by(t.artifacts.c.id)).mappings()]
        why = self._keeper.in_use(connection, rows)
        free = [row for row in rows if row.id not in why]
        for row in free:
            self._registry.tell(connection, row.id, "collected")
        gone = sa.update(t.artifacts).where(t.artifacts.c.id.in_([row.id for row in free]))
        connection.execute(gone.values(collect_us=now_us()))
        self._keeper.holds.collected(connection, free)
        return free

    def told(self, rows: Sequence[ArtifactRow]) -> None:
        """Count and log versions whose collection is committed."""
        self.collected.versions += len(rows)
        if rows:
            log.info("versions collected", versions=[row.name for row in rows])

    # --- bytes

    def unnamed(self, plan: Plan, without: Sequence[ArtifactRow] = ()) -> list[StoredBlob]:
        """Return the old bytes that no version names once some versions are gone."""
        freed = plan.files.without(without)
        return [blob for blob in plan.old_blobs if blob.digest not in plan.files.named or blob.digest in freed]

    def sweep(self) -> None:
        """Remove bytes and manifests that no version names and that are old enough.

        Bytes of a publication under way are young: publishing takes minutes, and their age is counted in hours.
        """
        before = Collected(**vars(self.collected))
        files, now = LiveFiles(self._registry), self._clock()
        old = (blob for blob in self._old_blobs(now) if blob.digest not in files.named)
        for some in _batches(old, _REMOVED):
            if self._stop.is_set():
                return
            with self._database.write() as connection:
                self._database.in_turn(connection, Turn.PUBLISH)
                files.refresh(connection)
                for blob in some:
                    if blob.digest not in files.named:
                        self._registry.blobs.delete(blob.digest)
                        self.collected.blobs += 1
                        self.collected.size_bytes += blob.size_bytes
        self._sweep_manifests(now)
        if self.collected != before:
            log.info("unnamed bytes removed", **vars(self.collected))

    def _sweep_manifests(self, now: int | None) -> None:
        """Remove stored manifests that were never published, or whose version is collected."""
        if now is None:
            return
        cutoff = now - round(self._settings.orphan_hours * _HOUR_US)
        old = (one for one in self._registry.blobs.manifests() if one.modified_us < cutoff)
        for some in _batches(old, _REMOVED * 16):
            keys = [(one.family, one.version) for one in some]
            live = sa.select(t.artifacts.c.family, t.artifacts.c.version).where(
                sa.tuple_(t.artifacts.c.family, t.artifacts.c.version).in_(keys), t.artifacts.c.collect_us.is_(None)
            )
            with self._database.read() as connection:
                named = {tuple(key) for key in connection.execute(live)}
            if len(named) == len(keys) or self._stop.is_set():
                continue
            with self._database.write() as connection:
                self._database.in_turn(connection, Turn.PUBLISH)
                named = {tuple(key) for key in connection.execute(live)}
                for family, version in set(keys) - named:
                    self._registry.blobs.delete_manifest(family, version)
                    self.collected.manifests += 1

    def _old_blobs(self, now: int | None) -> Iterator[StoredBlob]:
        if now is not None:
            cutoff = now - round(self._settings.orphan_hours * _HOUR_US)
            yield from (blob for blob in self._registry.blobs.blobs() if blob.modified_us < cutoff)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while some := list(itertools.islice(left, size)):
        yield some
