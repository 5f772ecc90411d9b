"""Restoring a backup into an empty place: bytes first, then every row in one transaction, then what can go on.

A table marks the store while this lasts. No server takes a store that bears it, and no other restore does: cut off at
any moment, the place has to be emptied first.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from cognateforge.exceptions import ArtifactCorruptError, PreconditionError
from training_common.artifacts.blobs import BlobStore, ManifestExistsError
from training_common.artifacts.open import open_blobs
from training_common.artifacts.places import at_path
from training_common.artifacts.registry import ArtifactRow
from training_common.backup.destination import OBJECTS, Destination, object_digits, object_key, read_object
from training_common.backup.digest_table import DigestTable
from training_common.backup.locks import at_restore
from training_common.backup.manifest import Backup, BackupManifest, TableDump
from training_common.backup.parallel import in_parallel
from training_common.backup.rows import RowWriter, decode, read_rows, reflect, shape_of, to_line
from training_common.backup.segments import kept_checkpoints, kept_files, kept_lines
from training_common.backup.service import StoredService
from training_common.backup.settle import Settled, settle
from training_common.backup.snapshot import live_versions
from training_common.digests import sha256_bytes
from training_common.jobs.folders import jobs_dir
from training_common.settings import ServiceSettings
from training_common.store import revisions
from training_common.store import tables as t
from training_common.store.database import Database, Turn

# Rows that are inserted at once: one can hold a manifest of a megabyte.
_INSERTED_ROWS = 200
_TOLD = 5
# The contract's rule for the name of a version: it names files.
_NAME = re.compile(r"[a-z][a-z0-9-]{0,47}@[1-9][0-9]{0,8}")


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was restored, what became of jobs that had not ended, and how long it took."""

    backup: Backup
    settled: Settled
    seconds: float


def restore(service: StoredService, settings: ServiceSettings, destination: Destination, backup: Backup) -> Restored:
    """Restore a backup into the empty database and store of artifacts that the settings name.

    Errors: PreconditionError, for a backup of another service or of a newer release, and where the place is not empty;
    ArtifactCorruptError, for a backup that lacks objects, of which nothing is written then, or holds damaged ones.
    """
    with at_restore(destination):
        return _restore(service, settings, destination, backup)


def _restore(service: StoredService, settings: ServiceSettings, destination: Destination, backup: Backup) -> Restored:
    begin_s = time.monotonic()
    _require_fitting(service, backup)
    _require_complete(destination, backup)
    database, blobs = Database(settings.database_url), open_blobs(settings)
    try:
        _claim(database, blobs, backup)
        _restore_blobs(destination, backup.manifest, blobs)
        _restore_checkpoints(destination, backup.manifest, jobs_dir(settings))
        with database.write() as connection:
            database.may_idle(connection)  # objects may come slowly
            _load(connection, destination, backup.manifest, service.migrations)
            _restore_manifests(connection, blobs, backup.manifest, destination)
            revisions.upgrade_to(connection, service.migrations, "head")
        settled = settle(database, backup, jobs_dir(settings))
        with database.write() as connection:
            service.after_restore(connection)
            revisions.RESTORING.drop(connection)
    finally:
        database.close()
    return Restored(backup=backup, settled=settled, seconds=time.monotonic() - begin_s)


def _require_fitting(service: StoredService, backup: Backup) -> None:
    manifest = backup.manifest
    if manifest.service != service.name:
        raise PreconditionError(f"backup {backup.id} is of the {manifest.service} service, not of {service.name}")
    if not revisions.is_known(service.migrations, manifest.revision):
        raise PreconditionError(
            f"backup {backup.id} has schema revision {manifest.revision}, and this release knows none after "
            f"{revisions.head(service.migrations)}: install release {manifest.release}, which made it, or a newer one"
        )


