"""Evaluations on request: a short-lived process measures, and its result is kept with the answer."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from agent_server.agents import Measured, find_agent, keep_evaluations, require_there
from agent_server.settings import EvaluationSettings
from cognateforge.agent.v1 import agent_pb2
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import FieldViolation, IncompatibleError
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.scrub import require_whole
from training_common.rpc.identity import current_caller
from training_common.rpc.mutations import mutate
from training_common.settings import ArtifactSettings, DataSettings
from training_common.side_process import SideProcesses
from training_common.store.database import Turn

METHOD = "EvaluateAgent"
MODULE = "agent_server.evaluate"


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a process finds things.

    files_dir, artifacts: the registry's blobs. data, hub_dir: sets. modules: environments.
    """

    files_dir: Path
    hub_dir: Path
    artifacts: ArtifactSettings
    data: DataSettings
    modules: tuple[str, ...] = ()


class Evaluator:
    """Evaluates agents of one registry.

    scratch: a folder of this server's own; what it holds is removed. places: where a process finds things beside the
    agent. module: what it runs.
    """

    def __init__(
        self,
        registry: ArtifactRegistry,
        settings: EvaluationSettings,
        *,
        scratch: Path,
        places: Places,
        module: str = MODULE,
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._places = places
        self._processes = SideProcesses(
            registry.database,
            method=METHOD,
            module=module,
            scratch=scratch,
            what="evaluations",
            at_once=settings.at_once,
            setting="evaluation.at_once",
        )

    @property
    def callers(self) -> int:
        """How many callers wait for an evaluation."""
        return self._processes.callers

    async def evaluate(self, request: pb.EvaluateAgentRequest) -> bytes:
        """Return the answer's bytes: the stored one, that of an evaluation under way, or of a new one.

        When the last of its callers has gone, the evaluation is ended.
        Errors: AgentNotFoundError, also for one that is collected meanwhile; IncompatibleError, and those of
        `SideProcesses`.
        """
        row = await self._registry.database.run(find_agent, self._registry, request.name)
        return await self._processes.answer(
            request, lambda: self._run(request, row), require=lambda: _require_task(request, row)
        )

    async def _run(self, request: pb.EvaluateAgentRequest, row: ArtifactRow) -> bytes:
        try:
            await asyncio.to_thread(require_whole, self._registry, row)
            told = await self._processes.result(self._order(request, row))
        except Exception:
            # The bytes of a version that is collected go away under the process: that is what there is to tell.
            await self._registry.database.run(self._require_there, row)
            raise
        found = [Measured(**measured) for measured in told]
        made = {"caller": current_caller().name, "request_id": request.request_id}

        def keep(connection: sa.Connection) -> pb.EvaluateAgentResponse:
            self._registry.database.in_turn(connection, Turn.ALIASES)  # no collection comes between
            require_there(connection, row)
            keep_evaluations(connection, row, found, **made)
            return pb.EvaluateAgentResponse(evaluations=map(_message, found))

        return await mutate(self._registry.database, METHOD, request, keep)

    def _require_there(self, row: ArtifactRow) -> None:
        with self._registry.database.read() as connection:
            require_there(connection, row)

    def _order(self, request: pb.EvaluateAgentRequest, row: ArtifactRow) -> Mapping[str, object]:
        return {
            "files_dir": str(self._places.files_dir.resolve()),
            "artifacts": self._places.artifacts.model_dump(mode="json"),
            "hub_dir": str(self._places.hub_dir.resolve()),
            "data": self._places.data.model_dump(mode="json"),
            "modules": list(self._places.modules),
            "manifest": row.manifest.decode(),
            "threads": self._settings.threads,
            "request": base64.b64encode(request.SerializeToString()).decode(),
        }


def _require_task(request: pb.EvaluateAgentRequest, row: ArtifactRow) -> None:
    """Refuse a set of another task than the agent's."""
    task = next(field.name for field, _ in request.ListFields() if field.message_type is not None)
    if task != row.body["task"]:
        description = (
            f"{row.name} was trained for {row.body['task']}: give a set of that task, in the field of its name"
        )
        raise IncompatibleError(
            f"{task}: {description}", violations=[FieldViolation(field=task, description=description)]
        )


def _message(measured: Measured) -> agent_pb2.Evaluation:
    return agent_pb2.Evaluation(
        metric=measured.metric, dataset=measured.dataset, value=measured.value, rows=measured.rows
    )
