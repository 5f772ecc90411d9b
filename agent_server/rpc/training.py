"""AgentForgeTrainingService: convert, one domain call, convert."""

from __future__ import annotations

import asyncio
from typing import Any

import sqlalchemy as sa

from agent_server import descents, estimates, foundation
from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.bases import below, find_base
from agent_server.data.check import RowChecker
from agent_server.evaluating import Evaluator
from agent_server.plan import require_feasible, with_defaults
from agent_server.resources import AgentResourceManager
from agent_server.rpc import convert
from agent_server.settings import AgentSettings
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.agent.v1 import training_pb2_grpc
from cognateforge.exceptions import PreconditionError
from cognateforge.job.v1 import job_pb2
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.compute import require_slots
from training_common.jobs.store import JobRow
from training_common.rpc.identity import current_caller
from training_common.rpc.jobs import Context, Draft, JobRpcs, JobService


class TrainingServicer(JobRpcs[pb.TrainingJob], training_pb2_grpc.AgentForgeTrainingServiceServicer):
    """Training jobs over gRPC."""

    def __init__(
        self,
        jobs: JobService[pb.TrainingJob],
        *,
        factory: AgentArchitectureFactory,
        settings: AgentSettings,
        cognate: foundation.CognateLink,
        resources: AgentResourceManager,
        evaluator: Evaluator,
        registry: ArtifactRegistry,
        info: job_pb2.ServerInfo,
    ) -> None:
        super().__init__(jobs, pb)
        self._factory = factory
        self._settings = settings
        self._cognate = cognate
        self._resources = resources
        self._evaluator = evaluator
        self._registry = registry
        self._info = info
        self._rows = RowChecker(settings.data, hub_dir=settings.files_dir / "hub")

    async def StartTraining(self, request: pb.StartTrainingRequest, context: Context) -> Any:
        plan, caller = with_defaults(request.plan), current_caller().name
        base = None
        if plan.WhichOneof("base") == "agent_version":
            base = await self._registry.database.run_brief(find_base, plan, self._registry)
        refused = await asyncio.to_thread(self._ask_cognate, plan, base, context.time_remaining())

        def hold(connection: sa.Connection, job: JobRow) -> None:
            """Keep what the job starts from. A foundation that is no exact version yet is kept once a worker knows."""
            if base is not None:
                descents.hold_agent(connection, self._registry, base, job.name)
            elif descents.is_exact(plan.foundation.name):
                descents.hold_model(connection, plan.foundation.name, job.name)

        def draft() -> Draft:
            require_feasible(plan, self._factory, self._settings)
            require_slots(plan.compute, self._settings.workers)
            if refused is not None:
                raise refused
            memory = estimates.memory(plan, self._factory.get(plan.architecture), self._settings)
            return Draft(
                plan=plan,
                total_steps=plan.total_steps,
                memory=memory,
                configuration=estimates.configuration(plan, self._settings),
                demand=self._resources.demand(
                    caller,
                    sum(memory.values()),
                    processes=max(1, plan.compute.processes),
                    nodes=max(1, plan.compute.nodes),
                ),
                also=hold,
            )

        answer = await self._jobs.start("StartTraining", request, draft, pb.StartTrainingResponse)
        left_s = context.time_remaining()
        if request.validate_only and left_s is not None:
            checked = await self._rows.check(plan, within_s=left_s)
            if checked is not None:
                answer.data_report.CopyFrom(convert.data_report(checked))
        return answer

    def _ask_cognate(
        self, plan: pb.TrainingPlan, base: ArtifactRow | None, caller_left_s: float | None
    ) -> PreconditionError | None:
        if base is not None:
            return foundation.refusal_below(self._cognate, base.name, below(base), caller_left_s=caller_left_s)
        architecture = self._factory.architectures.get(plan.architecture)
        if architecture is None or plan.WhichOneof("base") != "foundation":
            return None
        return foundation.refusal(
            self._cognate,
            plan.foundation.name,
            accept_experimental=plan.foundation.accept_experimental,
            required=architecture.required_architecture,
            caller_left_s=caller_left_s,
        )

    async def EvaluateAgent(self, request: pb.EvaluateAgentRequest, context: Context) -> Any:
        return pb.EvaluateAgentResponse.FromString(await self._evaluator.evaluate(request))

    async def ListArchitectures(self, request: pb.ListArchitecturesRequest, context: Context) -> Any:
        return pb.ListArchitecturesResponse(
            architectures=[convert.architecture(item) for item in self._factory],
            problems=[convert.architecture_problem(problem) for problem in self._factory.problems],
        )

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> Any:
        peers = [convert.peer(self._cognate.snapshot())]
        return pb.GetServerInfoResponse(info=self._jobs.server_info(self._info, peers))
