"""Memory of an agent's worker, and what makes two jobs equally fast. Free of torch: the server asks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from agent_server.adaptation import Adaptation, ParameterCount
from agent_server.architectures.factory import AgentArchitecture
from agent_server.settings import AgentSettings
from agent_server.train_config import adaptation_of
from cognateforge.agent.v1 import training_pb2 as pb
from training_common.compute import parts_of, rows_of_each
from training_common.jobs.speed import configuration_of

_MIB = 2**20
_FLOAT_BYTES = 4
# Measured by bench `estimates`: a worker before its model, and what a row of a step leaves behind until its gradient is
# known. Texts are cut at 128 tokens, and most are shorter.
RUNTIME_BYTES = 680 * _MIB
ROW_BYTES = 15 * _MIB


@runtime_checkable
class SizedArchitecture(Protocol):
    """An architecture that can tell how large its agents are. Of others no memory is estimated."""

    def parameters(self, adaptation: Adaptation) -> ParameterCount:
        """Return the parameters of an agent's base and adapters, without its task head, which is small."""


def memory(plan: pb.TrainingPlan, architecture: AgentArchitecture, settings: AgentSettings) -> Mapping[str, int]:
    """Return the bytes of the parts of a worker's first process at its peak; of others all but the checkpoint's copy.

    None where sizes are not known. plan: with its defaults filled in.
    """
    if not isinstance(architecture, SizedArchitecture):
        return {}
    count = architecture.parameters(adaptation_of(plan))
    trained = _FLOAT_BYTES * count.trainable
    moments = {"adamw": 2, "adam": 2, "sgd": 1 if plan.optimization.sgd.momentum else 0}
    optimizer = moments[plan.optimization.WhichOneof("optimizer") or "adamw"] * trained
    model, processes = _FLOAT_BYTES * count.total, parts_of(plan.compute)
    parts = {
        "runtime": RUNTIME_BYTES,
        "weights": model // processes,
        "gradients": trained // processes,
        "optimizer": optimizer // processes,
        "activations": ROW_BYTES * rows_of_each(plan.batch_size, plan.compute),
    }
    if processes > 1:
        parts["gathered"] = 2 * model  # weights and gradients in a step, the model and its state where it is measured
    # Where it is parted, it is whole while it is written.
    if settings.workers.checkpoints == "async" or processes > 1:
        parts["checkpoint_copy"] = trained + optimizer
    return parts


def configuration(plan: pb.TrainingPlan, settings: AgentSettings) -> str:
    """Return a digest of what decides how long a step takes."""
    speed = pb.TrainingPlan()
    speed.CopyFrom(plan)
    for field in ("agent", "total_steps", "seed", "checkpoint_policy"):
        speed.ClearField(field)
    for rate in ("peak_learning_rate", "schedule", "warmup_steps", "gradient_clip_norm"):
        speed.optimization.ClearField(rate)
    workers = settings.workers
    facts = {"threads": workers.threads, "slots": workers.slots, "checkpoints": workers.checkpoints}
    return configuration_of(speed, facts)
