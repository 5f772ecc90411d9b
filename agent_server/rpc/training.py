"""AgentForgeTrainingService: convert, one domain call, convert."""

from __future__ import annotations

import asyncio
from typing import Any

import sqlalchemy as sa

from agent_server import foundation
from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.plan import require_feasible, with_defaults
from agent_server.rpc import convert
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.agent.v1 import training_pb2_grpc
from cognateforge.exceptions import NotImplementedByServerError, PreconditionError
from cognateforge.job.v1 import job_pb2
from training_common.compute import require_slots
from training_common.jobs.store import JobRow
from training_common.rpc.identity import current_caller
from training_common.rpc.jobs import Context, JobRpcs, JobService
from training_common.settings import DataSettings


class TrainingServicer(JobRpcs[pb.TrainingJob], training_pb2_grpc.AgentForgeTrainingServiceServicer):
    """Training jobs over gRPC."""

    def __init__(
        self,
        jobs: JobService[pb.TrainingJob],
        *,
        factory: AgentArchitectureFactory,
        data: DataSettings,
        slots: int,
        cognate: foundation.CognateLink,
        info: job_pb2.ServerInfo,
    ) -> None:
        super().__init__(jobs, pb)
        self._factory = factory
        self._data = data
        self._slots = slots
        self._cognate = cognate
        self._info = info

    async def StartTraining(self, request: pb.StartTrainingRequest, context: Context) -> Any:
        plan = with_defaults(request.plan)
        caller = current_caller().name
        refused = await asyncio.to_thread(self._ask_cognate, plan, context.time_remaining())

        def submit(connection: sa.Connection) -> JobRow:
            # Not before: a repeated start is answered as the first time, even when the data is gone by now.
            require_feasible(plan, self._factory, self._data)
            require_slots(plan.compute, self._slots)
            if refused is not None:
                raise refused
            return self._jobs.store.submit(
                connection,
                plan=plan.SerializeToString(),
                total_steps=plan.total_steps,
                caller=caller,
                processes=max(1, plan.compute.processes),
            )

        answer = await self._jobs.mutate(
            "StartTraining",
            request,
            submit,
            lambda job: pb.StartTrainingResponse(job=job),
        )
        return pb.StartTrainingResponse.FromString(answer)

    def _ask_cognate(self, plan: pb.TrainingPlan, caller_left_s: float | None) -> PreconditionError | None:
        architecture = self._factory.architectures.get(plan.architecture)
        if architecture is None:
            return None
        return foundation.refusal(
            self._cognate,
            plan.foundation.name,
            accept_experimental=plan.foundation.accept_experimental,
            required=architecture.required_architecture,
            caller_left_s=caller_left_s,
        )

    async def EvaluateAgent(self, request: pb.EvaluateAgentRequest, context: Context) -> Any:
        raise NotImplementedByServerError(
            "this release evaluates an agent once, before it is published: GetAgent returns the results"
        )

    async def ListArchitectures(self, request: pb.ListArchitecturesRequest, context: Context) -> Any:
        return pb.ListArchitecturesResponse(architectures=[convert.architecture(item) for item in self._factory])

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> Any:
        info = job_pb2.ServerInfo(
            version=self._info.version,
            capabilities=self._info.capabilities,
            peers=[convert.peer(self._cognate.snapshot())],
        )
        return pb.GetServerInfoResponse(info=info)
