"""From rows and manifests to the messages of agent/v1."""

from __future__ import annotations

from collections.abc import Iterable

from agent_server.architectures.factory import AgentArchitecture
from agent_server.foundation import CircuitSnapshot
from cognateforge.agent.v1 import agent_pb2, training_pb2
from cognateforge.job.v1 import job_pb2
from training_common.artifacts.registry import ArtifactRow
from training_common.jobs.store import JobRow
from training_common.rpc import convert


def job(row: JobRow) -> training_pb2.TrainingJob:
    """Return a training job."""
    return training_pb2.TrainingJob(
        job=convert.job(row),
        plan=training_pb2.TrainingPlan.FromString(row.plan),
        foundation=row.facts.get("foundation", ""),
        foundation_digest=row.facts.get("foundation_digest", ""),
    )


def agent(row: ArtifactRow, aliases: Iterable[str]) -> agent_pb2.Agent:
    """Return a published agent, out of its manifest."""
    body = row.body
    return agent_pb2.Agent(
        name=row.name,
        aliases=aliases,
        digest=row.digest,
        architecture=body["architecture"],
        task=body["task"],
        labels=body["labels"],
        foundation=body["parent"]["name"],
        foundation_digest=body["parent"]["digest"],
        files=convert.files(row),
        size_bytes=row.size_bytes,
        create_time=convert.timestamp(row.create_us),
        job=row.job,
        trainable_parameters=body["parameters"]["trainable"],
        total_parameters=body["parameters"]["total"],
        evaluations=[agent_pb2.Evaluation(**evaluation) for evaluation in body["evaluations"]],
        data=convert.data_sources(row),
    )


def peer(snapshot: CircuitSnapshot) -> job_pb2.Peer:
    """Return how the calls to another service fare."""
    return job_pb2.Peer(
        name=snapshot.name,
        circuit=job_pb2.Circuit.Value(f"CIRCUIT_{snapshot.state.upper().replace('-', '_')}"),
        admitted=snapshot.admitted,
        failed=snapshot.failed,
        refused=snapshot.refused,
        opened=snapshot.opened,
    )


def architecture(item: AgentArchitecture) -> training_pb2.AgentArchitecture:
    """Return what an installed architecture says of itself."""
    required = item.required_architecture
    return training_pb2.AgentArchitecture(
        name=item.name,
        tasks=item.tasks,
        description=item.description,
        foundation_fingerprint=required.fingerprint if required else "",
    )
