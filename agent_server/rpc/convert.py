"""From rows and manifests to the messages of agent/v1."""

from __future__ import annotations

from collections.abc import Mapping

from agent_server.agents import MAX_EVALUATIONS, Lifecycle, Measured, MoveRow, Standing
from agent_server.architectures.factory import AgentArchitecture, PluginProblem
from agent_server.architectures.settings import Setting
from agent_server.data.check import Checked
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


def agent(row: ArtifactRow, standing: Standing) -> agent_pb2.Agent:
    """Return a published agent, out of its manifest and what the store tells beside it.

    Evaluations are the manifest's own, then the newest of those that came later, as many as fit.
    """
    body = row.body
    own = [agent_pb2.Evaluation(**evaluation) for evaluation in body["evaluations"]]
    made_of = body.get("made_of", {})  # unknown to releases of before
    later = standing.later[-room:] if (room := MAX_EVALUATIONS - len(own)) > 0 else ()
    return agent_pb2.Agent(
        name=row.name,
        aliases=standing.aliases,
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
        evaluations=[*own, *(evaluation(measured) for measured in later)],
        data=convert.data_sources(row),
        lifecycle=agent_pb2.Lifecycle.Value(f"LIFECYCLE_{standing.lifecycle.value}"),
        parent=made_of["name"] if made_of.get("kind") == "agent_version" else "",
        storage=convert.storage(row, standing.dependents),
    )


def data_report(checked: Checked) -> training_pb2.DataReport:
    """Return what became of the rows of a set, within the bounds of its message."""
    report = checked.report

    def counts(reasons: Mapping[str, int]) -> list[training_pb2.RowCount]:
        return [training_pb2.RowCount(reason=reason[:64], rows=rows) for reason, rows in list(reasons.items())[:64]]

    return training_pb2.DataReport(
        dataset=checked.dataset[:128],
        rows_read=report["rows_read"],
        rows_kept=report["rows_kept"],
        refused=counts(report["refused"]),
        left_out=counts(report["left_out"]),
        findings=[
            training_pb2.DataFinding(
                file=finding["file"][-255:],
                line=finding["line"],
                field=finding["field"][:128],
                reason=finding["reason"][:64],
                detail=finding["detail"][:500],
                remedy=finding["remedy"][:500],
            )
            for finding in report["findings"][:50]
        ],
    )


def evaluation(measured: Measured) -> agent_pb2.Evaluation:
    """Return what was measured after a version was published."""
    return agent_pb2.Evaluation(
        metric=measured.metric, dataset=measured.dataset, value=measured.value, rows=measured.rows
    )


def to_lifecycle(value: agent_pb2.Lifecycle.ValueType) -> Lifecycle:
    """Return the state that a request names."""
    return Lifecycle(agent_pb2.Lifecycle.Name(value).removeprefix("LIFECYCLE_"))


def move(row: MoveRow) -> agent_pb2.Move:
    """Return a move of an alias, or along the lifecycle."""
    made = agent_pb2.Move(time=convert.timestamp(row.time_us), caller=row.caller, version=row.version)
    if row.alias is not None:
        made.alias.CopyFrom(agent_pb2.AliasMove(alias=row.alias, from_version=row.from_version or 0))
    else:
        made.lifecycle.CopyFrom(
            agent_pb2.LifecycleMove(
                from_lifecycle=agent_pb2.Lifecycle.Value(f"LIFECYCLE_{row.from_lifecycle}"),
                to_lifecycle=agent_pb2.Lifecycle.Value(f"LIFECYCLE_{row.to_lifecycle}"),
            )
        )
    return made


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
        bases=[training_pb2.BaseKind.Value(f"BASE_KIND_{kind.upper()}") for kind in item.bases],
        settings=[_setting(name, setting) for name, setting in item.settings.items()],
        adaptations=item.adaptations,
    )


def _setting(name: str, setting: Setting) -> training_pb2.ArchitectureSettingSpec:
    spec = training_pb2.ArchitectureSettingSpec(
        name=name,
        description=setting.description,
        minimum=setting.minimum,
        maximum=setting.maximum,
        words=setting.words,
    )
    setattr(spec, setting.field, setting.default)
    return spec


def architecture_problem(problem: PluginProblem) -> training_pb2.ArchitectureProblem:
    """Return a plugin that could not be loaded, and why."""
    return training_pb2.ArchitectureProblem(name=problem.name, value=problem.value, reason=problem.reason)