def _require_complete(destination: Destination, backup: Backup) -> None:
    """Make sure that every object is there with its size, before anything is written. Errors: ArtifactCorruptError."""
    table, manifest = DigestTable(), backup.manifest
    for entry in destination.entries(OBJECTS):
        if digits := object_digits(entry.key):
            table.add(digits, entry.size_bytes)
    segments = ((s.digest, s.size_bytes, "rows") for listing in manifest.listings for s in listing.segments)
    lacking = [(digest, what) for digest, size, what in segments if table.size(digest) != size]
    if not lacking:
        files = itertools.chain(_files(destination, manifest), _checkpoint_files(destination, manifest))
        lacking = [(digest, what) for digest, size, what in files if table.size(digest) != size]
    table.close()
    if lacking:
        named = ", ".join(f"{object_key(digest)} ({what})" for digest, what in lacking[:_TOLD])
        raise ArtifactCorruptError(
            f"backup {backup.id} lacks {len(lacking)} objects, or they have another size: {named}; use another backup"
        )


def _files(destination: Destination, manifest: BackupManifest) -> Iterator[tuple[str, int, str]]:
    """Yield digest, size and name of the versions' files that are in a backup."""
    missing = {one.digest for one in manifest.missing}
    for digest, size_bytes, name, path in kept_files(destination, manifest.blobs, what="list of files"):
        if digest not in missing:
            yield digest, size_bytes, f"{name}: {path}"


def _checkpoint_files(destination: Destination, manifest: BackupManifest) -> Iterator[tuple[str, int, str]]:
    """Yield digest, size and path of the checkpoints' files."""
    for path, digest, size_bytes in kept_checkpoints(destination, manifest.checkpoints, what="list of checkpoints"):
        yield digest, size_bytes, path


def _claim(database: Database, blobs: BlobStore, backup: Backup) -> None:
    """Mark the store as being restored. Errors: PreconditionError, where something is there already."""
    with database.write() as connection:
        database.in_turn(connection, Turn.UPGRADE)
        if unfinished := revisions.restoring(connection):
            raise PreconditionError(
                f"the place is half restored from backup {unfinished}: empty the database {database.shown} and the "
                "artifacts, then restore again"
            )
        found = sa.inspect(connection).get_table_names()
        if found:
            raise PreconditionError(
                f"the database {database.shown} is not empty, it has {len(found)} tables: {', '.join(found[:_TOLD])}; "
                "restore into an empty one"
            )
        # An archive that is left may stay: all that is restored is put beside it.
        stored = list(itertools.islice((blob.digest for blob in blobs.blobs() if not blob.archived), _TOLD))
        if stored:
            raise PreconditionError(
                f"the store of artifacts is not empty, it holds {', '.join(stored)}; restore into an empty one"
            )
        # A manifest that is left would be met only after all bytes were written, or take a number away in silence.
        named = [f"{one.family}@{one.version}" for one in itertools.islice(blobs.manifests(), _TOLD)]
        if named:
            raise PreconditionError(
                f"the store of artifacts is not empty, it has manifests of {', '.join(named)}; restore into an empty "
                "one"
            )
        revisions.RESTORING.create(connection)
        connection.execute(sa.insert(revisions.RESTORING).values(backup=backup.id))


def _restore_blobs(destination: Destination, manifest: BackupManifest, blobs: BlobStore) -> None:
    with tempfile.TemporaryDirectory(prefix="forge-restore-") as folder:

        def restore_one(file: tuple[str, int, str]) -> None:
            digest, size_bytes, what = file
            path = Path(folder) / digest.removeprefix("sha256:")
            _write(path, read_object(destination, digest, size_bytes, what=what))
            blobs.put(path, path.name)
            path.unlink()

        for _ in in_parallel(restore_one, _files(destination, manifest)):
            pass


def _write(path: Path, pieces: Iterator[bytes]) -> None:
    with at_path(path.parent), path.open("wb") as file:
        file.writelines(pieces)


def _restore_checkpoints(destination: Destination, manifest: BackupManifest, root: Path) -> None:
    """Write files of checkpoints into their jobs' folders. What an attempt finds there it checks before it is used."""
    for digest, size_bytes, name in _checkpoint_files(destination, manifest):
        path = root / name
        if not path.resolve().is_relative_to(root.resolve()):
            raise ArtifactCorruptError(f"{name}: leads out of the folder of jobs")
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, read_object(destination, digest, size_bytes, what=name))


