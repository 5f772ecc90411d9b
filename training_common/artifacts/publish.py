"""Publishing what a job made: files by digest, then version, outbox entry and the job's end in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.digests import code_digest, files_under
from training_common.jobs.states import JobState
from training_common.jobs.store import append_event
from training_common.store.database import now_us
from training_common.worker import WorkerAttempt


def publish_and_succeed(
    registry: ArtifactRegistry,
    attempt: WorkerAttempt,
    *,
    folder: Path,
    family: str,
    state: str,
    body: Mapping[str, Any],
    code: tuple[str, ...],
    also: Callable[[sa.Connection, ArtifactRow], None] | None = None,
) -> ArtifactRow:
    """Publish a folder's files as the family's next version and end the job as SUCCEEDED: both, or neither.

    body: the manifest's own part. code: packages whose digest goes into it. also: what else belongs to the transaction.
    Errors: FencedOutError, AttemptStopped, when the job was taken away or cancelled meanwhile; OSError.
    """
    names = [path.relative_to(folder).as_posix() for path in files_under(folder)]
    files = [registry.blobs.put(folder / name, name) for name in names]
    whole = {
        **body,
        "create_us": now_us(),
        "code": {"version": version("cognateforge"), "digest": code_digest(*code)},
    }
    store = attempt.store
    with attempt.moving(), store.writing() as connection:
        row = registry.publish(connection, family=family, state=state, job=store.job.name, files=files, body=whole)
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
