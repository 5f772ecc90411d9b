"""Published versions: numbered, immutable, with an outbox of what was published.

A manifest is canonical JSON; its sha256 is the version's identity. It names every file with size and digest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sqlalchemy as sa

from cognateforge.exceptions import IntegrityCheckFailedError
from training_common.artifacts import search
from training_common.artifacts.blobs import BlobStore, ManifestExistsError, StoredFile
from training_common.artifacts.signing import ArtifactSigner
from training_common.digests import canonical_json, sha256_bytes
from training_common.store import tables as t
from training_common.store.database import Database, Turn, now_us

SCHEMA = "cognateforge.manifest/1"
# The contract's bound on the manifest in a fetch's header.
MAX_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class ArtifactRow:
    """A published version as stored."""

    id: int
    family: str
    version: int
    state: str
    digest: str
    manifest: bytes
    size_bytes: int
    job: str
    create_us: int
    tier: str = "STANDARD"
    pinned: bool = False
    verify_us: int | None = None
    damage: str = ""
    collect_us: int | None = None
    signature: bytes | None = None
    key: str = ""

    @property
    def name(self) -> str:
        """Return "family@version"."""
        return f"{self.family}@{self.version}"

    @cached_property
    def body(self) -> dict[str, Any]:
        """Return the parsed manifest."""
        parsed: dict[str, Any] = json.loads(self.manifest)
        return parsed

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """Return the files in payload order."""
        return tuple(StoredFile(**file) for file in self.body["files"])


@dataclass(frozen=True)
class ArtifactEvent:
    """One entry of the outbox."""

    sequence: int
    time_us: int
    kind: str
    artifact: ArtifactRow


@dataclass(frozen=True)
class SnapshotPage:
    """Some of the versions that were published up to a sequence. `rows` are in the order of their publication."""

    sequence: int
    rows: tuple[ArtifactRow, ...]
    more: bool


class BytesGoneError(Exception):
    """Bytes that were stored for a publication are not there any more: put these files again, and publish again."""

    def __init__(self, files: Sequence[StoredFile]) -> None:
        super().__init__(", ".join(file.path for file in files))
        self.files = tuple(files)


class ArtifactRegistry:
    """Versions in one service's database, over its blobs. signer: signs what is published."""

    def __init__(self, database: Database, blobs: BlobStore, signer: ArtifactSigner | None = None) -> None:
        self.database = database
        self.blobs = blobs
        self.signer = signer

    def publish(
        self,
        connection: sa.Connection,
        *,
        family: str,
        state: str,
        job: str,
        files: Sequence[StoredFile],
        body: Mapping[str, Any],
    ) -> ArtifactRow:
        """Give the next version number to files that are stored, in the caller's transaction.

        `body` is the manifest's own part. Row, outbox entry and whatever else the caller writes are one transaction. A
        crash between manifest and commit leaves a manifest that no row names: its number is passed over from then on.
        Errors: IntegrityCheckFailedError, for a manifest that is larger than the contract's messages hold;
        SigningKeyError; BytesGoneError; StoreAwayError.
        """
        self.database.in_turn(connection, Turn.PUBLISH)
        # Bytes that no version names may be collected, in the same turn: from here on these are named.
        if gone := [file for file in files if not self.blobs.has(file.digest)]:
            raise BytesGoneError(gone)
        newest = connection.execute(sa.select(sa.func.max(t.artifacts.c.version)).filter_by(family=family)).scalar()
        version = (newest or 0) + 1
        listed = [{"path": f.path, "size_bytes": f.size_bytes, "digest": f.digest} for f in files]
        while True:
            name = f"{family}@{version}"
            manifest = canonical_json({**body, "schema": SCHEMA, "name": name, "state": state, "files": listed})
            if len(manifest) > MAX_MANIFEST_BYTES:
                raise IntegrityCheckFailedError(
                    f"the manifest of {name} has {len(manifest)} bytes, at most {MAX_MANIFEST_BYTES} can be fetched: "
                    "use fewer or shorter labels and files"
                )
            # Before the manifest is stored: a key that is gone leaves nothing behind.
            signed = None if self.signer is None else self.signer.sign(name, manifest, tuple(files))
            try:
                self.blobs.put_manifest(family, version, manifest)
                break
            except ManifestExistsError:
                version += 1
        values: dict[str, Any] = {
            "family": family,
            "version": version,
            "state": state,
            "digest": sha256_bytes(manifest),
            "manifest": manifest,
            "size_bytes": sum(file.size_bytes for file in files),
            "job": job,
            "create_us": now_us(),
        }
        if signed is not None:
            values |= {"signature": signed.bundle, "key": signed.key}
        key = connection.execute(sa.insert(t.artifacts).values(**values).returning(t.artifacts.c.id)).scalar_one()
        self.tell(connection, key, "published")
        row = ArtifactRow(id=key, **values)
        search.record(connection, row)
        return row

    def tell(self, connection: sa.Connection, artifact_id: int, kind: str) -> None:
        """Write an entry of the outbox, in the transaction of what it tells of, whose turn is Turn.PUBLISH.

        kind: "published"; or "archived", "restored", "damaged", "mended", "collected".
        """
        sequence = _newest_sequence(connection) + 1
        values = {"sequence": sequence, "time_us": now_us(), "kind": kind, "artifact_id": artifact_id}
        connection.execute(sa.insert(t.artifact_events).values(**values))

    def find(self, family: str, version: int | None) -> ArtifactRow | None:
        """Return one version, or the family's newest where `version` is None, or None where there is none."""
        query = sa.select(t.artifacts).filter_by(family=family, collect_us=None).limit(1)
        query = query.order_by(t.artifacts.c.version.desc())
        if version is not None:
            query = query.where(t.artifacts.c.version == version)
        with self.database.read() as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else ArtifactRow(**row)

    def page(self, *, limit: int) -> list[ArtifactRow]:
        """Return up to `limit` versions, newest first."""
        return list(search.page(self, search.Asked(), limit=limit).rows)

    def rows(self, connection: sa.Connection, query: sa.Select[Any]) -> list[ArtifactRow]:
        """Return the versions that a query of whole rows finds, in the caller's transaction."""
        return [ArtifactRow(**row) for row in connection.execute(query).mappings()]

    def events_after(self, sequence: int, limit: int) -> list[ArtifactEvent]:
        """Return up to `limit` outbox entries after `sequence`, in order."""
        query = (
            sa.select(t.artifact_events.c.sequence, t.artifact_events.c.time_us, t.artifact_events.c.kind, t.artifacts)
            .join(t.artifacts)
            .where(t.artifact_events.c.sequence > sequence)
            .order_by(t.artifact_events.c.sequence)
            .limit(limit)
        )
        with self.database.read() as connection:
            return [ArtifactEvent(row[0], row[1], row[2], ArtifactRow(*row[3:])) for row in connection.execute(query)]

    def newest_sequence(self) -> int:
        """Return the outbox's newest sequence, 0 while it is empty."""
        with self.database.read() as connection:
            return _newest_sequence(connection)

    def progress(self) -> int:
        """Return a number that changes when the outbox may hold something new."""
        with self.database.read() as connection:
            return self.database.progress(connection, _newest_sequence(connection))

    def oldest_sequence(self) -> int:
        """Return the sequence of the oldest entry that is left, 0 while there is none."""
        with self.database.read() as connection:
            return connection.execute(sa.select(sa.func.min(t.artifact_events.c.sequence))).scalar() or 0

    def snapshot_page(self, after: SnapshotPage | None, limit: int) -> SnapshotPage:
        """Return the first page of what is published, or the page that follows `after`, with up to `limit` versions.

        The first page's transaction settles the sequence. Versions never change, so later pages need no transaction
        that stays open while a slow reader takes them: they leave out what was published later, which a later entry
        tells of. What was collected meanwhile is left out too, and the entry about it follows.
        """
        with self.database.read() as connection:
            sequence = _newest_sequence(connection) if after is None else after.sequence
            events = t.artifact_events.c
            later = sa.select(events.artifact_id).where(events.sequence > sequence, events.kind == "published")
            query = sa.select(t.artifacts).filter_by(collect_us=None).order_by(t.artifacts.c.id)
            query = query.where(t.artifacts.c.id.not_in(later))
            if after is not None and after.rows:
                query = query.where(t.artifacts.c.id > after.rows[-1].id)
            rows = [ArtifactRow(**row) for row in connection.execute(query.limit(limit + 1)).mappings()]
        return SnapshotPage(sequence=sequence, rows=tuple(rows[:limit]), more=len(rows) > limit)

    def compact(self, *, keep: int, limit: int) -> int:
        """Remove up to `limit` of the oldest outbox entries beyond the newest `keep`, and return how many that were.

        keep: at least 1. The newest entry always stays, so the sequence goes on where it was.
        """
        if keep < 1:
            raise AssertionError("an outbox without entries would begin again at 1")
        sequence = t.artifact_events.c.sequence
        with self.database.write() as connection:
            oldest = connection.execute(sa.select(sa.func.min(sequence))).scalar() or 0
            below = min(_newest_sequence(connection) - keep + 1, oldest + limit)
            return connection.execute(sa.delete(t.artifact_events).where(sequence < below)).rowcount


def _newest_sequence(connection: sa.Connection) -> int:
    return connection.execute(sa.select(sa.func.max(t.artifact_events.c.sequence))).scalar() or 0
