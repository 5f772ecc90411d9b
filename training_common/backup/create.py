"""Making a backup while the service goes on: a snapshot of the database, then the bytes that it names.

Bytes of a version never change, and go only after its row says so. So what a snapshot names is there, or its version
was collected since: then another snapshot is taken, and what was copied before is not copied again.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
import structlog

from cognateforge.exceptions import ArtifactCorruptError, PreconditionError, UnavailableError
from training_common.artifacts.blobs import BlobStore, StoredFile
from training_common.artifacts.open import open_blobs
from training_common.backup.checkpoints import checkpoint_files, newest_and_pinned, unreadable_is_corrupt
from training_common.backup.destination import OBJECTS, Destination, checked, object_digits, object_key
from training_common.backup.digest_table import DigestTable
from training_common.backup.locks import BACKUP, at_work
from training_common.backup.manifest import Backup, BackupManifest, Missing, put_manifest
from training_common.backup.parallel import in_parallel
from training_common.backup.rows import to_line
from training_common.backup.segments import Listing, Segment, SegmentWriter, staged, staged_lines
from training_common.backup.service import StoredService
from training_common.backup.snapshot import OpenCheckpoint, Snapshot, take_snapshot
from training_common.jobs.folders import jobs_dir
from training_common.release import release_of
from training_common.settings import ServiceSettings
from training_common.store import tables as t
from training_common.store.database import Database, now_us

# A snapshot is taken again when a version was collected since; so often in a row it is not by chance.
_SNAPSHOTS = 3
_READ_BYTES = 1 << 20
log = structlog.get_logger(__name__)


@dataclass(kw_only=True)
class Copied:
    """What was not there yet and was copied: objects, and their bytes. passed_over: open jobs without a checkpoint."""

    objects: int = 0
    size_bytes: int = 0
    passed_over: int = 0


@dataclass(frozen=True, kw_only=True)
class Made:
    """A backup that was made, what of it is new, and how long it took."""

    backup: Backup
    copied: Copied
    seconds: float


class _CollectedError(Exception):
    """A version of the snapshot was collected meanwhile."""


def back_up(
    service: StoredService, settings: ServiceSettings, destination: Destination, *, checkpoints: bool = False
) -> Made:
    """Back up a service that may be at work.

    checkpoints: whether open jobs' newest and pinned checkpoints are copied too.
    Errors: PreconditionError, where there is no store, or a prune is at work; UnavailableError, when versions are
    collected all the time; those of the destination.
    """
    begin_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(open_database(settings))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="forge-backup-")))
        require_held = stack.enter_context(at_work(destination, BACKUP, alone=False))
        copier = _Copier(database, open_blobs(settings), destination)
        stack.callback(copier.close)
        snapshot, missing = _whole_snapshot(service, copier, scratch)
        wanted = snapshot.checkpoints if checkpoints else ()
        files, size_bytes = _copy_checkpoints(copier, wanted, jobs_dir(settings), scratch)
        manifest = BackupManifest(
            service=service.name,
            release=release_of(service.name),
            revision=snapshot.revision,
            server=settings.server_name,
            snapshot_us=snapshot.time_us,
            end_us=now_us(),
            tables=snapshot.tables,
            versions=snapshot.versions,
            blobs=snapshot.blobs,
            blob_bytes=snapshot.blob_bytes,
            missing=missing,
            checkpoints=files,
            checkpoint_bytes=size_bytes,
        )
        for listing in manifest.listings:
            copier.segments(listing, scratch)
        require_held()
        backup = put_manifest(destination, manifest)
    return Made(backup=backup, copied=copier.copied, seconds=time.monotonic() - begin_s)


@contextlib.contextmanager
def open_database(settings: ServiceSettings) -> Iterator[Database]:
    """Yield a service's database. Errors: PreconditionError, for a file that is not there; SettingsError."""
    url = sa.make_url(settings.database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").exists():
        raise PreconditionError(f"there is no database {url.database}: correct --settings, or start the service first")
    database = Database(settings.database_url)
    try:
        yield database
    finally:
        database.close()


def _whole_snapshot(service: StoredService, copier: _Copier, scratch: Path) -> tuple[Snapshot, tuple[Missing, ...]]:
    for _ in range(_SNAPSHOTS):
        snapshot = take_snapshot(service, copier.database, scratch)
        try:
            return snapshot, tuple(copier.blobs(snapshot, scratch))
        except _CollectedError as error:
            log.info("a version was collected meanwhile, taking another snapshot", version=str(error))
    raise UnavailableError("versions are being collected all the time: try again when the collection has ended")


class _Copier:
    """Copies what the destination does not have yet."""

    def __init__(self, database: Database, blobs: BlobStore, destination: Destination) -> None:
        self.database = database
        self.copied = Copied()
        self._counting = threading.Lock()
        self._blobs = blobs
        self._destination = destination
        self._known = DigestTable()
        for entry in destination.entries(OBJECTS):
            if digits := object_digits(entry.key):
                self._known.add(digits, entry.size_bytes)

    def close(self) -> None:
        self._known.close()

    def put(self, digest: str, size_bytes: int, pieces: Callable[[], Iterator[bytes]], *, what: str) -> None:
        """Copy bytes unless they are there. Errors: ArtifactCorruptError, when they do not have their digest."""
        if self._known.size(digest) == size_bytes:
            return
        whole = checked(pieces(), digest=digest, size_bytes=size_bytes, what=what)
        self._destination.put(object_key(digest), whole, size_bytes)
        self._known.add(digest, size_bytes)
        with self._counting:
            self.copied.objects += 1
            self.copied.size_bytes += size_bytes

    def blobs(self, snapshot: Snapshot, scratch: Path) -> Iterator[Missing]:
        """Copy versions' bytes, and yield those that are not whole where they are stored. Errors: _CollectedError."""
        for missing in in_parallel(self._blob, staged_lines(scratch, snapshot.blobs)):
            if missing is not None:
                yield missing

    def _blob(self, line: tuple[str, int, str, str]) -> Missing | None:
        digest, size_bytes, name, path = line
        file = StoredFile(path=path, size_bytes=size_bytes, digest=digest)
        try:
            self.put(digest, size_bytes, lambda: self._stored(file), what=f"{name}: {path}")
        except ArtifactCorruptError as error:
            if self._is_collected(name):
                raise _CollectedError(name) from None
            return Missing(digest=digest, version=name, problem=error.message)
        return None

    def _stored(self, file: StoredFile) -> Iterator[bytes]:
        for _, piece in self._blobs.open_payload((file,), 0):
            yield piece

    def _is_collected(self, name: str) -> bool:
        family, _, number = name.rpartition("@")
        query = sa.text("SELECT collect_us FROM artifacts WHERE family = :family AND version = :version")
        with self.database.read() as connection:
            if "collect_us" not in {column["name"] for column in sa.inspect(connection).get_columns(t.artifacts.name)}:
                return False
            found = connection.execute(query, {"family": family, "version": int(number)}).scalar()
        return found is not None

    def segments(self, listing: Listing, scratch: Path) -> None:
        """Copy segments out of the folder that they were written to."""

        def copy(segment: Segment) -> None:
            path = staged(scratch, segment.digest)
            self.put(segment.digest, segment.size_bytes, lambda: _read(path), what=str(path))

        for _ in in_parallel(copy, listing.segments):
            pass


def _copy_checkpoints(
    copier: _Copier, checkpoints: Sequence[OpenCheckpoint], root: Path, scratch: Path
) -> tuple[Listing, int]:
    """Copy files of open jobs' checkpoints, and return their lines and the bytes' sum."""
    writer, size_bytes = SegmentWriter(scratch), 0
    for job, wanted in newest_and_pinned(checkpoints):
        found = 0
        for checkpoint in wanted:
            try:
                files = checkpoint_files(root, checkpoint)
                for file in files:
                    path = root / file.path
                    copier.put(file.digest, file.size_bytes, lambda path=path: _read(path), what=file.path)  # type: ignore[misc]
            except ArtifactCorruptError as error:  # retention may have removed it meanwhile
                log.warning("checkpoint not in the backup", job=job, step=checkpoint.step, detail=error.message)
                continue
            found += 1
            size_bytes += sum(file.size_bytes for file in files)
            for file in files:
                writer.add(to_line([file.path, file.digest, file.size_bytes]), file.path.encode())
        copier.copied.passed_over += not found
    return writer.close(), size_bytes


def _read(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes. Errors: ArtifactCorruptError, where they cannot be read."""
    with unreadable_is_corrupt(), path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_BYTES):
            yield piece
