"""The optimizers and schedules that an agent may be trained with: the standard ones, and nothing else.

The learning rate of a step is a pure function of the step and, on a plateau schedule, of how often it has fallen. What
validations decide is in two small states that a checkpoint holds as JSON: `PlateauState` and `StoppingState`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from cognateforge.exceptions import FieldViolation
from training_common.attempt import Json
from training_common.parted import as_parted

if TYPE_CHECKING:
    from torch import autocast
    from torch.nn import Parameter
    from torch.optim import Optimizer

# The contract's bounds.
_MAX_MOMENTUM = 0.999
_MAX_ACCUMULATION_STEPS = 4096
_MAX_PATIENCE = 1000
_MAX_IMPROVEMENT = 1000
# The contract's schedules: cosine falls to a tenth; one-cycle rises for 30 % of the run and falls to a ten-thousandth;
# plateau falls to a tenth of what it was after three validations that were no better.
_COSINE_FLOOR = 0.1
_CYCLE_RISE = 0.3
_CYCLE_END = 1e-4
_PLATEAU_FACTOR = 0.1
_PLATEAU_PATIENCE = 3
# Where the rise of one-cycle begins; torch's and fastai's default.
_CYCLE_START = 1 / 25


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
    ONE_CYCLE = "one_cycle"
    PLATEAU = "plateau"


class Precision(enum.StrEnum):
    """What numbers a forward pass computes with, where that is safe; weights and moments are float32 in both."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """End a run that no longer gets better.

    patience: so many validations in a row without a new best end it.
    min_improvement: by how much a validation has to be better than the best one to be a new best; 0 means by anything.
    """

    patience: int = 3
    min_improvement: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """Which standard optimizer, how fast, and in which way a step is computed. Defaults are the contract's.

    lr: highest learning rate, of the adapted base's parameters; the task head's is `head_lr_scale` times that, since it
        starts from random values.
    warmup_steps: steps of linear warm-up, or None for a tenth of the run. A one-cycle schedule does not read it.
    clip_norm: gradients are scaled down to this norm.
    accumulation_steps: parts that a step's rows are taken in, one after the other; at most one for each row.
    early_stopping: None takes every step.
    """

    optimizer: OptimizerKind = OptimizerKind.ADAMW
    lr: float = 1e-3
    head_lr_scale: float = 3.0
    weight_decay: float = 0.01
    momentum: float = 0.0
    schedule: Schedule = Schedule.COSINE
    warmup_steps: int | None = None
    clip_norm: float = 1.0
    accumulation_steps: int = 1
    precision: Precision = Precision.FLOAT32
    early_stopping: EarlyStopping | None = None

    def violations(self, prefix: str, total_steps: int) -> list[FieldViolation]:
        """Return what is wrong with the values, by field name."""
        warmup, parts = self.warmup_steps, self.accumulation_steps
        rules = [
            ("optimizer", self.optimizer in set(OptimizerKind), "must be adamw, adam or sgd", self.optimizer),
            ("lr", 0 < self.lr <= 1, "must be above 0 and at most 1", self.lr),
            (
                "head_lr_scale",
                0 < self.head_lr_scale <= 1000,
                "must be above 0 and at most 1000",
                self.head_lr_scale,
            ),
            ("weight_decay", 0 <= self.weight_decay <= 1, "must be 0 to 1", self.weight_decay),
            ("momentum", 0 <= self.momentum <= _MAX_MOMENTUM, f"must be 0 to {_MAX_MOMENTUM}", self.momentum),
            ("schedule", self.schedule in set(Schedule), f"must be one of {', '.join(Schedule)}", self.schedule),
            (
                "warmup_steps",
                warmup is None or 0 <= warmup <= total_steps,
                f"must be 0 to total_steps ({total_steps})",
                warmup,
            ),
            ("clip_norm", 0 < self.clip_norm <= 1000, "must be above 0 and at most 1000", self.clip_norm),
            (
                "accumulation_steps",
                1 <= parts <= _MAX_ACCUMULATION_STEPS,
                f"must be 1 to {_MAX_ACCUMULATION_STEPS}",
                parts,
            ),
            ("precision", self.precision in set(Precision), f"must be one of {', '.join(Precision)}", self.precision),
        ]
        if (stopping := self.early_stopping) is not None:
            patience, least = stopping.patience, stopping.min_improvement
            rules += [
                (
                    "early_stopping.patience",
                    1 <= patience <= _MAX_PATIENCE,
                    f"must be 1 to {_MAX_PATIENCE}",
                    patience,
                ),
                (
                    "early_stopping.min_improvement",
                    0 <= least <= _MAX_IMPROVEMENT,
                    f"must be 0 to {_MAX_IMPROVEMENT}",
                    least,
                ),
            ]
        return [
            FieldViolation(field=f"{prefix}{field}", description=f"{rule}, not {value}")
            for field, holds, rule, value in rules
            if not holds
        ]

    @property
    def needs_validation(self) -> bool:
        """Whether a run cannot do without validation rows."""
        return self.early_stopping is not None or self.schedule is Schedule.PLATEAU


@dataclass(frozen=True, kw_only=True)
class PlateauState:
    """How often a plateau schedule has fallen, and what it has seen since.

    best: the best validation so far. misses: validations since that were no better, or since the last fall.
    """

    best: float | None = None
    misses: int = 0
    falls: int = 0

    def after(self, score: float, *, higher_is_better: bool) -> PlateauState:
        """Return the state after one more validation."""
        if _gain(score, self.best, higher_is_better) > 0:
            return replace(self, best=score, misses=0)
        if self.misses + 1 < _PLATEAU_PATIENCE:
            return replace(self, misses=self.misses + 1)
        return replace(self, misses=0, falls=self.falls + 1)

    def to_json(self) -> dict[str, Json]:
        """Return the state as a checkpoint holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Self:
        """Return the state that `to_json` gave."""
        return cls(**state)