def _load(connection: sa.Connection, destination: Destination, manifest: BackupManifest, migrations: Path) -> None:
    """Make the schema that the backup is of, and put every row into it. Errors: PreconditionError."""
    revisions.upgrade_to(connection, migrations, manifest.revision)
    tables = [table for table in reflect(connection) if table.name != revisions.RESTORING.name]
    dumps = {table.name: table for table in manifest.tables}
    if dumps.keys() != {table.name for table in tables}:
        differing = ", ".join(sorted(dumps.keys() ^ {table.name for table in tables}))
        raise PreconditionError(f"the backup's tables are not those of revision {manifest.revision}: {differing}")
    for table in reversed(tables):  # migrations may have written rows
        connection.execute(sa.delete(table))
    for table in tables:
        dump = dumps[table.name]
        if dump.shape != shape_of(table):
            raise PreconditionError(f"table {table.name}: its columns are not those of revision {manifest.revision}")
        _insert(connection, destination, table, dump)
        _require_same(connection, table, dump)
        _set_sequence(connection, table)


def _insert(connection: sa.Connection, destination: Destination, table: sa.Table, dump: TableDump) -> None:
    writer = RowWriter(connection, table, dump.shape)
    lines = kept_lines(destination, dump.rows, what=f"table {table.name}")
    while some := list(itertools.islice(lines, _INSERTED_ROWS)):
        writer.write([decode(row, dump.shape) for row in some])


def _require_same(connection: sa.Connection, table: sa.Table, dump: TableDump) -> None:
    """Read a table again: it must be the one that was backed up. Errors: ArtifactCorruptError."""
    if _digest_of(connection, table) != (dump.rows.lines, dump.rows.digest):
        raise ArtifactCorruptError(f"table {table.name}: the rows that were written are not those of the backup")


def _digest_of(connection: sa.Connection, table: sa.Table) -> tuple[int, str]:
    """Return the count and the digest of a table's rows as lines."""
    sha256, count = hashlib.sha256(), 0
    for row in read_rows(connection, table):
        sha256.update(to_line(row))
        count += 1
    return count, f"sha256:{sha256.hexdigest()}"


def _set_sequence(connection: sa.Connection, table: sa.Table) -> None:
    """Let PostgreSQL give keys after those that were written. SQLite does so by itself."""
    key = list(table.primary_key.columns)
    if connection.dialect.name != "postgresql" or len(key) != 1 or not isinstance(key[0].type, sa.Integer):
        return
    newest = sa.func.max(key[0])
    sequence = sa.func.pg_get_serial_sequence(table.name, key[0].name)  # NULL for keys that are given, and then no more
    connection.execute(sa.select(sa.func.setval(sequence, sa.func.coalesce(newest, 1), newest.is_not(None))))


def _restore_manifests(
    connection: sa.Connection, blobs: BlobStore, manifest: BackupManifest, destination: Destination
) -> None:
    artifacts = next(table for table in reflect(connection) if table.name == t.artifacts.name)
    with contextlib.closing(DigestTable()) as listed:
        for digest, size_bytes, *_ in kept_files(destination, manifest.blobs, what="list of files"):
            listed.add(digest, size_bytes)
        for version in live_versions(connection, artifacts):
            _require_whole(version, listed)
            _put_manifest(blobs, version)


def _require_whole(version: ArtifactRow, listed: DigestTable) -> None:
    """Refuse a version that its own manifest does not name, or of whose bytes the backup says nothing."""
    if sha256_bytes(version.manifest) != version.digest:
        raise ArtifactCorruptError(f"{version.name}: its manifest in the backup does not have its digest")
    try:
        unlisted = [file.path for file in version.files if listed.size(file.digest) is None]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactCorruptError(f"{version.name[:100]!r}: its manifest in the backup is none") from error
    if unlisted or not _NAME.fullmatch(version.name):
        raise ArtifactCorruptError(
            f"{version.name[:100]!r}: the backup does not tell of all its files, or it is no version's name"
        )


def _put_manifest(blobs: BlobStore, version: ArtifactRow) -> None:
    try:
        blobs.put_manifest(version.family, version.version, version.manifest)
    except ManifestExistsError as error:
        raise PreconditionError(f"the store of artifacts is not empty: {error}; restore into an empty one") from error
