"""A training plan with every default in its place, and refused where this server cannot do what it asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from agent_server.architectures.factory import AgentArchitectureFactory
from agent_server.data.classification import AgentDataProcessor, ClassificationSource
from cognateforge.agent.v1 import training_pb2 as pb
from cognateforge.exceptions import (
    ArchitectureNotFoundError,
    DataUnavailableError,
    FieldViolation,
    ForgeError,
    InvalidFieldError,
    NotImplementedByServerError,
)
from training_common.compute import fill_defaults
from training_common.settings import DataSettings

DEFAULT_BATCH_SIZE = 32
DEFAULT_PEAK_LEARNING_RATE = 1e-3
DEFAULT_CHECKPOINT_INTERVAL_STEPS = 100
DEFAULT_WEIGHT_DECAY = 0.01
DEFAULT_LORA_RANK = 8


def with_defaults(plan: pb.TrainingPlan) -> pb.TrainingPlan:
    """Return a copy in which 0 has become the default that the contract names."""
    filled = pb.TrainingPlan()
    filled.CopyFrom(plan)
    filled.batch_size = plan.batch_size or DEFAULT_BATCH_SIZE
    filled.checkpoint_interval_steps = plan.checkpoint_interval_steps or DEFAULT_CHECKPOINT_INTERVAL_STEPS
    if plan.HasField("compute"):
        fill_defaults(filled.compute)
    optimization = filled.optimization
    optimization.peak_learning_rate = optimization.peak_learning_rate or DEFAULT_PEAK_LEARNING_RATE
    optimization.schedule = optimization.schedule or pb.SCHEDULE_COSINE
    optimization.warmup_steps = optimization.warmup_steps or max(1, plan.total_steps // 10)
    optimization.gradient_clip_norm = optimization.gradient_clip_norm or 1.0
    if optimization.WhichOneof("optimizer") == "adamw":
        optimization.adamw.weight_decay = optimization.adamw.weight_decay or DEFAULT_WEIGHT_DECAY
    if filled.adaptation.WhichOneof("method") == "lora":
        lora = filled.adaptation.lora
        lora.rank = lora.rank or DEFAULT_LORA_RANK
        lora.alpha = lora.alpha or 2.0 * lora.rank
    return filled


def require_feasible(plan: pb.TrainingPlan, factory: AgentArchitectureFactory, data: DataSettings) -> None:
    """Refuse what this server cannot do, before a row is written.

    Errors: ArchitectureNotFoundError, NotImplementedByServerError, DataUnavailableError, InvalidFieldError.
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
    with _below("plan.classification.file."):
        AgentDataProcessor(folder=data.folder).require_available(classification_source(plan.classification))


@contextlib.contextmanager
def _below(place: str) -> Iterator[None]:
    """Name fields by their place in the request, which factory and data pipeline do not know."""
    try:
        yield
    except (ArchitectureNotFoundError, DataUnavailableError, InvalidFieldError) as error:
        violations = [FieldViolation(field=f"{place}{v.field}", description=v.description) for v in error.violations]
        moved: ForgeError = type(error)(error.message, violations=violations)
        raise moved from error


def classification_source(task: pb.ClassificationTask) -> ClassificationSource:
    """Return a task's rows as the data pipeline names them."""
    return ClassificationSource(
        path=task.file.path if task.WhichOneof("source") == "file" else None,
        generator_seed=task.generated.seed,
        include_out_of_scope=task.include_out_of_scope,
        max_rows_per_label=task.max_rows_per_label,
        domains=tuple(task.domains),
    )
