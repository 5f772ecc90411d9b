"""Publishing a foundation model: files under their digests, one manifest, one transaction with the job's end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cognate_server.models import FAMILY
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.digests import code_digest
from training_common.jobs.states import JobState
from training_common.jobs.store import append_event
from training_common.store.database import now_us
from training_common.worker import WorkerAttempt


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a pretraining job made: its folder of files, and everything that its manifest tells.

    state: "READY" or "EXPERIMENTAL".
    architecture: name, fingerprint, parameter_count, act_version, ltm_version.
    sources: name, kind, rows and digest of each set that was trained on.
    """

    folder: Path
    state: str
    architecture: Mapping[str, Any]
    tokenizer_digest: str
    sources: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    training: Mapping[str, Any]
    grokfast: Mapping[str, Any]


class CognateArtifactManager:
    """The foundation models of one Cognate service. ADR-010: content-addressed, immutable, versioned."""

    def __init__(self, registry: ArtifactRegistry) -> None:
        self._registry = registry

    def publish(self, model: TrainedModel, attempt: WorkerAttempt) -> ArtifactRow:
        """Publish a model and end its job as SUCCEEDED, both or neither.

        Errors: FencedOutError, AttemptStopped, when the job was taken away or cancelled meanwhile; OSError.
        """
        names = sorted(path.name for path in model.folder.iterdir() if path.is_file())
        files = [self._registry.blobs.put(model.folder / name, name) for name in names]
        body = {
            "kind": "foundation",
            "create_us": now_us(),
            "architecture": dict(model.architecture),
            "tokenizer_digest": model.tokenizer_digest,
            "data": model.sources,
            "checks": model.checks,
            "training": dict(model.training),
            "grokfast": dict(model.grokfast),
            "code": {
                "version": version("cognateforge"),
                "digest": code_digest("cognate_server", "training_common"),
            },
        }
        store = attempt.store
        with attempt.moving(), self._registry.database.write() as connection:
            row = self._registry.publish(
                connection,
                family=FAMILY,
                state=model.state,
                job=store.job.name,
                files=files,
                body=lambda _: body,
            )
            append_event(
                connection,
                store.job.id,
                "artifact_published",
                {"name": row.name, "digest": row.digest},
                only_token=store.attempt.fencing_token,
            )
            store.move_in(connection, JobState.SUCCEEDED, message=f"published {row.name}", artifact=row.name)
        return row
