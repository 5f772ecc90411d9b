"""CognatePretrainingService: convert, one domain call, convert."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from cognate_server import estimates
from cognate_server.plan import require_data, with_defaults
from cognate_server.reservations import Calendar
from cognate_server.rpc import convert
from cognate_server.settings import CognateSettings
from cognate_server.validating import ModelValidator
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.cognate.v1 import pretraining_pb2_grpc
from cognateforge.job.v1 import job_pb2
from training_common.compute import require_at_most, require_slots
from training_common.jobs.queue import Demand
from training_common.rpc import paging
from training_common.rpc.convert import moment_us
from training_common.rpc.identity import current_caller
from training_common.rpc.jobs import Context, Draft, JobRpcs, JobService
from training_common.rpc.mutations import mutate


class PretrainingServicer(JobRpcs[pb.PretrainingJob], pretraining_pb2_grpc.CognatePretrainingServiceServicer):
    """Pretraining jobs over gRPC."""

    def __init__(
        self,
        jobs: JobService[pb.PretrainingJob],
        *,
        calendar: Calendar,
        settings: CognateSettings,
        validator: ModelValidator,
        info: job_pb2.ServerInfo,
    ) -> None:
        super().__init__(jobs, pb)
        self._validator = validator
        self._calendar = calendar
        self._settings = settings
        self._info = info

    async def StartPretraining(self, request: pb.StartPretrainingRequest, context: Context) -> Any:
        def draft() -> Draft:
            plan = with_defaults(request.plan)
            require_data(plan, self._settings.data)
            require_slots(plan.compute, self._settings.workers)
            if request.reservation:
                with self._calendar.database.read() as connection:
                    reserved = self._calendar.require_open(connection, request.reservation)
                require_at_most(plan.compute, reserved.slots, request.reservation)
            return Draft(
                plan=plan,
                total_steps=plan.total_steps,
                memory=estimates.memory(plan, self._settings),
                configuration=estimates.configuration(plan, self._settings),
                demand=Demand(processes=max(1, plan.compute.processes), nodes=max(1, plan.compute.nodes)),
                reservation=request.reservation,
            )

        return await self._jobs.start("StartPretraining", request, draft, pb.StartPretrainingResponse)

    async def CreateReservation(self, request: pb.CreateReservationRequest, context: Context) -> Any:
        caller = current_caller().name
        start_us, end_us = (moment_us(request, field) for field in ("start_time", "end_time"))

        def create(connection: sa.Connection) -> pb.CreateReservationResponse:
            row = self._calendar.create(
                connection,
                caller=caller,
                slots=request.slots,
                start_us=start_us,
                end_us=end_us,
                purpose=request.purpose,
            )
            return pb.CreateReservationResponse(reservation=convert.reservation(row))

        stored = await mutate(self._calendar.database, "CreateReservation", request, create)
        return pb.CreateReservationResponse.FromString(stored)

    async def ListReservations(self, request: pb.ListReservationsRequest, context: Context) -> Any:
        before = paging.read_token(request, request.page_token)
        size = paging.page_size(request.page_size)
        rows = await self._calendar.database.run(
            lambda: self._calendar.page(include_ended=request.include_ended, before_id=before, limit=size + 1)
        )
        token = paging.make_token(request, rows[size - 1].id) if len(rows) > size else ""
        return pb.ListReservationsResponse(
            reservations=[convert.reservation(row) for row in rows[:size]], next_page_token=token
        )

    async def CancelReservation(self, request: pb.CancelReservationRequest, context: Context) -> Any:
        def cancel(connection: sa.Connection) -> pb.CancelReservationResponse:
            row = self._calendar.cancel(connection, request.name)
            return pb.CancelReservationResponse(reservation=convert.reservation(row))

        stored = await mutate(self._calendar.database, "CancelReservation", request, cancel)
        return pb.CancelReservationResponse.FromString(stored)

    async def ValidateModel(self, request: pb.ValidateModelRequest, context: Context) -> Any:
        return pb.ValidateModelResponse.FromString(await self._validator.validate(request))

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> Any:
        return pb.GetServerInfoResponse(info=self._jobs.server_info(self._info))
