"""Agents as artifacts: what a manifest tells of one, and what lies beside its weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from agent_server.agents import record_agent
from agent_server.bases import Base
from agent_server.card import CardFacts, model_card, running
from agent_server.data.examples import DataManifest
from agent_server.package import copy_licences
from agent_server.trainer import AgentResult
from cognateforge.agent.v1 import training_pb2 as pb
from training_common.artifacts.cards import CARD_FILE
from training_common.artifacts.publish import publish_and_succeed
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.statement import Ancestor, statement_in
from training_common.worker import WorkerAttempt

# Agents have no gate as foundation models do: their lifecycle and their aliases say which version is used for what.
STATE = "PUBLISHED"


class AgentArtifactManager:
    """The agents of one agent service. ADR-010: immutable versions, under aliases that move.

    data_folder: where sets, and their licences, are.
    """

    def __init__(self, registry: ArtifactRegistry, *, data_folder: Path | None = None) -> None:
        self._registry = registry
        self._data_folder = data_folder

    def publish(
        self,
        result: AgentResult,
        *,
        plan: pb.TrainingPlan,
        base: Base,
        data: DataManifest,
        attempt: WorkerAttempt,
    ) -> ArtifactRow:
        """Publish an agent with its lineage, and end its job as SUCCEEDED. Errors: as `publish_and_succeed`."""
        body = self._body(result, plan, base, data)
        self._complete(result, plan=plan, base=base, data=data, body={**body, "job": attempt.job})
        return publish_and_succeed(
            self._registry,
            attempt,
            folder=result.folder,
            family=plan.agent,
            state=STATE,
            body=body,
            service="agent",
            code=("agent_server", "training_common"),
            plan=plan,
            made_of=ancestors(plan, base),
            also=record_agent,
        )

    @staticmethod
    def _body(result: AgentResult, plan: pb.TrainingPlan, base: Base, data: DataManifest) -> dict[str, Any]:
        """Return the manifest's own part."""
        return {
            "kind": "agent",
            "architecture": plan.architecture,
            "task": plan.WhichOneof("task"),
            "labels": list(result.labels),
            "parent": {"name": base.foundation, "digest": base.foundation_digest},
            "made_of": {"kind": plan.WhichOneof("base"), "name": base.name, "digest": base.digest},
            "parameters": {"trainable": result.trainable_parameters, "total": result.total_parameters},
            "evaluations": [dataclasses.asdict(evaluation) for evaluation in result.evaluations],
            "data": [{"name": data.name, "kind": data.kind, "rows": data.rows["train"], "digest": data.digest}],
            "training": {"steps": result.steps, "seed": plan.seed},
            "recovery": [dataclasses.asdict(event) for event in result.recovery],
            "readiness": [{**dataclasses.asdict(check), "passed": check.passed} for check in result.checks],
        }

    def _complete(
        self, result: AgentResult, *, plan: pb.TrainingPlan, base: Base, data: DataManifest, body: Mapping[str, Any]
    ) -> None:
        """Write what people and programs read of an agent beside running it."""
        folder, task = result.folder, str(plan.WhichOneof("task"))
        licences = copy_licences(self._data_folder, _path_of(getattr(plan, task)), folder)
        card = folder / CARD_FILE
        if card.exists():  # a policy has a card of its own
            runs = running("an observation as JSON") if (folder / "run.py").exists() else ""
            card.write_text(card.read_text(encoding="utf-8") + runs, encoding="utf-8")
        else:
            card.write_text(model_card(self._facts(result, plan, base, data, licences)), encoding="utf-8")
        _write(folder / "metrics.json", {"evaluations": body["evaluations"]})
        told = ("job", "architecture", "task", "parent", "made_of", "data", "training")
        lineage = {"agent": plan.agent, **{name: body[name] for name in told}}
        # The manifest's word for it is older than agents that are made of agents.
        lineage["foundation"] = lineage.pop("parent")
        _write(folder / "lineage.json", {**lineage, "files": list(data.files), "licences": licences})

    @staticmethod
    def _facts(
        result: AgentResult, plan: pb.TrainingPlan, base: Base, data: DataManifest, licences: list[str]
    ) -> CardFacts:
        return CardFacts(
            agent=plan.agent,
            architecture=plan.architecture,
            task=str(plan.WhichOneof("task")),
            labels=result.labels,
            base=base,
            data=data,
            licences=licences,
            config=json.loads((result.folder / "config.json").read_text(encoding="utf-8")),
            evaluations=result.evaluations,
            trainable_parameters=result.trainable_parameters,
            total_parameters=result.total_parameters,
            runs=(result.folder / "run.py").exists(),
        )


def ancestors(plan: pb.TrainingPlan, base: Base) -> list[Ancestor]:
    """Return what an agent descends from, the nearest first."""
    kind = str(plan.WhichOneof("base"))
    nearest, told = statement_in(base.base_dir if kind == "foundation" else base.agent_dir)
    below = [] if kind == "foundation" else told.get("made_of", [])
    found = []
    if kind == "agent_version":
        found.append(Ancestor(role="agent", name=base.name, digest=base.digest, statement=nearest))
    elif kind == "model_folder":
        found.append(Ancestor(role=kind, name=base.name, digest=base.digest))
    if base.foundation:
        # Below an agent, that agent's own statement tells of the foundation's.
        of_agent = next((item["statement"] for item in below if item["digest"] == base.foundation_digest), "")
        found.append(
            Ancestor(
                role="foundation",
                name=base.foundation,
                digest=base.foundation_digest,
                statement=nearest if kind == "foundation" else of_agent,
            )
        )
    return found


def _path_of(task: Message) -> str:
    """Return the path of a task's rows in the data folder, nothing where they come from elsewhere."""
    return str(task.file.path) if "file" in task.DESCRIPTOR.fields_by_name else ""  # type: ignore[attr-defined]


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
