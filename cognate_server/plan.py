"""A pretraining plan with every default in its place."""

from __future__ import annotations

from cognate_server.data.curriculum import DEFAULT_INITIAL_COMPETENCE, Curriculum
from cognate_server.data.sources import DatasetShare, SourceSettings, parse_share, require_available
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from training_common.compute import fill_defaults
from training_common.settings import DataSettings

DEFAULT_BATCH_SIZE = 4
DEFAULT_SEQUENCE_LENGTH = 128
DEFAULT_PEAK_LEARNING_RATE = 7.5e-4
DEFAULT_CHECKPOINT_INTERVAL_STEPS = 100
# From the same rate to that of GrokFast's largest step: 1 + lambda.
DEFAULT_CONTROL_FACTORS = (1.0, 2.0, 3.0)


def with_defaults(plan: pb.PretrainingPlan) -> pb.PretrainingPlan:
    """Return a copy in which 0 has become the default that the contract names."""
    filled = pb.PretrainingPlan()
    filled.CopyFrom(plan)
    filled.batch_size = plan.batch_size or DEFAULT_BATCH_SIZE
    filled.sequence_length = plan.sequence_length or DEFAULT_SEQUENCE_LENGTH
    filled.peak_learning_rate = plan.peak_learning_rate or DEFAULT_PEAK_LEARNING_RATE
    filled.warmup_steps = plan.warmup_steps or max(1, plan.total_steps // 10)
    filled.checkpoint_interval_steps = plan.checkpoint_interval_steps or DEFAULT_CHECKPOINT_INTERVAL_STEPS
    filled.progress_interval_steps = plan.progress_interval_steps or 1
    if plan.HasField("compute"):
        fill_defaults(filled.compute)
    if plan.HasField("curriculum"):
        filled.curriculum.steps = plan.curriculum.steps or max(1, plan.total_steps // 2)
        filled.curriculum.initial_competence = plan.curriculum.initial_competence or DEFAULT_INITIAL_COMPETENCE
    if plan.HasField("acceleration_control") and not plan.acceleration_control.learning_rate_factors:
        filled.acceleration_control.learning_rate_factors.extend(DEFAULT_CONTROL_FACTORS)
    return filled


def shares(plan: pb.PretrainingPlan) -> tuple[DatasetShare, ...]:
    """Return the plan's sets as the data pipeline names them. Errors: InvalidFieldError."""
    return tuple(parse_share(pb.Dataset.Name(share.dataset), share.weight) for share in plan.datasets)


def curriculum(plan: pb.PretrainingPlan) -> Curriculum | None:
    """Return the order of a plan with its defaults filled in; None where every document may be drawn at once."""
    if not plan.HasField("curriculum"):
        return None
    return Curriculum(steps=plan.curriculum.steps, initial_competence=plan.curriculum.initial_competence)


def source_settings(data: DataSettings) -> SourceSettings:
    """Return what the server's settings let its jobs read."""
    return SourceSettings(folder=data.folder, hub=data.hub)


def require_data(plan: pb.PretrainingPlan, data: DataSettings) -> None:
    """Refuse a plan whose sets cannot be had here, before a row is written. Errors: DataUnavailableError."""
    require_available(shares(plan), source_settings(data))
