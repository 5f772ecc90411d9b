"""What goes with every call: request id, deadline; and which calls are repeated."""

from __future__ import annotations

import json
import threading
import time
import uuid

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from cognateforge import exceptions
from cognateforge.client import deadline_budget, deadline_within
from cognateforge.client.retry import service_config
from cognateforge.client.services import AGENT, COGNATE
from tests.client.fakes import Driver, Fake, driver


async def test_every_call_carries_a_request_id(client: Driver, fake: Fake) -> None:
    """Unary or stream: a UUID of its own, unless the caller gives one."""
    await client.get_job()
    await client.get_job()
    await client.stream()
    await client.get_job(metadata=(("x-request-id", "mine"),))
    *made, given = [call.metadata["x-request-id"] for call in fake.script.calls]
    assert len({uuid.UUID(one) for one in made}) == 3
    assert given == "mine"


async def test_every_unary_call_has_a_deadline(kind: str, fake: Fake) -> None:
    """The default where the caller sets none, the caller's own otherwise. A stream has none."""
    async with driver(kind, fake.address, timeout_s=7.0) as client:
        await client.get_job()
        await client.get_job(timeout=3.0)
        await client.stream()
    default, own, stream = [call.time_remaining_s for call in fake.script.calls]
    assert pytest.approx(7.0, abs=0.5) == default
    assert pytest.approx(3.0, abs=0.5) == own
    assert stream > 1e6


async def test_no_call_outlives_the_callers_budget(client: Driver, fake: Fake) -> None:
    """A call gets what is left of the caller's deadline, if that is less; a spent budget sends nothing."""
    with deadline_within(2.0), deadline_within(60.0):
        await client.get_job(timeout=30.0)
        await client.stream()
    assert all(1.0 < call.time_remaining_s < 2.5 for call in fake.script.calls)
    token = deadline_budget.set(time.monotonic() - 1)
    try:
        for call in (client.get_job, client.stream):
            with pytest.raises(exceptions.DeadlineExceededError, match="before this call was sent"):
                await call()
    finally:
        deadline_budget.reset(token)
    assert len(fake.script.calls) == 2


async def test_a_deadline_that_passes_is_a_typed_error(client: Driver, fake: Fake) -> None:
    """DeadlineExceededError, whatever the server is busy with."""
    fake.script.gate = threading.Event()
    with pytest.raises(exceptions.DeadlineExceededError):
        await client.get_job(timeout=0.1)


async def test_an_unavailable_answer_is_retried_where_the_policy_allows(client: Driver, fake: Fake) -> None:
    """GetJob is REPEAT_SAFE: two refusals stay unseen."""
    fake.script.failures.extend([grpc.StatusCode.UNAVAILABLE] * 2)
    assert "jobs/" in (await client.get_job()).job.name
    assert fake.script.count("GetJob") == 3


async def test_other_failures_are_not_retried(client: Driver, fake: Fake) -> None:
    """Only UNAVAILABLE says that nothing happened."""
    fake.script.failures.append(grpc.StatusCode.INTERNAL)
    with pytest.raises(exceptions.InternalError):
        await client.get_job()
    assert fake.script.count("GetJob") == 1


async def test_a_method_without_policy_is_not_retried(client: Driver, fake: Fake) -> None:
    """Health.Check is not of this contract: one refusal is the answer."""
    fake.script.failures.append(grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(exceptions.UnavailableError):
        await client.health()
    assert fake.script.count("Check") == 1
    assert await client.health() == "SERVING"


def test_the_retry_policy_is_read_from_the_descriptors() -> None:
    """Every method of the contract that may be repeated is named, and one that says nothing is not."""
    [config] = json.loads(service_config([*COGNATE, *AGENT]))["methodConfig"]
    assert config["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    named = {f"{entry['service']}/{entry['method']}" for entry in config["name"]}
    assert {f"{s.full_name}/{m.name}" for s in [*COGNATE, *AGENT] for m in s.methods} == named

    pool = descriptor_pool.DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(name="x.proto", package="x", syntax="proto3")
    file.message_type.add(name="M")
    file.service.add(name="S").method.add(name="Once", input_type=".x.M", output_type=".x.M")
    pool.Add(file)
    assert "methodConfig" not in json.loads(service_config([pool.FindServiceByName("x.S")]))
