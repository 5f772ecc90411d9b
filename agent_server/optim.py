"""The optimizers and schedules that an agent may be trained with: the standard ones, and nothing else.

The learning rate of a step is a pure function of the step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cognateforge.exceptions import FieldViolation

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

_COSINE_FLOOR = 0.1  # the contract's SCHEDULE_COSINE falls to a tenth
_MAX_MOMENTUM = 0.999  # the contract's bound


class OptimizerKind(enum.StrEnum):
    """The contract's optimizers, by their field names."""

    ADAMW = "adamw"
    ADAM = "adam"
    SGD = "sgd"


class Schedule(enum.StrEnum):
    """The learning rate over time, after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Which standard optimizer, how fast. Defaults are the contract's.

    lr: highest learning rate, of the adapted base's parameters; the task head's is `head_lr_scale` times that, since it
        starts from random values.
    warmup_steps: steps of linear warm-up, or None for a tenth of the run.
    clip_norm: gradients are scaled down to this norm.
    """

    optimizer: OptimizerKind = OptimizerKind.ADAMW
    lr: float = 1e-3
    head_lr_scale: float = 3.0
    weight_decay: float = 0.01
    momentum: float = 0.0
    schedule: Schedule = Schedule.COSINE
    warmup_steps: int | None = None
    clip_norm: float = 1.0

    def violations(self, prefix: str, total_steps: int) -> list[FieldViolation]:
        """Return what is wrong with the values, by field name."""
        warmup = self.warmup_steps
        rules = (
            ("optimizer", self.optimizer in set(OptimizerKind), "must be adamw, adam or sgd"),
            ("lr", 0 < self.lr <= 1, "must be above 0 and at most 1"),
            ("head_lr_scale", 0 < self.head_lr_scale <= 1000, "must be above 0 and at most 1000"),
            ("weight_decay", 0 <= self.weight_decay <= 1, "must be 0 to 1"),
            ("momentum", 0 <= self.momentum <= _MAX_MOMENTUM, f"must be 0 to {_MAX_MOMENTUM}"),
            ("schedule", self.schedule in set(Schedule), "must be constant, linear or cosine"),
            ("warmup_steps", warmup is None or 0 <= warmup <= total_steps, f"must be 0 to total_steps ({total_steps})"),
            ("clip_norm", 0 < self.clip_norm <= 1000, "must be above 0 and at most 1000"),
        )
        return [
            FieldViolation(field=f"{prefix}{field}", description=f"{rule}, not {getattr(self, field)}")
            for field, holds, rule in rules
            if not holds
        ]


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """Return the share of the peak learning rate that step `step`, counted from 0, is taken with.

    The last step of a linear schedule is taken with a little more than 0, so that none is wasted.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule is Schedule.LINEAR:
        return 1 - done
    if schedule is Schedule.COSINE:
        return _COSINE_FLOOR + (1 - _COSINE_FLOOR) * (1 + math.cos(math.pi * done)) / 2
    return 1.0


def warmup_steps(config: Optimization, total_steps: int) -> int:
    """Return the steps of warm-up with the default filled in."""
    return total_steps // 10 if config.warmup_steps is None else config.warmup_steps


def build_optimizer(config: Optimization, *, base: Sequence[Parameter], head: Sequence[Parameter]) -> Optimizer:
    """Return the optimizer of the parameters that are trained, matrices decayed and vectors not.

    Every group keeps its own peak in `peak_lr`; `set_lr` gives all of them their rate of a step.
    """
    from torch import optim
    from torch.distributed.tensor import DTensor

    groups = [
        {"params": params, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for members, lr in ((base, config.lr), (head, config.lr * config.head_lr_scale))
        for params, decay in (
            ([p for p in members if p.ndim >= 2], config.weight_decay),
            ([p for p in members if p.ndim < 2], 0.0),
        )
        if params
    ]
    # Fused: on CPU the loop over tensors costs about six times as much.
    if config.optimizer is OptimizerKind.ADAMW:
        return optim.AdamW(groups, fused=True)
    for group in groups:
        group["weight_decay"] = 0.0  # the contract gives decay to AdamW alone
    if config.optimizer is OptimizerKind.ADAM:
        return optim.Adam(groups, fused=True)
    # Torch has no fused SGD for parameters of which each process holds a part.
    parted = any(isinstance(p, DTensor) for p in (*base, *head))
    return optim.SGD(groups, momentum=config.momentum, fused=not parted)


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Give every group its peak learning rate times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
