"""Options of `forge train` for agents that act in an environment."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cognateforge.agent.v1 import training_pb2

Environment = Annotated[
    str, typer.Option(help="For reinforcement and multi-agent: where to act, for instance CartPole-v1.")
]
Agents = Annotated[int, typer.Option(help="For multi-agent: how many act.")]
RolloutSteps = Annotated[int, typer.Option(help="Steps of each environment between updates. 0: 128.")]
Environments = Annotated[int, typer.Option(help="Environments side by side. 0: 8.")]
Epochs = Annotated[int, typer.Option(help="Passes over each rollout. 0: 4.")]
Minibatches = Annotated[int, typer.Option(help="Parts of a rollout in each pass. 0: 4.")]
Discount = Annotated[float, typer.Option(help="Of future rewards. 0: 0.99.")]
AdvantageDecay = Annotated[float, typer.Option(help="Of advantage estimates. 0: 0.95.")]
ClipRange = Annotated[float, typer.Option(help="How far probabilities may change before it is clipped. 0: 0.2.")]
EntropyWeight = Annotated[float, typer.Option(help="Keeps a policy curious. 0: none.")]
EnvironmentSteps = Annotated[int, typer.Option(help="Steps of all environments together. 0: 100,000.")]
EvaluationEpisodes = Annotated[int, typer.Option(help="Episodes of each measurement. 0: 20.")]


class CoordinationKind(enum.StrEnum):
    """Who learns what, where several agents act."""

    INDEPENDENT = "independent"
    SHARED_PARAMETERS = "shared-parameters"
    CENTRALIZED_CRITIC = "centralized-critic"


Coordination = Annotated[
    CoordinationKind | None, typer.Option(help="For multi-agent: who learns what. Default: shared-parameters.")
]


@dataclass(frozen=True, kw_only=True)
class Acting:
    """What the options say."""

    environment: str
    agents: int
    coordination: CoordinationKind | None
    rollout_steps: int
    environments: int
    epochs: int
    minibatches: int
    discount: float
    advantage_decay: float
    clip_range: float
    entropy_weight: float
    environment_steps: int
    evaluation_episodes: int


def refuse_acting(acting: Acting, task: str) -> None:
    """Refuse an option that a task of rows would not heed."""
    for name, given in vars(acting).items():
        if given:
            raise typer.BadParameter(f"is for reinforcement and multi-agent, not {task}", param_hint=_option(name))


def set_acting(plan: training_pb2.TrainingPlan, acting: Acting, *, together: bool) -> None:
    """Set the task of a plan. together: of several agents."""
    from cognateforge.agent.v1 import training_pb2 as pb

    if not acting.environment:
        raise typer.BadParameter("is needed to act in", param_hint="--environment")
    if together and not acting.agents:
        raise typer.BadParameter("is needed: how many act?", param_hint="--agents")
    if not together and (acting.agents or acting.coordination):
        raise typer.BadParameter("are for multi-agent", param_hint="--agents, --coordination")
    task = plan.multi_agent if together else plan.reinforcement
    task.environment = acting.environment
    task.evaluation_episodes = acting.evaluation_episodes
    task.policy_optimization.CopyFrom(
        pb.PolicyOptimization(
            rollout_steps=acting.rollout_steps,
            environments=acting.environments,
            epochs=acting.epochs,
            minibatches=acting.minibatches,
            discount=acting.discount,
            advantage_decay=acting.advantage_decay,
            clip_range=acting.clip_range,
            entropy_weight=acting.entropy_weight,
            environment_steps=acting.environment_steps,
        )
    )
    if together:
        plan.multi_agent.agents = acting.agents
        if acting.coordination is not None:
            plan.multi_agent.coordination = pb.Coordination.Value(f"COORDINATION_{acting.coordination.name}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
