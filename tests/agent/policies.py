"""Plans of agents that act, and a factory with their architecture, whatever is installed. Free of torch."""

import functools
from typing import Any

from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.architectures.policy import PolicyArchitecture
from cognateforge.agent.v1 import training_pb2 as pb


@functools.cache
def policies() -> AgentArchitectureFactory:
    """Return the factory."""
    return AgentArchitectureFactory(given=[PolicyArchitecture()])


def plan(**changes: Any) -> pb.TrainingPlan:
    """Return a plan that is fine but for the given fields."""
    values = {
        "agent": "balancer",
        "architecture": "policy",
        "scratch": pb.ScratchBase(),
        "reinforcement": pb.ReinforcementTask(environment="CartPole-v1"),
        "adaptation": pb.Adaptation(full=pb.FullAdaptation()),
        "optimization": pb.Optimization(adam=pb.Adam()),
        "total_steps": 1,
        **changes,
    }
    return pb.TrainingPlan(**{name: value for name, value in values.items() if value is not None})
