"""CognatePretrainingService: convert, one domain call, convert."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from cognate_server.plan import require_data, with_defaults
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.cognate.v1 import pretraining_pb2_grpc
from cognateforge.exceptions import NotImplementedByServerError
from cognateforge.job.v1 import job_pb2
from training_common.compute import require_slots
from training_common.jobs.store import JobRow
from training_common.rpc.identity import current_caller
from training_common.rpc.jobs import Context, JobRpcs, JobService
from training_common.settings import DataSettings


class PretrainingServicer(JobRpcs[pb.PretrainingJob], pretraining_pb2_grpc.CognatePretrainingServiceServicer):
    """Pretraining jobs over gRPC."""

    def __init__(
        self, jobs: JobService[pb.PretrainingJob], *, data: DataSettings, slots: int, info: job_pb2.ServerInfo
    ) -> None:
        super().__init__(jobs, pb)
        self._data = data
        self._slots = slots
        self._info = info

    async def StartPretraining(self, request: pb.StartPretrainingRequest, context: Context) -> Any:
        plan = with_defaults(request.plan)
        caller = current_caller().name

        def submit(connection: sa.Connection) -> JobRow:
            # Not before: a repeated start is answered as the first time, even when the data is gone by now.
            require_data(plan, self._data)
            require_slots(plan.compute, self._slots)
            return self._jobs.store.submit(
                connection,
                plan=plan.SerializeToString(),
                total_steps=plan.total_steps,
                caller=caller,
                processes=max(1, plan.compute.processes),
            )

        answer = await self._jobs.mutate(
            "StartPretraining",
            request,
            submit,
            lambda job: pb.StartPretrainingResponse(job=job),
        )
        return pb.StartPretrainingResponse.FromString(answer)

    async def ValidateModel(self, request: pb.ValidateModelRequest, context: Context) -> Any:
        raise NotImplementedByServerError(
            "this release validates a model once, when it is made: GetModel returns the checks"
        )

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> Any:
        return pb.GetServerInfoResponse(info=self._info)
