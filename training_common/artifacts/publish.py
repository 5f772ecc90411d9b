"""Publishing what a job made: files by digest, then version, outbox entry and the job's end in one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.digests import code_digest
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
) -> ArtifactRow:
    """Publish a folder's files as the family's next version and end the job as SUCCEEDED: both, or neither.

    body: the manifest's own part. code: packages whose digest goes into it.
    Errors: FencedOutError, AttemptStopped, when the job was taken away or cancelled meanwhile; OSError.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    files = [registry.blobs.put(folder / name, name) for name in names]
    whole = {
        **body,
        "create_us": now_us(),
        "code": {"version": version("cognateforge"), "digest": code_digest(*code)},
    }
    store = attempt.store
    with attempt.moving(), store.writing() as connection:
        row = registry.publish(connection, family=family, state=state, job=store.job.name, files=files, body=whole)
        append_event(
            connection,
            store.job.id,
            "artifact_published",
            {"name": row.name, "digest": row.digest},
            only_token=store.attempt.fencing_token,
        )
        store.move_in(connection, JobState.SUCCEEDED, message=f"published {row.name}", artifact=row.name)
    return row
