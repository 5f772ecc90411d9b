"""Agents as artifacts: what a manifest tells of one."""

from __future__ import annotations

import dataclasses

from agent_server.data.classification import AgentDataManifest
from agent_server.foundation import Foundation
from agent_server.trainer import AgentResult
from cognateforge.agent.v1 import training_pb2 as pb
from training_common.artifacts.publish import publish_and_succeed
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.worker import WorkerAttempt

# Agents have no gate as foundation models do: an alias says which version is used for what.
STATE = "PUBLISHED"


class AgentArtifactManager:
    """The agents of one agent service. ADR-010: immutable versions, under aliases that move."""

    def __init__(self, registry: ArtifactRegistry) -> None:
        self._registry = registry

    def publish(
        self,
        result: AgentResult,
        *,
        plan: pb.TrainingPlan,
        foundation: Foundation,
        data: AgentDataManifest,
        attempt: WorkerAttempt,
    ) -> ArtifactRow:
        """Publish an agent with its lineage, and end its job as SUCCEEDED. Errors: as `publish_and_succeed`."""
        return publish_and_succeed(
            self._registry,
            attempt,
            folder=result.folder,
            family=plan.agent,
            state=STATE,
            body={
                "kind": "agent",
                "architecture": plan.architecture,
                "task": plan.WhichOneof("task"),
                "labels": list(result.labels),
                "parent": {"name": foundation.name, "digest": foundation.digest},
                "parameters": {"trainable": result.trainable_parameters, "total": result.total_parameters},
                "evaluations": [dataclasses.asdict(evaluation) for evaluation in result.evaluations],
                "data": [{"name": data.name, "kind": data.kind, "rows": data.rows["train"], "digest": data.digest}],
                "training": {"steps": result.steps, "seed": plan.seed},
            },
            code=("agent_server", "training_common"),
        )
