"""Tenants over real connections: who a caller's jobs count for, and what a quota does to them."""

import uuid
from pathlib import Path
from typing import Any

import pytest

from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.client import AsyncAgentClient
from cognateforge.exceptions import QuotaTooSmallError
from cognateforge.job.v1 import job_pb2
from tests.support.servers import running_agent


def start(**changes: Any) -> pb.StartTrainingRequest:
    plan = pb.TrainingPlan(
        agent="intent-router",
        architecture="cognate",
        foundation=pb.FoundationBase(name="cognate-25m"),
        classification=pb.ClassificationTask(generated=pb.GeneratedSource(seed=5)),
        adaptation=pb.Adaptation(lora=pb.LoraAdaptation()),
        optimization=pb.Optimization(adamw=pb.AdamW()),
        total_steps=40,
    )
    return pb.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=plan, **changes)


async def test_a_job_that_its_quota_keeps_back_is_told_so(tmp_path: Path) -> None:
    """A caller of a tenant without slots: its job is taken in, and waits for the quota and not for a slot."""
    tenants = {"visitors": {"callers": ["local"], "slots": 0}}
    with pytest.raises(QuotaTooSmallError, match="tenant visitors holds 0 of its quota of 0"):
        async with running_agent(tmp_path, tenants=tenants) as server, AsyncAgentClient(server.address) as agents:
            await agents.training.StartTraining(start())
    tenants = {"visitors": {"callers": ["local"]}}
    async with running_agent(tmp_path, tenants=tenants) as server, AsyncAgentClient(server.address) as agents:
        job = (await agents.training.StartTraining(start())).job.job
        assert job_pb2.WAIT_REASON_SLOT == job.wait.reason
    tenants = {"visitors": {"callers": ["local"], "slots": 0}}
    async with running_agent(tmp_path, tenants=tenants) as server, AsyncAgentClient(server.address) as agents:
        job = (await agents.training.GetJob(pb.GetJobRequest(name=job.name))).job.job
    assert (job_pb2.WAIT_REASON_QUOTA, 1) == (job.wait.reason, job.wait.queue_position)
    assert "it takes 1 of slots, and tenant visitors holds 0 of its quota of 0" == job.wait.message


async def test_a_job_larger_than_its_quota_is_refused_dry_or_not(tmp_path: Path) -> None:
    """Memory as estimated; the answer names the plan, the tenant and the bound, and nothing is stored."""
    tenants = {"default": {"memory_bytes": 1 << 20}}
    async with running_agent(tmp_path, tenants=tenants) as server, AsyncAgentClient(server.address) as agents:
        for dry in (True, False):
            with pytest.raises(QuotaTooSmallError, match="tenant default holds 0 of its quota of 1048576") as caught:
                await agents.training.StartTraining(start(validate_only=dry))
            assert ["plan"] == [violation.field for violation in caught.value.violations]
        assert [] == list((await agents.training.ListJobs(pb.ListJobsRequest())).jobs)
