"""What a pretraining plan asks of the data pipeline."""

from __future__ import annotations

from cognate_server.data.build import DataPlan
from cognate_server.plan import curriculum, shares
from cognateforge.cognate.v1 import pretraining_pb2 as pb


def data_plan(plan: pb.PretrainingPlan) -> DataPlan:
    """Return what a plan with its defaults filled in reads. Errors: InvalidFieldError."""
    return DataPlan(
        seed=plan.seed,
        batch_size=plan.batch_size,
        sequence_length=plan.sequence_length,
        datasets=shares(plan),
        curriculum=curriculum(plan),
    )
