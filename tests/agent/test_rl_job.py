"""Agents that act, as jobs: submitted to a real server, trained by a real worker, published and fetched."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import pytest

from agent_server.architectures.policy import PolicyArchitecture
from cognateforge.agent.v1 import agent_pb2
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.client import AgentClient, AsyncAgentClient
from cognateforge.exceptions import InvalidFieldError
from cognateforge.job.v1 import job_pb2
from deploy.services import Services
from tests.agent.policies import plan
from tests.support.servers import running_agent


def request(asked: pb.TrainingPlan) -> pb.StartTrainingRequest:
    return pb.StartTrainingRequest(request_id=str(uuid.uuid4()), plan=asked)


async def test_an_unknown_environment_is_refused_at_submission(tmp_path: Path) -> None:
    """The caller learns the field and what is close to the name, and nothing is stored."""
    async with running_agent(tmp_path) as server, AsyncAgentClient(server.address) as agents:
        with pytest.raises(InvalidFieldError, match="close to it: CartPole-v1") as refused:
            await agents.training.StartTraining(
                request(plan(reinforcement=pb.ReinforcementTask(environment="CartPol-v1")))
            )
        assert ["plan.reinforcement.environment"] == [violation.field for violation in refused.value.violations]
        assert [] == list((await agents.training.ListJobs(pb.ListJobsRequest())).jobs)


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[AgentClient]:
    """A server in a process of its own."""
    services = Services(tmp_path / "var")
    try:
        server = services.start("agent_server", address="127.0.0.1:0", settings={})
        with AgentClient(server.address) as client:
            yield client
    finally:
        services.stop()


@pytest.mark.slow
def test_a_policy_is_trained_published_and_fetched(agents: AgentClient, tmp_path: Path) -> None:
    """From a plan to an agent that balances a pole in this process, with its figures beside it."""
    asked = plan(
        reinforcement=pb.ReinforcementTask(
            environment="CartPole-v1",
            policy_optimization=pb.PolicyOptimization(rollout_steps=32, environment_steps=2048, epochs=8),
            evaluation_episodes=4,
        )
    )
    started = agents.training.StartTraining(request(asked))
    name = started.job.job.name
    # What an environment needs is not known before it runs.
    assert (8 * 32, 0) == (started.job.job.total_steps, started.estimate.memory_bytes)
    end = next(frame.end for frame in agents.watch_job(name) if frame.HasField("end"))
    assert job_pb2.JOB_STATE_SUCCEEDED == end.state, end
    series = {one.name for one in agents.training.GetMetrics(pb.GetMetricsRequest(name=name)).series}
    assert {"return", "policy_drift", "environment_steps"} <= series

    agent = agents.agents.GetAgent(agent_pb2.GetAgentRequest(name="balancer@1")).agent
    assert ("policy", "reinforcement", "") == (agent.architecture, agent.task, agent.foundation)
    assert {"return_before", "return_random", "return_after"} <= {one.metric for one in agent.evaluations}
    assert [("CartPole-v1", "environment", 2048)] == [(one.name, one.kind, one.rows) for one in agent.data]
    fetched = agents.fetch_agent(agent.name, tmp_path / "fetched")
    assert "Acts in CartPole-v1." in (fetched.path / "README.md").read_text(encoding="utf-8")
    policy = PolicyArchitecture().load(fetched.path)
    environment = gymnasium.make("CartPole-v1")
    observation, _ = environment.reset(seed=1)
    steps, over = 0, False
    while not over:
        observation, _, terminated, truncated, _ = environment.step(policy.act(observation))
        steps, over = steps + 1, terminated or truncated
    assert steps > 1
