"""Memory of an agent's worker, and what makes two jobs equally fast. Free of torch: the server asks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from agent_server.adaptation import Adaptation, ParameterCount
from agent_server.architectures.factory import AgentArchitecture
from agent_server.rl.plan import acting_task
from agent_server.settings import AgentSettings
from agent_server.tasks import ACTING
from agent_server.train_config import adaptation_of
from cognateforge.agent.v1 import training_pb2 as pb
from training_common.compute import parts_of, rows_of_each
from training_common.jobs.speed import configuration_of

_MIB = 2**20
_FLOAT_BYTES = 4
# Measured by bench `estimates`: a worker before its model, and what a row of a step leaves behind until its gradient is
# known. Texts are cut at 128 tokens, and most are shorter. DoRA keeps each layer's output twice more; where no gradient
# goes through the base, a layer's values are gone with the next one's.
RUNTIME_BYTES = 680 * _MIB
ROW_BYTES = 15 * _MIB
DORA_ROW_BYTES = 28 * _MIB
FROZEN_ROW_BYTES = 5 * _MIB


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
    adaptation = adaptation_of(plan)
    count = architecture.parameters(adaptation)
    trained = _FLOAT_BYTES * count.trainable
    moments = {"adamw": 2, "adam": 2, "sgd": 1 if plan.optimization.sgd.momentum else 0}
    optimizer = moments[plan.optimization.WhichOneof("optimizer") or "adamw"] * trained
    model, processes = _FLOAT_BYTES * count.total, parts_of(plan.compute)
    parts = {
        "runtime": RUNTIME_BYTES,
        "weights": model // processes,
        "gradients": trained // processes,
        "optimizer": optimizer // processes,
        "activations": row_bytes(adaptation, count) * _rows_at_once(plan),
    }
    if plan.optimization.HasField("early_stopping"):
        parts["best_weights"] = trained // processes
    if processes > 1:
        parts["gathered"] = 2 * model  # weights and gradients in a step, the model and its state where it is measured
    # Where it is parted, it is whole while it is written.
    if settings.workers.checkpoints == "async" or processes > 1:
        parts["checkpoint_copy"] = trained + optimizer
    return parts


def _rows_at_once(plan: pb.TrainingPlan) -> int:
    """Return the most rows that a process takes in one piece of a step."""
    return -(-rows_of_each(plan.batch_size, plan.compute) // max(1, plan.optimization.accumulation_steps))


def row_bytes(adaptation: Adaptation, count: ParameterCount) -> int:
    """Return what a row leaves behind: the more, the further a gradient has to go."""
    if adaptation.unfreeze_act_ltm or adaptation.method in ("full", "bottleneck"):
        return ROW_BYTES
    if adaptation.lora is not None:
        return DORA_ROW_BYTES if adaptation.lora.weight_decomposed else ROW_BYTES
    share = count.trainable / count.total if adaptation.freezing is not None else 0.0
    return FROZEN_ROW_BYTES + round(share * (ROW_BYTES - FROZEN_ROW_BYTES))


def configuration(plan: pb.TrainingPlan, settings: AgentSettings) -> str:
    """Return a digest of what decides how long a step takes."""
    speed = pb.TrainingPlan()
    speed.CopyFrom(plan)
    for field in ("agent", "total_steps", "seed", "checkpoint_policy", "validation_interval_steps"):
        speed.ClearField(field)
    for rate in ("peak_learning_rate", "schedule", "warmup_steps", "gradient_clip_norm", "early_stopping"):
        speed.optimization.ClearField(rate)
    if plan.WhichOneof("task") in ACTING:
        acting_task(speed).policy_optimization.ClearField("environment_steps")
    workers = settings.workers
    facts = {"threads": workers.threads, "slots": workers.slots, "checkpoints": workers.checkpoints}
    return configuration_of(speed, facts, service=settings.SERVICE)
