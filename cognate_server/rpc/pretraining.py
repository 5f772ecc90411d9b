"""CognatePretrainingService: convert, one domain call, convert."""

from __future__ import annotations

from typing import Any

from cognate_server import estimates
from cognate_server.plan import require_data, with_defaults
from cognate_server.settings import CognateSettings
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.cognate.v1 import pretraining_pb2_grpc
from cognateforge.exceptions import NotImplementedByServerError
from cognateforge.job.v1 import job_pb2
from training_common.compute import require_slots
from training_common.rpc.jobs import Context, Draft, JobRpcs, JobService


class PretrainingServicer(JobRpcs[pb.PretrainingJob], pretraining_pb2_grpc.CognatePretrainingServiceServicer):
    """Pretraining jobs over gRPC."""

    def __init__(
        self, jobs: JobService[pb.PretrainingJob], *, settings: CognateSettings, info: job_pb2.ServerInfo
    ) -> None:
        super().__init__(jobs, pb)
        self._settings = settings
        self._info = info

    async def StartPretraining(self, request: pb.StartPretrainingRequest, context: Context) -> Any:
        def draft() -> Draft:
            plan = with_defaults(request.plan)
            require_data(plan, self._settings.data)
            require_slots(plan.compute, self._settings.workers.slots)
            return Draft(
                plan=plan,
                total_steps=plan.total_steps,
                memory=estimates.memory(plan, self._settings),
                configuration=estimates.configuration(plan, self._settings),
                processes=max(1, plan.compute.processes),
            )

        return await self._jobs.start("StartPretraining", request, draft, pb.StartPretrainingResponse)

    async def ValidateModel(self, request: pb.ValidateModelRequest, context: Context) -> Any:
        raise NotImplementedByServerError(
            "this release validates a model once, when it is made: GetModel returns the checks"
        )

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> Any:
        return pb.GetServerInfoResponse(info=self._jobs.server_info(self._info))
