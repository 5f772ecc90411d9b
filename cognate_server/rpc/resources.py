"""ResourceService: the exchange's half about capacity."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import sqlalchemy as sa

from cognate_server.leases import LeaseRow, LeaseState
from cognate_server.resources import CognateResourceManager
from cognate_server.rpc import convert
from cognateforge.exchange.v1 import resource_pb2 as pb
from cognateforge.exchange.v1 import resource_pb2_grpc
from training_common.jobs.hub import ChangeHub
from training_common.rpc.identity import current_caller
from training_common.rpc.jobs import Context
from training_common.rpc.mutations import mutate


class ResourceServicer(resource_pb2_grpc.ResourceServiceServicer):
    """Capacity and leases over gRPC."""

    def __init__(self, resources: CognateResourceManager, hub: ChangeHub, *, heartbeat_s: float) -> None:
        self._resources = resources
        self._hub = hub
        self._heartbeat_s = heartbeat_s

    async def GetAvailability(self, request: pb.GetAvailabilityRequest, context: Context) -> Any:
        now = await self._resources.database.run(self._resources.availability)
        return pb.GetAvailabilityResponse(
            capacities=[convert.capacity(amounts) for amounts in now.amounts],
            running_jobs=now.running_jobs,
            queued_jobs=now.queued_jobs,
        )

    async def AcquireLease(self, request: pb.AcquireLeaseRequest, context: Context) -> Any:
        holder, kind = current_caller().name, convert.resource(request.kind)
        ttl_s = request.ttl.ToTimedelta().total_seconds()

        def acquire(connection: sa.Connection) -> pb.AcquireLeaseResponse:
            row = self._resources.acquire(connection, holder=holder, kind=kind, amount=request.amount, ttl_s=ttl_s)
            return pb.AcquireLeaseResponse(lease=convert.lease(row))

        answer = pb.AcquireLeaseResponse.FromString(
            await mutate(self._resources.database, "AcquireLease", request, acquire)
        )
        return pb.AcquireLeaseResponse(lease=await self._now(answer.lease, holder))

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Context) -> Any:
        holder, ttl_s = current_caller().name, request.ttl.ToTimedelta().total_seconds()

        def renew(connection: sa.Connection) -> pb.RenewLeaseResponse:
            row = self._resources.renew(
                connection, request.name, holder=holder, token=request.fencing_token, ttl_s=ttl_s
            )
            return pb.RenewLeaseResponse(lease=convert.lease(row))

        answer = pb.RenewLeaseResponse.FromString(await mutate(self._resources.database, "RenewLease", request, renew))
        return pb.RenewLeaseResponse(lease=await self._now(answer.lease, holder))

    async def _now(self, answered: pb.Lease, holder: str) -> pb.Lease:
        """Return a lease as it is now: a repeated answer must not say ACTIVE of one that has ended since."""
        return convert.lease(await self._resources.database.run(self._resources.leases.find, answered.name, holder))

    async def ReleaseLease(self, request: pb.ReleaseLeaseRequest, context: Context) -> Any:
        holder = current_caller().name

        def release(connection: sa.Connection) -> pb.ReleaseLeaseResponse:
            leases = self._resources.leases
            row = leases.release(connection, request.name, holder=holder, token=request.fencing_token)
            return pb.ReleaseLeaseResponse(lease=convert.lease(row))

        answer = await mutate(self._resources.database, "ReleaseLease", request, release)
        return pb.ReleaseLeaseResponse.FromString(answer)

    async def WatchLease(self, request: pb.WatchLeaseRequest, context: Context) -> AsyncIterator[pb.WatchLeaseResponse]:
        holder, run = current_caller().name, self._resources.database.run
        sent, seen = -1, 0
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        while True:
            lease: LeaseRow = await run(self._resources.leases.find, request.name, holder)
            if lease.revision != sent or loop.time() >= sent_at + self._heartbeat_s:
                yield pb.WatchLeaseResponse(lease=convert.lease(lease))
                sent, sent_at = lease.revision, loop.time()
            if lease.state is LeaseState.ENDED:
                return
            seen = await self._hub.wait(seen, max(0.0, sent_at + self._heartbeat_s - loop.time()))
