"""Plans of agents that act: how many steps they take, their configuration, and what cannot be done. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agent_server.architectures.factory import SettingValue
from agent_server.rl.config import PolicyConfig
from agent_server.rl.lookup import look_up
from agent_server.train_config import optimization_of
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import FieldViolation, InvalidFieldError, NotImplementedByServerError

_COORDINATIONS = {
    pb.COORDINATION_UNSPECIFIED: "shared_parameters",
    pb.COORDINATION_INDEPENDENT: "independent",
    pb.COORDINATION_SHARED_PARAMETERS: "shared_parameters",
    pb.COORDINATION_CENTRALIZED_CRITIC: "centralized_critic",
}
# Where a plan has a configuration's fields; {task} is the task's field.
_OF_TASK = ("environment", "agents", "coordination", "evaluation_episodes")
_RENAMED = {
    "optimization.lr": "optimization.peak_learning_rate",
    "optimization.clip_norm": "optimization.gradient_clip_norm",
}
_OF_PLAN = ("agent", "architecture", "seed", "checkpoint_interval_steps", "validation_interval_steps")


def acting_task(plan: pb.TrainingPlan) -> pb.ReinforcementTask | pb.MultiAgentTask:
    """Return the task of a plan whose agents act."""
    return plan.multi_agent if plan.WhichOneof("task") == "multi_agent" else plan.reinforcement


def total_steps_of(plan: pb.TrainingPlan) -> int:
    """Return the gradient steps that a plan's rollouts come to, with the contract's defaults where it has zeros."""
    asked = acting_task(plan).policy_optimization
    samples = (asked.rollout_steps or PolicyConfig.rollout_steps) * (asked.environments or PolicyConfig.environments)
    updates = -(-(asked.environment_steps or PolicyConfig.environment_steps) // samples)
    return updates * (asked.epochs or PolicyConfig.epochs) * (asked.minibatches or PolicyConfig.minibatches)


def policy_config(
    plan: pb.TrainingPlan,
    *,
    modules: tuple[str, ...],
    settings: Mapping[str, SettingValue],
    parent: str = "",
    parent_digest: str = "",
) -> PolicyConfig:
    """Return the configuration of a plan.

    modules: what environments may be in, beside the registries. settings: the architecture's, defaults filled in.
    Errors: InvalidFieldError, with the fields' places in the request.
    """
    task, name = acting_task(plan), plan.WhichOneof("task") or ""
    asked = task.policy_optimization
    try:
        return PolicyConfig(
            agent=plan.agent,
            architecture=plan.architecture,
            task=name,
            environment=task.environment,
            modules=modules,
            agents=task.agents if isinstance(task, pb.MultiAgentTask) else 1,
            coordination=_COORDINATIONS[task.coordination] if isinstance(task, pb.MultiAgentTask) else "independent",
            rollout_steps=asked.rollout_steps or PolicyConfig.rollout_steps,
            environments=asked.environments or PolicyConfig.environments,
            epochs=asked.epochs or PolicyConfig.epochs,
            minibatches=asked.minibatches or PolicyConfig.minibatches,
            discount=asked.discount or PolicyConfig.discount,
            advantage_decay=asked.advantage_decay or PolicyConfig.advantage_decay,
            clip_range=asked.clip_range or PolicyConfig.clip_range,
            entropy_weight=asked.entropy_weight,
            environment_steps=asked.environment_steps or PolicyConfig.environment_steps,
            evaluation_episodes=task.evaluation_episodes or PolicyConfig.evaluation_episodes,
            optimization=optimization_of(plan),
            seed=plan.seed,
            checkpoint_interval_steps=plan.checkpoint_interval_steps or PolicyConfig.checkpoint_interval_steps,
            validation_interval_steps=plan.validation_interval_steps,
            settings=dict(settings),
            parent=parent,
            parent_digest=parent_digest,
        )
    except InvalidFieldError as error:
        violations = [FieldViolation(field=_place(v.field, name), description=v.description) for v in error.violations]
        raise InvalidFieldError(error.message, violations=violations) from error


def _place(field: str, task: str) -> str:
    if field in _OF_PLAN or field.startswith("optimization."):
        return f"plan.{_RENAMED.get(field, field)}"
    return f"plan.{task}.{field}" if field in _OF_TASK else f"plan.{task}.policy_optimization.{field}"


def require_acting(plan: pb.TrainingPlan, *, modules: tuple[str, ...]) -> None:
    """Refuse a plan whose environment this server lacks, or that asks for what acting agents are not trained with.

    plan: with its defaults filled in. Errors: InvalidFieldError, NotImplementedByServerError.
    """
    name = plan.WhichOneof("task") or ""
    look_up(name, acting_task(plan).environment, modules=modules, field=f"plan.{name}.environment")
    violations = [FieldViolation(field=field, description=description) for field, description in _not_served(plan)]
    if violations:
        text = "; ".join(f"{v.field} {v.description}" for v in violations)
        raise NotImplementedByServerError(f"an agent that acts is not trained so: {text}", violations=violations)
    policy_config(plan, modules=modules, settings={})


def _not_served(plan: pb.TrainingPlan) -> Iterator[tuple[str, str]]:
    """Yield what policy optimization would not read, with its remedy."""
    optimization = plan.optimization
    if plan.compute.processes > 1:
        yield "plan.compute.processes", "must be 1: episodes are played in one process"
    if plan.HasField("rehearsal"):
        yield "plan.rehearsal", "must be absent: there are no rows"
    if optimization.accumulation_steps > 1:
        yield "plan.optimization.accumulation_steps", "must be 1; raise minibatches to need less memory"
    if optimization.precision == pb.PRECISION_BFLOAT16:
        yield "plan.optimization.precision", "must be float32: ratios of probabilities need its precision"
    if optimization.schedule == pb.SCHEDULE_PLATEAU:
        yield "plan.optimization.schedule", "must be another one: returns vary too much between validations"
    if optimization.HasField("early_stopping"):
        yield "plan.optimization.early_stopping", "must be absent; ask for fewer environment_steps"
