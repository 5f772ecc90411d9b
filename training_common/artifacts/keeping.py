"""How published versions are kept: held for good, moved between store and archive, and what must stay.

What a version is never changes; pin, tier and damage are columns beside its manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

import sqlalchemy as sa
import structlog

from cognateforge.exceptions import ArtifactCorruptError, ArtifactInUseError, FieldViolation, IllegalTransitionError
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.settings import ArtifactSettings
from training_common.store import tables as t
from training_common.store.database import Turn

log = structlog.get_logger(__name__)

STANDARD, ARCHIVE = "STANDARD", "ARCHIVE"
# Manifests that are read at once: about 1 MiB each at most, some kilobytes mostly.
_BATCH = 200


class Holds(Protocol):
    """What of a service depends on versions. Its methods work in the caller's transaction."""

    def reasons(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> Mapping[int, str]:
        """Return by id what depends on a version, and what would end that, for those on which anything does."""

    def counts(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> Mapping[int, int]:
        """Return by id how many artifacts and jobs descend from a version, for those from which any do."""

    def collected(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> None:
        """Write down what follows from the end of these versions."""


class ArtifactKeeper:
    """Pins and tiers of one service's versions. find: returns a version by its name, or raises the service's error."""

    def __init__(
        self,
        registry: ArtifactRegistry,
        settings: ArtifactSettings,
        holds: Holds,
        find: Callable[[ArtifactRegistry, str], ArtifactRow],
    ) -> None:
        self.registry = registry
        self.settings = settings
        self.holds = holds
        self.find = find

    def lock(self, connection: sa.Connection, names: Collection[str]) -> list[ArtifactRow]:
        """Return versions as they are, until the transaction's end. Errors: as `find`.

        A row that was found outside may have been collected since.
        """
        self.registry.database.in_turn(connection, Turn.PUBLISH)
        found = []
        for name in names:
            outside = self.find(self.registry, name)
            query = sa.select(t.artifacts).filter_by(id=outside.id)
            found.append(ArtifactRow(**connection.execute(query).mappings().one()))
        return found

    def set_pin(self, connection: sa.Connection, name: str, *, pinned: bool) -> ArtifactRow:
        """Hold a version for good, or no longer. Errors: as `find`."""
        [row] = self.lock(connection, [name])
        return self._change(connection, row, pinned=pinned)

    def set_tier(self, connection: sa.Connection, name: str, tier: str) -> ArtifactRow:
        """Say where a version's bytes shall be; `settle` brings them there. Its tier already: nothing changes.

        Errors: as `find`; ArtifactInUseError; IllegalTransitionError, where there is no archive.
        """
        [row] = self.lock(connection, [name])
        if row.tier == tier:
            return row
        if not self.registry.blobs.archives:
            description = "this service has no archive: set artifacts.archive_url"
            raise IllegalTransitionError(
                description, violations=[FieldViolation(field="tier", description=description)]
            )
        if tier == ARCHIVE:
            self.require_free(connection, [row], field="name")
        self.registry.tell(connection, row.id, "archived" if tier == ARCHIVE else "restored")
        return self._change(connection, row, tier=tier)

    def _change(self, connection: sa.Connection, row: ArtifactRow, **values: object) -> ArtifactRow:
        changed = sa.update(t.artifacts).filter_by(id=row.id).values(**values).returning(*t.artifacts.c)
        return ArtifactRow(**connection.execute(changed).mappings().one())

    # --- what must stay

    def in_use(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> dict[int, str]:
        """Return by id why versions must stay where they are, and what would change that."""
        why = dict(self.holds.reasons(connection, rows))
        newest = {family: self._newest(connection, family) for family in {row.family for row in rows}}
        for row in rows:
            if row.version in newest[row.family]:
                kept = self.settings.keep_newest
                told = f"one of the {kept} newest versions" if kept > 1 else "the newest version"
                why[row.id] = f"it is {told} of its family, which stay (setting artifacts.keep_newest)"
            if row.pinned:
                why[row.id] = f"it is pinned: forge artifacts unpin {row.name}"
        return why

    def require_free(self, connection: sa.Connection, rows: Sequence[ArtifactRow], *, field: str) -> None:
        """Refuse versions that anything depends on. field: that of the request. Errors: ArtifactInUseError."""
        why = self.in_use(connection, rows)
        violations = [
            FieldViolation(field=field, description=f"{row.name} must stay: {why[row.id]}")
            for row in rows
            if row.id in why
        ]
        if violations:
            raise ArtifactInUseError("; ".join(one.description for one in violations), violations=violations)

    def _newest(self, connection: sa.Connection, family: str) -> set[int]:
        query = sa.select(t.artifacts.c.version).filter_by(family=family, collect_us=None)
        query = query.order_by(t.artifacts.c.version.desc()).limit(self.settings.keep_newest)
        return set(connection.execute(query).scalars())

    def older(self, before_us: int, *, tier: str = "") -> Iterator[ArtifactRow]:
        """Yield versions that were published before a moment and on which nothing depends, oldest first."""
        query = sa.select(t.artifacts).filter_by(collect_us=None, pinned=False)
        query = query.where(t.artifacts.c.create_us < before_us)
        if tier:
            query = query.filter_by(tier=tier)
        last = 0
        while True:
            with self.registry.database.read() as connection:
                page = query.where(t.artifacts.c.id > last).order_by(t.artifacts.c.id).limit(_BATCH)
                rows = [ArtifactRow(**row) for row in connection.execute(page).mappings()]
                why = self.in_use(connection, rows)
            yield from (row for row in rows if row.id not in why)
            if len(rows) < _BATCH:
                return
            last = rows[-1].id

    # --- tiers

    def archive_old(self, before_us: int) -> int:
        """Put versions that were published before a moment into the archive, and return how many."""
        count = 0
        for row in self.older(before_us, tier=STANDARD):
            try:
                for file in row.files:
                    self.registry.blobs.check(file)
            except ArtifactCorruptError as error:  # a move would lose what might yet be mended
                log.error("a damaged version is not archived", artifact=row.name, detail=error.message)
                continue
            with self.registry.database.write() as connection:
                try:
                    self.set_tier(connection, row.name, ARCHIVE)
                except ArtifactInUseError:  # since just now
                    continue
            count += 1
        return count

    def settle(self, rows: Sequence[ArtifactRow] | None = None) -> None:
        """Bring bytes to where the tiers say: those of some versions, or everything that a cut has left behind.

        Bytes that several versions name are in the archive when all of these are. They can be read wherever they are,
        so a move may be cut at any moment. One server moves at a time, and what another one is at is left to it.
        What is damaged stays where it is. Errors: OSError.
        """
        blobs = self.registry.blobs
        if not blobs.archives:
            return
        with self.registry.database.alone(Turn.TIERS) as mine:
            if not mine:
                return
            index = LiveFiles(self.registry)
            if rows is None:
                misplaced = [b.digest for b in blobs.blobs() if b.archived == (b.digest in index.kept_here)]
            else:
                misplaced = [file.digest for row in rows for file in row.files]
            for digest in sorted(set(misplaced) & index.named.keys()):
                try:
                    blobs.move(digest, digest not in index.kept_here)
                except ArtifactCorruptError as error:
                    log.error("damaged bytes are not moved", digest=digest, detail=error.message)


class LiveFiles:
    """The stored files that versions name which are not collected.

    named: by digest, by how many versions. kept_here: digests that a version of the standard tier names.
    Versions are only ever added and collected, so what is missing here is named by none, but for those that were
    published since: `refresh` adds them.
    """

    def __init__(self, registry: ArtifactRegistry) -> None:
        self._registry = registry
        self._last = 0
        self.named: dict[str, int] = {}
        self.kept_here: set[str] = set()
        while True:
            with registry.database.read() as connection:
                if self.refresh(connection, limit=_BATCH) < _BATCH:
                    return

    def refresh(self, connection: sa.Connection, *, limit: int | None = None) -> int:
        """Add versions that were published since, in the caller's transaction, and return how many."""
        query = sa.select(t.artifacts).where(t.artifacts.c.id > self._last, t.artifacts.c.collect_us.is_(None))
        rows = [
            ArtifactRow(**row) for row in connection.execute(query.order_by(t.artifacts.c.id).limit(limit)).mappings()
        ]
        for row in rows:
            self._last = row.id
            for digest in {file.digest for file in row.files}:
                self.named[digest] = self.named.get(digest, 0) + 1
                if row.tier == STANDARD:
                    self.kept_here.add(digest)
        return len(rows)

    def without(self, rows: Sequence[ArtifactRow]) -> set[str]:
        """Return the digests that no version names when these are gone."""
        fewer: dict[str, int] = {}
        for row in rows:
            for digest in {file.digest for file in row.files}:
                fewer[digest] = fewer.get(digest, 0) + 1
        return {digest for digest, count in fewer.items() if self.named.get(digest, 0) <= count}
