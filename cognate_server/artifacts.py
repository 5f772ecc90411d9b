"""Foundation models as artifacts: what a manifest tells of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognate_server.card import model_card
from cognate_server.models import FAMILY
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from training_common.artifacts.cards import CARD_FILE
from training_common.artifacts.publish import publish_and_succeed
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.worker import WorkerAttempt


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a pretraining job made: its folder of files, and everything that its manifest tells.

    state: "READY" or "EXPERIMENTAL".
    architecture: name, fingerprint, parameter_count, act_version, ltm_version.
    sources: name, kind, rows and digest of each set that was trained on.
    results: metric, dataset, value and rows of everything that was measured on a named set.
    recovery: every action of the recovery manager, in order.
    """

    folder: Path
    state: str
    architecture: Mapping[str, Any]
    tokenizer_digest: str
    sources: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    results: list[dict[str, Any]]
    training: Mapping[str, Any]
    grokfast: Mapping[str, Any]
    recovery: list[dict[str, Any]]


class CognateArtifactManager:
    """The foundation models of one Cognate service. ADR-010: content-addressed, immutable, versioned."""

    def __init__(self, registry: ArtifactRegistry) -> None:
        self._registry = registry

    def publish(self, model: TrainedModel, attempt: WorkerAttempt) -> ArtifactRow:
        """Publish a model and end its job as SUCCEEDED, both or neither. Errors: as `publish_and_succeed`."""
        (model.folder / CARD_FILE).write_text(model_card(FAMILY, model), encoding="utf-8")
        return publish_and_succeed(
            self._registry,
            attempt,
            folder=model.folder,
            family=FAMILY,
            state=model.state,
            body={
                "kind": "foundation",
                "architecture": dict(model.architecture),
                "tokenizer_digest": model.tokenizer_digest,
                "data": model.sources,
                "checks": model.checks,
                "results": model.results,
                "training": dict(model.training),
                "grokfast": dict(model.grokfast),
                "recovery": model.recovery,
            },
            service="cognate",
            code=("cognate_server", "training_common"),
            plan=pb.PretrainingPlan.FromString(attempt.store.job.plan),
        )
