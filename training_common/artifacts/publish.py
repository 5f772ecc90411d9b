"""Publishing what a job made: files by digest, then version, outbox entry and the job's end in one transaction."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog
from google.protobuf.message import Message

from cognateforge.exceptions import IntegrityCheckFailedError
from cognateforge.layout import MANIFEST_NAME, SIGNATURE_NAME, STATEMENT_NAME
from training_common.artifacts.blobs import BlobStore, StoreAwayError, StoredFile
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow, BytesGoneError
from training_common.artifacts.statement import Ancestor, Making, statement_of
from training_common.attempt import AttemptStopped
from training_common.digests import code_digest, files_under
from training_common.jobs.states import JobState
from training_common.jobs.store import append_event
from training_common.release import release_of
from training_common.store.database import now_us
from training_common.worker import WorkerAttempt

log = structlog.get_logger(__name__)
# As for the database: a store that was away for an hour is not coming back by itself.
_PATIENCE_S = 3600.0
_WAIT_S, _WAIT_MAX_S = 1.0, 30.0
T = TypeVar("T")


def publish_and_succeed(
    registry: ArtifactRegistry,
    attempt: WorkerAttempt,
    *,
    folder: Path,
    family: str,
    state: str,
    body: Mapping[str, Any],
    service: str,
    code: tuple[str, ...],
    plan: Message,
    made_of: Sequence[Ancestor] = (),
    also: Callable[[sa.Connection, ArtifactRow], None] | None = None,
) -> ArtifactRow:
    """Publish a folder's files as the family's next version and end the job as SUCCEEDED: both, or neither.

    A statement of how they were made is written beside them and is one of the version's files.
    body: the manifest's own part. service: whose release goes into it. code: packages whose digest does too. plan: the
    job's. made_of: what it was made of. also: what else belongs to the transaction.
    Errors: FencedOutError, AttemptStopped, when the job was taken away or cancelled meanwhile; OSError;
    SigningKeyError; IntegrityCheckFailedError; StoreAwayError, when the store has not come back for an hour.
    """
    if registry.signer is not None:
        registry.signer.prepare()
    (folder / STATEMENT_NAME).unlink(missing_ok=True)  # an attempt before this one may have come as far
    names = [path.relative_to(folder).as_posix() for path in files_under(folder)]
    for name in names:
        if name.lower() in (MANIFEST_NAME, SIGNATURE_NAME):
            raise IntegrityCheckFailedError(f"a version cannot have a file {name}: a reader's folder keeps it free")
    files = [_stored(registry.blobs, folder, name, attempt) for name in names]
    whole = {
        **body,
        "create_us": now_us(),
        "code": {"version": release_of(service), "digest": code_digest(*code)},
    }
    store = attempt.store
    making = Making(
        job=store.job.name,
        attempt=store.attempt.number,
        plan=plan,
        plan_bytes=store.job.plan,
        checkpoints=store.checkpoints(),
        made_of=made_of,
    )
    (folder / STATEMENT_NAME).write_bytes(statement_of(files, making, family=family, body=whole))
    files.append(_stored(registry.blobs, folder, STATEMENT_NAME, attempt))

    def succeed() -> ArtifactRow:
        with attempt.moving(), store.writing() as connection:
            row = registry.publish(connection, family=family, state=state, job=store.job.name, files=files, body=whole)
            with _withdrawn_on_error(registry.blobs, row):
                if also is not None:
                    also(connection, row)
                append_event(
                    connection,
                    store.job.id,
                    "artifact_published",
                    {"name": row.name, "digest": row.digest},
                    only_token=store.attempt.fencing_token,
                )
                store.move_in(connection, JobState.SUCCEEDED, message=f"published {row.name}", artifact=row.name)
        return row

    while True:
        try:
            return _patiently(attempt, succeed)
        except BytesGoneError as gone:
            # They had lain there unnamed for long, and were collected since. What is put now is young.
            log.warning("files put again", files=[file.path for file in gone.files])
            for file in gone.files:
                _stored(registry.blobs, folder, file.path, attempt)


def _stored(blobs: BlobStore, folder: Path, name: str, attempt: WorkerAttempt) -> StoredFile:
    return _patiently(attempt, lambda: blobs.put(folder / name, name))


@contextlib.contextmanager
def _withdrawn_on_error(blobs: BlobStore, row: ArtifactRow) -> Iterator[None]:
    """Remove a version's manifest when its transaction fails before its commit: the number is given again."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(StoreAwayError, OSError):
            blobs.delete_manifest(row.family, row.version)
        raise


def _patiently(attempt: WorkerAttempt, work: Callable[[], T]) -> T:
    """Do what needs the store of artifacts, again when it comes back. Errors: AttemptStopped; StoreAwayError."""
    give_up, wait_s = time.monotonic() + _PATIENCE_S, _WAIT_S
    while True:
        try:
            return work()
        except StoreAwayError:
            if time.monotonic() + wait_s > give_up:
                raise
        log.warning("store of artifacts cannot be used, trying again", wait_s=wait_s)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, _WAIT_MAX_S)
        if stop := attempt.stop_requested():
            raise AttemptStopped(stop)
