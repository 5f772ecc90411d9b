"""A training plan with every default in its place, and refused where this server cannot do what it asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from agent_server.adaptation import Bottleneck, Freezing, Lora
from agent_server.architectures.factory import AgentArchitecture, AgentArchitectureFactory
from agent_server.architectures.model_folder import find_folder, open_folder
from agent_server.architectures.settings import settings_of
from agent_server.data.pipeline import Limits
from agent_server.data.processor import AgentDataProcessor
from agent_server.optim import EarlyStopping, Optimization, default_warmup_steps
from agent_server.rl.config import PolicyConfig
from agent_server.rl.plan import require_acting, total_steps_of
from agent_server.settings import AgentSettings, ModelSettings
from agent_server.tasks import ACTING, WITH_ROWS
from agent_server.train_config import AgentTrainConfig, Constraints, default_validation_interval
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import (
    ArchitectureNotFoundError,
    DataUnavailableError,
    FieldViolation,
    ForgeError,
    IncompatibleError,
    InvalidFieldError,
    NotImplementedByServerError,
)
from training_common.compute import fill_defaults

# The contract's defaults that no configuration of the service holds.
DEFAULT_POLICY_OPTIMIZATION = pb.PolicyOptimization(
    rollout_steps=PolicyConfig.rollout_steps,
    environments=PolicyConfig.environments,
    epochs=PolicyConfig.epochs,
    minibatches=PolicyConfig.minibatches,
    discount=PolicyConfig.discount,
    advantage_decay=PolicyConfig.advantage_decay,
    clip_range=PolicyConfig.clip_range,
    environment_steps=PolicyConfig.environment_steps,
)


def with_defaults(plan: pb.TrainingPlan) -> pb.TrainingPlan:
    """Return a copy in which 0 has become the default that the contract names."""
    filled = pb.TrainingPlan()
    filled.CopyFrom(plan)
    if plan.WhichOneof("task") in ACTING:  # whose rollouts say how many
        filled.total_steps = total_steps_of(plan)
    filled.batch_size = plan.batch_size or AgentTrainConfig.batch_size
    filled.checkpoint_interval_steps = plan.checkpoint_interval_steps or AgentTrainConfig.checkpoint_interval_steps
    filled.validation_interval_steps = plan.validation_interval_steps or default_validation_interval(filled.total_steps)
    filled.max_tokens = plan.max_tokens or AgentTrainConfig.max_tokens
    if plan.HasField("compute"):
        fill_defaults(filled.compute)
    _fill_optimization(filled.optimization, filled.total_steps)
    _fill_adaptation(filled.adaptation)
    _fill_task(filled)
    return filled


def _fill_optimization(optimization: pb.Optimization, total_steps: int) -> None:
    optimization.peak_learning_rate = optimization.peak_learning_rate or Optimization.lr
    optimization.schedule = optimization.schedule or pb.SCHEDULE_COSINE
    if optimization.schedule != pb.SCHEDULE_ONE_CYCLE:  # whose rise is its warm-up
        optimization.warmup_steps = optimization.warmup_steps or default_warmup_steps(total_steps)
    optimization.gradient_clip_norm = optimization.gradient_clip_norm or Optimization.clip_norm
    optimization.accumulation_steps = optimization.accumulation_steps or Optimization.accumulation_steps
    optimization.precision = optimization.precision or pb.PRECISION_FLOAT32
    if optimization.HasField("early_stopping"):
        stopping = optimization.early_stopping
        stopping.patience = stopping.patience or EarlyStopping.patience
    if optimization.WhichOneof("optimizer") == "adamw":
        optimization.adamw.weight_decay = optimization.adamw.weight_decay or Optimization.weight_decay


def _fill_adaptation(adaptation: pb.Adaptation) -> None:
    match adaptation.WhichOneof("method"):
        case "lora":
            lora = adaptation.lora
            lora.rank = lora.rank or Lora.rank
            lora.alpha = lora.alpha or 2.0 * lora.rank
        case "freezing":
            freezing = adaptation.freezing
            freezing.trained_blocks = freezing.trained_blocks or Freezing.trained_blocks
        case "bottleneck":
            adaptation.bottleneck.width = adaptation.bottleneck.width or Bottleneck.width


def _fill_task(plan: pb.TrainingPlan) -> None:
    if plan.WhichOneof("task") in WITH_ROWS and not plan.data_limits.HasField("max_refused_share"):
        plan.data_limits.max_refused_share = Limits.max_refused_share
    match plan.WhichOneof("task"):
        case "preference":
            plan.preference.beta = plan.preference.beta or AgentTrainConfig.beta
        case "behavioural":
            if plan.behavioural.HasField("constraints"):
                constraints = plan.behavioural.constraints
                constraints.max_violation_share = constraints.max_violation_share or Constraints.max_violation_share
        case "reinforcement":
            _fill_acting(plan.reinforcement)
        case "multi_agent":
            _fill_acting(plan.multi_agent)
            team = plan.multi_agent
            team.coordination = team.coordination or pb.COORDINATION_SHARED_PARAMETERS


def _fill_acting(task: pb.ReinforcementTask | pb.MultiAgentTask) -> None:
    task.evaluation_episodes = task.evaluation_episodes or PolicyConfig.evaluation_episodes
    asked = task.policy_optimization
    for field, value in DEFAULT_POLICY_OPTIMIZATION.ListFields():
        if not getattr(asked, field.name):
            setattr(asked, field.name, value)


def require_feasible(plan: pb.TrainingPlan, factory: AgentArchitectureFactory, settings: AgentSettings) -> None:
    """Refuse what this server cannot do, before a row is written.

    Errors: ArchitectureNotFoundError, NotImplementedByServerError, IncompatibleError, DataUnavailableError,
    InvalidFieldError.
    """
    with _below("plan."):
        architecture = factory.get(plan.architecture)
    task = plan.WhichOneof("task") or ""
    if task not in architecture.tasks:
        served = ", ".join(architecture.tasks)
        description = f"architecture {plan.architecture} does not serve this task yet; it serves {served}"
        raise NotImplementedByServerError(
            f"plan.{task}: {description}", violations=[FieldViolation(field=f"plan.{task}", description=description)]
        )
    require_buildable(plan, architecture, settings.models)
    if task in ACTING:
        require_acting(plan, modules=settings.environments.modules)
        return
    AgentDataProcessor(settings.data).require_available(plan)


def require_buildable(plan: pb.TrainingPlan, architecture: AgentArchitecture, models: ModelSettings) -> None:
    """Refuse a base, a method of adaptation or settings that the architecture does not go with.

    Errors: IncompatibleError, InvalidFieldError, DataUnavailableError.
    """
    base, method = plan.WhichOneof("base") or "", plan.adaptation.WhichOneof("method") or ""
    if base != "agent_version" and base not in architecture.bases:
        served = " or ".join(f"plan.{kind}" for kind in architecture.bases)
        raise _incompatible(f"plan.{base}", f"architecture {architecture.name} is built on {served}")
    if method not in architecture.adaptations:
        served = ", ".join(architecture.adaptations)
        raise _incompatible(
            f"plan.adaptation.{method}", f"architecture {architecture.name} has no such adaptation; it has {served}"
        )
    if base == "scratch" and method != "full":
        raise _incompatible(f"plan.adaptation.{method}", "from scratch every parameter is trained; ask for full")
    if base == "agent_version" and plan.settings:
        text = "an agent that is trained further has the settings it was made with; leave them out"
        raise InvalidFieldError(
            f"plan.settings: {text}", violations=[FieldViolation(field="plan.settings", description=text)]
        )
    with _below("plan."):
        values = settings_of(architecture.name, architecture.settings, plan.settings)
    if wrong := architecture.violations(plan.WhichOneof("task") or "", values):
        places = {item.name: f"plan.settings[{place}]" for place, item in enumerate(plan.settings)}
        violations = [
            FieldViolation(field=places.get(v.field, "plan.settings"), description=f"{v.field}: {v.description}")
            for v in wrong
        ]
        raise InvalidFieldError("; ".join(f"{v.field}: {v.description}" for v in violations), violations=violations)
    if base == "model_folder":
        with _below("plan."):
            folder = find_folder(models, plan.model_folder.path)
            if folder.is_dir():
                open_folder(folder, plan.model_folder.path)


def _incompatible(field: str, description: str) -> IncompatibleError:
    return IncompatibleError(
        f"{field}: {description}", violations=[FieldViolation(field=field, description=description)]
    )


@contextlib.contextmanager
def _below(place: str) -> Iterator[None]:
    """Name fields by their place in the request, which the factory does not know."""
    try:
        yield
    except (ArchitectureNotFoundError, DataUnavailableError, IncompatibleError, InvalidFieldError) as error:
        violations = [FieldViolation(field=f"{place}{v.field}", description=v.description) for v in error.violations]
        moved: ForgeError = type(error)(error.message, violations=violations)
        raise moved from error
