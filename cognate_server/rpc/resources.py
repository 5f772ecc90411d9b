"""ResourceService: the exchange's half about capacity."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from cognate_server.resources import CognateResourceManager
from cognateforge.exceptions import NotImplementedByServerError
from cognateforge.exchange.v1 import resource_pb2 as pb
from cognateforge.exchange.v1 import resource_pb2_grpc
from training_common.rpc.jobs import Context

_NO_LEASES = "this release lends no capacity: GetAvailability tells what there is, train on the agent's own host"


class ResourceServicer(resource_pb2_grpc.ResourceServiceServicer):
    """Capacity over gRPC."""

    def __init__(self, resources: CognateResourceManager) -> None:
        self._resources = resources

    async def GetAvailability(self, request: pb.GetAvailabilityRequest, context: Context) -> Any:
        now = await self._resources.database.run(self._resources.availability)
        return pb.GetAvailabilityResponse(
            capacities=[
                pb.Capacity(kind=pb.RESOURCE_KIND_CPU, total=now.cores, held=now.cores_held),
                pb.Capacity(kind=pb.RESOURCE_KIND_MEMORY, total=now.memory_bytes, held=now.memory_held_bytes),
            ],
            running_jobs=now.running_jobs,
            queued_jobs=now.queued_jobs,
        )

    async def AcquireLease(self, request: pb.AcquireLeaseRequest, context: Context) -> Any:
        raise NotImplementedByServerError(_NO_LEASES)

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Context) -> Any:
        raise NotImplementedByServerError(_NO_LEASES)

    async def ReleaseLease(self, request: pb.ReleaseLeaseRequest, context: Context) -> Any:
        raise NotImplementedByServerError(_NO_LEASES)

    async def WatchLease(self, request: pb.WatchLeaseRequest, context: Context) -> AsyncIterator[pb.WatchLeaseResponse]:
        raise NotImplementedByServerError(_NO_LEASES)
        yield pb.WatchLeaseResponse()
