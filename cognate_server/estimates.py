"""Memory of a pretraining worker, and what makes two jobs equally fast. Free of torch: the server asks it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from cognate_server.settings import CognateSettings
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from training_common.compute import parts_of, rows_of_each
from training_common.jobs.speed import configuration_of
from training_common.models.fingerprints import COGNATE_V1_25M_PARAMETERS

_MIB = 2**20
_FLOAT_BYTES = 4
# Measured by bench `estimates`: a worker before its model, what a token of a step leaves behind until
# its gradient is known, and what products in bfloat16 keep for every number of tokens that they have met.
RUNTIME_BYTES = 590 * _MIB
TOKEN_BYTES = round(0.8 * _MIB)
BFLOAT16_KERNEL_BYTES = 1500 * _MIB


def memory(plan: pb.PretrainingPlan, settings: CognateSettings) -> Mapping[str, int]:
    """Return the bytes of the parts of a worker's first process at its peak; of others all but the checkpoint's copy.

    plan: with its defaults filled in.
    """
    model, processes = _FLOAT_BYTES * COGNATE_V1_25M_PARAMETERS, parts_of(plan.compute)
    parts = {
        "runtime": RUNTIME_BYTES,
        "weights": model // processes,
        "gradients": model // processes,
        "optimizer": 2 * model // processes,
        "filter": model // processes,
        "activations": TOKEN_BYTES * rows_of_each(plan.batch_size, plan.compute) * plan.sequence_length,
    }
    if processes > 1:
        parts["gathered"] = 2 * model  # weights and gradients in a step, the model and its state where it is measured
    controls = len(plan.acceleration_control.learning_rate_factors) if plan.HasField("acceleration_control") else 0
    if controls:
        parts["control"] = controls * 4 * model  # weights, gradients, two moments
    if settings.workers.checkpoints == "async":
        parts["checkpoint_copy"] = (4 + 3 * controls) * model  # all of it but gradients
    elif processes > 1:
        parts["checkpoint_copy"] = 4 * model  # whole only while it is written
    precision = settings.pretraining.precision
    if precision == "bfloat16" or (precision == "auto" and _multiplies_bfloat16()):
        parts["kernels"] = BFLOAT16_KERNEL_BYTES
    return parts


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether workers choose bfloat16 here, as torch would tell. Where nobody can say: yes, which needs more."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return True
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def configuration(plan: pb.PretrainingPlan, settings: CognateSettings) -> str:
    """Return a digest of what decides how long a step takes."""
    speed = pb.PretrainingPlan()
    speed.CopyFrom(plan)
    for field in ("total_steps", "seed", "peak_learning_rate", "warmup_steps", "checkpoint_policy"):
        speed.ClearField(field)
    if speed.HasField("curriculum"):
        speed.curriculum.ClearField("steps")
    workers = settings.workers
    facts = {
        "threads": workers.threads,
        "slots": workers.slots,
        "checkpoints": workers.checkpoints,
        "precision": settings.pretraining.precision,
    }
    return configuration_of(speed, facts, service=settings.SERVICE)