@dataclass(frozen=True, kw_only=True)
class StoppingState:
    """The best validation so far, the step that it was taken after, and how many have missed it since."""

    best: float | None = None
    best_step: int = 0
    misses: int = 0

    def after(self, score: float, *, step: int, config: EarlyStopping, higher_is_better: bool) -> StoppingState:
        """Return the state after one more validation. It is a new best where `best_step` is `step`."""
        gain = _gain(score, self.best, higher_is_better)
        if gain > 0 and gain >= config.min_improvement:
            return StoppingState(best=score, best_step=step)
        return replace(self, misses=self.misses + 1)

    def ends(self, config: EarlyStopping) -> bool:
        """Whether the run has run out of patience."""
        return self.misses >= config.patience

    def to_json(self) -> dict[str, Json]:
        """Return the state as a checkpoint holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Self:
        """Return the state that `to_json` gave."""
        return cls(**state)


def _gain(score: float, best: float | None, higher_is_better: bool) -> float:
    """Return by how much a score is better than the best one. One that is not a number is never better."""
    if math.isnan(score):
        return -math.inf
    if best is None:
        return math.inf
    return score - best if higher_is_better else best - score


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: Schedule, falls: int = 0) -> float:
    """Return the share of the peak learning rate that step `step`, counted from 0, is taken with.

    The last step of a linear schedule is taken with a little more than 0, so that none is wasted.
    falls: how often a plateau schedule has fallen before this step.
    """
    if schedule is Schedule.ONE_CYCLE:
        return _one_cycle(step, total_steps)
    fallen = _PLATEAU_FACTOR**falls
    if step < warmup_steps:
        return fallen * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule is Schedule.LINEAR:
        return 1 - done
    if schedule is Schedule.COSINE:
        return _half_cosine(1.0, _COSINE_FLOOR, done)
    return fallen


def _one_cycle(step: int, total_steps: int) -> float:
    """Source: Smith & Topin 2017, arXiv:1708.07120, with torch's half cosines; momentum stays as it is.

    The peak is reached by the step before the first 30 % are over, the end by the last one.
    """
    peak, last = _CYCLE_RISE * total_steps - 1, total_steps - 1
    if step < peak:
        return _half_cosine(_CYCLE_START, 1.0, step / peak)
    peak = max(0.0, peak)
    return _half_cosine(1.0, _CYCLE_END, (step - peak) / (last - peak)) if last > peak else 1.0


def _half_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def default_warmup_steps(total_steps: int) -> int:
    """Return a tenth of the run."""
    return max(1, total_steps // 10)


def warmup_steps(config: Optimization, total_steps: int) -> int:
    """Return the steps of warm-up with the default filled in."""
    return default_warmup_steps(total_steps) if config.warmup_steps is None else config.warmup_steps


def computing(precision: Precision) -> autocast:
    """Return the context that a forward pass and its loss run in, on a CPU. Backward passes and measurements do not."""
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is Precision.BFLOAT16)


def build_optimizer(config: Optimization, *, base: Sequence[Parameter], head: Sequence[Parameter]) -> Optimizer:
    """Return the optimizer of the parameters that are trained, matrices decayed and vectors not.

    Every group keeps its own peak in `peak_lr`; `set_lr` gives all of them their rate of a step.
    """
    from torch import optim

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
    parted = any(as_parted(p) is not None for p in (*base, *head))
    return optim.SGD(groups, momentum=config.momentum, fused=not parted)


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Give every group its peak learning rate times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
