"""One moment of a database, in segments: every row, and which bytes its versions name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from cognateforge.exceptions import PreconditionError
from training_common.artifacts.registry import ArtifactRow
from training_common.backup.digest_table import DigestTable
from training_common.backup.manifest import TableDump
from training_common.backup.rows import read_rows, reflect, shape_of, to_line
from training_common.backup.segments import Listing, SegmentWriter
from training_common.backup.service import StoredService
from training_common.jobs.folders import folder_name
from training_common.jobs.states import FINAL
from training_common.store import revisions
from training_common.store.database import Database, now_us

# Rows that are fetched at once: one can hold a manifest of a megabyte.
_FETCHED_ROWS = 200


@dataclass(frozen=True, kw_only=True)
class OpenCheckpoint:
    """A checkpoint of a job that has not ended. folder: below that of all jobs, with slashes."""

    job: str
    step: int
    folder: str
    digest: str
    pinned: bool


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What was read in one transaction. blobs: lines of digest, size, version and file, for each digest once."""

    revision: str
    time_us: int
    tables: tuple[TableDump, ...]
    versions: int
    blobs: Listing
    blob_bytes: int
    checkpoints: tuple[OpenCheckpoint, ...]


def take_snapshot(service: StoredService, database: Database, folder: Path) -> Snapshot:
    """Write a database's rows as of this moment into segments in a folder. Others read and write meanwhile.

    Errors: PreconditionError, for a database that is no store of the service, or one that is half restored.
    """
    with _one_moment(database) as connection:
        revision, time_us = revisions.current(connection), now_us()
        if backup := revisions.restoring(connection):
            raise PreconditionError(f"the store is half restored from backup {backup}: there is nothing to back up yet")
        if revision is None:
            raise PreconditionError(f"the database of {database.shown} holds no store of a service; correct --settings")
        found = reflect(connection)
        tables = {table.name: table for table in found}
        # An older schema has had other tables; it is looked at when it is restored.
        if revision == revisions.head(service.migrations) and tables.keys() != service.tables:
            differing = ", ".join(sorted(tables.keys() ^ service.tables))
            raise PreconditionError(
                f"the database of {database.shown} is not that of the {service.name} service alone, they differ in the "
                f"tables {differing}: correct --service or --settings, or keep other tables in a database of their own"
            )
        dumps = tuple(_dump(connection, table, folder) for table in found)
        versions, blobs, blob_bytes = _blobs(connection, tables["artifacts"], folder)
        checkpoints = tuple(_open_checkpoints(connection, tables["jobs"], tables["checkpoints"]))
    return Snapshot(
        revision=revision,
        time_us=time_us,
        tables=dumps,
        versions=versions,
        blobs=blobs,
        blob_bytes=blob_bytes,
        checkpoints=checkpoints,
    )


@contextmanager
def _one_moment(database: Database) -> Iterator[sa.Connection]:
    """Open a transaction that sees the database as it is at its first statement, and cannot write."""
    postgresql = database.engine.dialect.name == "postgresql"
    options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True} if postgresql else {}
    with database.engine.connect().execution_options(**options) as connection, connection.begin():
        database.may_idle(connection)
        yield connection


def _dump(connection: sa.Connection, table: sa.Table, folder: Path) -> TableDump:
    shape, writer = shape_of(table), SegmentWriter(folder)
    for row in read_rows(connection, table):
        writer.add(to_line(row), to_line([row[at] for at in shape.key]))
    return TableDump(name=table.name, shape=shape, rows=writer.close())


def live_versions(connection: sa.Connection, artifacts: sa.Table) -> Iterator[ArtifactRow]:
    """Yield the versions that were not collected, in the order of their publication."""
    names = ["id", "family", "version", "state", "digest", "manifest", "size_bytes", "job", "create_us"]
    query = sa.select(*(artifacts.columns[name] for name in names)).order_by(artifacts.columns["id"])
    if "collect_us" in artifacts.columns:  # since revision 0015
        query = query.where(artifacts.columns["collect_us"].is_(None))
    for row in connection.execute(query.execution_options(yield_per=_FETCHED_ROWS)).mappings():
        yield ArtifactRow(**row)


def _blobs(connection: sa.Connection, artifacts: sa.Table, folder: Path) -> tuple[int, Listing, int]:
    """Return the count of live versions, the lines of their bytes, and the bytes' sum."""
    writer, versions, size_bytes = SegmentWriter(folder), 0, 0
    with contextlib.closing(DigestTable()) as seen:
        for version in live_versions(connection, artifacts):
            versions += 1
            for file in version.files:
                if seen.add(file.digest, file.size_bytes):
                    size_bytes += file.size_bytes
                    writer.add(to_line([file.digest, file.size_bytes, version.name, file.path]), file.digest.encode())
    return versions, writer.close(), size_bytes


def _open_checkpoints(connection: sa.Connection, jobs: sa.Table, checkpoints: sa.Table) -> Iterator[OpenCheckpoint]:
    """Yield the checkpoints of jobs that have not ended, the newest of a job first."""
    j, c = jobs.columns, checkpoints.columns
    query = (
        sa.select(j["name"], c["step"], c["folder"], c["digest"], c["pinned"])
        .join_from(jobs, checkpoints, j["id"] == c["job_id"])
        .where(j["state"].not_in([state.value for state in FINAL]), c["available"])
        .order_by(j["id"], c["step"].desc(), c["id"].desc())
    )
    for name, step, folder, digest, pinned in connection.execute(query):
        below = f"{folder_name(name)}/checkpoints/{folder}"
        yield OpenCheckpoint(job=name, step=step, folder=below, digest=digest, pinned=pinned)
