"""What a server survives: watches made to fill it, and a store that is locked."""

import asyncio
import contextlib
import sqlite3
import uuid
from collections.abc import Awaitable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from cognateforge.client import AsyncCognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from cognateforge.exceptions import DeadlineExceededError, ResourceExhaustedError, from_rpc_error
from tests.support.servers import running_cognate
from training_common.rpc.server import HEALTH


async def health(channel: grpc.aio.Channel, service: str = "") -> str:
    """Return a service's status by the standard health service."""
    check: grpc.aio.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
    check = channel.unary_unary(
        f"/{HEALTH}/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def test_watches_leave_room_for_short_calls_and_health(tmp_path: Path) -> None:
    """Clients that only wait cannot lock the others out: the watch too many is refused with a reason, for a while."""
    async with (
        running_cognate(tmp_path, limits={"max_concurrent_rpcs": 5}) as server,
        AsyncCognateClient(server.address) as client,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        plan = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=pb.PretrainingPlan(total_steps=9))
        name = (await client.pretraining.StartPretraining(plan)).job.job.name
        request = pb.WatchJobRequest(name=name)
        calls = [client.pretraining.WatchJob(request, timeout=30) for _ in range(3)]
        for call in calls:
            await anext(aiter(call))
        watch: grpc.aio.UnaryStreamMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
        watch = channel.unary_stream(
            f"/{HEALTH}/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        standard = watch(health_pb2.HealthCheckRequest(), timeout=30)
        await anext(aiter(standard))
        with pytest.raises(ResourceExhaustedError, match="4 streams are open"):
            await anext(aiter(client.pretraining.WatchJob(request, timeout=30)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(watch(health_pb2.HealthCheckRequest(), timeout=30)))
        assert isinstance(from_rpc_error(caught.value), ResourceExhaustedError)
        assert "SERVING" == await health(channel)
        assert name == (await client.pretraining.GetJob(pb.GetJobRequest(name=name))).job.job.name
        standard.cancel()
        calls[0].cancel()
        for _ in range(2):
            await until_served(client, request)


async def until_served(client: AsyncCognateClient, request: pb.WatchJobRequest) -> None:
    """Open a watch and leave it open, as soon as an ended one has made room."""
    async with asyncio.timeout(10):
        while True:
            try:
                call = client.pretraining.WatchJob(request, timeout=30)
                await anext(aiter(call))
            except ResourceExhaustedError:
                await asyncio.sleep(0.01)
            else:
                return


async def test_mutations_that_wait_for_the_store_hold_up_no_reader(tmp_path: Path) -> None:
    """Twenty starts whose clients gave up wait for a locked database: lists, watches and health are served."""

    def start(client: AsyncCognateClient, timeout: float) -> Awaitable[pb.StartPretrainingResponse]:
        request = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=pb.PretrainingPlan(total_steps=9))
        return client.pretraining.StartPretraining(request, timeout=timeout)

    async with (
        running_cognate(tmp_path) as server,
        AsyncCognateClient(server.address) as client,
        # Another one, because its breaker holds calls back after so many failures.
        AsyncCognateClient(server.address) as impatient,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        name = (await start(client, 10)).job.job.name
        with contextlib.closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as backup:
            backup.execute("BEGIN IMMEDIATE")
            answers = await asyncio.gather(*(start(impatient, 0.5) for _ in range(20)), return_exceptions=True)
            assert [DeadlineExceededError] * 20 == [type(answer) for answer in answers]
            listed = await client.pretraining.ListJobs(pb.ListJobsRequest(), timeout=10)
            assert [name] == [job.job.name for job in listed.jobs]
            watch = client.pretraining.WatchJob(pb.WatchJobRequest(name=name), timeout=10)
            assert 1 == (await anext(aiter(watch))).frame.event.sequence
            assert "SERVING" == await health(channel)
        assert (await start(client, 10)).job.job.name
