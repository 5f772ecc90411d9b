"""GrokFast over AdamW as one optimizer: the only one that the pretraining service can build.

RuntimeError
└── GrokFastDiverged
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

ALPHA = 0.98
LAMBDA = 2.0
# The recovery manager may lower lambda to this and no further: below it the filter is as good as off.
LAMBDA_FLOOR = 0.5
MAX_GRADIENT_NORM = 1.0
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
EPSILON = 1e-8


class GrokFastDiverged(RuntimeError):  # noqa: N818 - the design's name
    """A gradient is not finite; nothing was changed by the step that says so."""


@dataclass(frozen=True, kw_only=True)
class LambdaDeparture:
    """One change of lambda's limit: after how many finished steps, from what and to what."""

    step: int
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step saw.

    gradient_norm: of the raw gradient, before it was clipped.
    grokfast_lambda: the lambda that was used.
    slow_gradient_cosine: cosine between the EMA before the step and the gradient; about 0 for independent gradients.
    slow_gradient_norm_ratio: norm of the EMA before the step over that of the clipped gradient; about 0.1005,
        sqrt((1 - alpha) / (1 + alpha)), for independent gradients. Neither is an acceleration.
        Both are None unless `measure_next_step` asked for them, and at the first step, which has no EMA yet.
    """

    gradient_norm: float
    grokfast_lambda: float
    slow_gradient_cosine: float | None = None
    slow_gradient_norm_ratio: float | None = None


class GrokFastAdamW(torch.optim.Optimizer):
    """Amplify the slow part of every gradient, then take a fused AdamW step.

    g <- clip(g)        h <- alpha * h + (1 - alpha) * g        g <- g + lambda * h        AdamW(g)

    alpha is 0.98. lambda ramps from 0 to 2.0 over `warmup_steps` while the EMA h runs from the first step, and stays
    there. A parameter's h starts as a copy of its first gradient, is float32 and lives in the optimizer's state, so a
    resumed run equals the uninterrupted one. `p.grad` is filtered in place. Learning rates are the param groups' `lr`.

    Errors: GrokFastDiverged, when a gradient is not finite.
    Source: Lee et al. 2024, arXiv:2405.20233, algorithm 2 (GrokFast-EMA).
    """

    def __init__(self, params: Iterable[dict[str, Any]] | Iterable[Tensor], *, lr: float, warmup_steps: int) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if warmup_steps < 1:
            raise ValueError(f"warmup_steps must be at least 1, got {warmup_steps}")
        defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": WEIGHT_DECAY,
            "warmup_steps": warmup_steps,
            "finished_steps": 0,
            "ramp_start": 0,
            "lambda_limit": LAMBDA,
            "lambda_departures": [],
        }
        super().__init__(params, defaults)
        self.report: StepReport | None = None
        self._measure = False

    @property
    def grokfast_lambda(self) -> float:
        """The lambda that the next step will use."""
        group = self.param_groups[0]
        ramped = (group["finished_steps"] - group["ramp_start"]) / group["warmup_steps"]
        return float(min(group["lambda_limit"], LAMBDA * min(1.0, ramped)))

    @property
    def departures(self) -> tuple[LambdaDeparture, ...]:
        """Every change of lambda's limit so far, kept through checkpoints."""
        return tuple(LambdaDeparture(**kept) for kept in self.param_groups[0]["lambda_departures"])

    def lower_lambda(self, value: float) -> LambdaDeparture:
        """Lower the limit that lambda ramps to and stays at; for the recovery manager alone.

        Errors: ValueError, when the value is not below the present limit or is below LAMBDA_FLOOR.
        """
        limit = self.param_groups[0]["lambda_limit"]
        if not LAMBDA_FLOOR <= value < limit:
            raise ValueError(f"lambda may only be lowered: within {LAMBDA_FLOOR} and below {limit}, got {value}")
        return self._set_limit(value)

    def restore_lambda(self) -> LambdaDeparture:
        """Raise the limit back to LAMBDA; for the recovery manager alone.

        Errors: ValueError, when it is there already.
        """
        if self.param_groups[0]["lambda_limit"] >= LAMBDA:
            raise ValueError(f"lambda's limit is {LAMBDA} already")
        return self._set_limit(LAMBDA)

    def _set_limit(self, value: float) -> LambdaDeparture:
        group = self.param_groups[0]
        departure = {"step": group["finished_steps"], "before": group["lambda_limit"], "after": value}
        for group in self.param_groups:
            group["lambda_limit"] = value
            group["lambda_departures"] = [*group["lambda_departures"], departure]
        return LambdaDeparture(**departure)

    def reset_slow_gradient(self) -> None:
        """Drop every EMA, so that the next gradient starts it, and let lambda ramp up anew as it did at the start."""
        for state in self.state.values():
            state.pop("slow_gradient", None)
        for group in self.param_groups:
            group["ramp_start"] = group["finished_steps"]

    def measure_next_step(self) -> None:
        """Let the next step's report carry the cosine and the norm ratio, which cost one more pass."""
        self._measure = True

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Filter the gradients in place and update the parameters; `report` tells what was seen."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))) if gradients else 0.0
        if not math.isfinite(norm):
            raise GrokFastDiverged(f"the gradient's norm is {norm}; nothing was updated")
        clip = min(1.0, MAX_GRADIENT_NORM / (norm + 1e-6))
        lamb = self.grokfast_lambda
        slow = _SlowGradient() if self._measure else None
        for group in self.param_groups:
            self._step_group(group, clip, lamb, slow)
            group["finished_steps"] += 1
        self._measure = False
        cosine, ratio = slow.compare(norm * clip) if slow is not None else (None, None)
        self.report = StepReport(
            gradient_norm=norm, grokfast_lambda=lamb, slow_gradient_cosine=cosine, slow_gradient_norm_ratio=ratio
        )
        return loss

    def _step_group(self, group: dict[str, Any], clip: float, lamb: float, slow: _SlowGradient | None) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            is_first = "slow_gradient" not in state
            if is_first:
                state["slow_gradient"] = torch.empty_like(parameter, dtype=torch.float32)
            state["step"] += 1
            whole = (parameter, parameter.grad, state["slow_gradient"], state["exp_avg"], state["exp_avg_sq"])
            for p, g, h, average, average_sq in _pieces(whole):
                if clip < 1:
                    g.mul_(clip)
                if is_first:
                    h.copy_(g)
                else:
                    if slow is not None:
                        slow.add(h, g)
                    h.lerp_(g.to(h.dtype), 1 - ALPHA)
                if lamb:
                    g.add_(h, alpha=lamb)
                _adamw(p, g, average, average_sq, state["step"], group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the EMA float32 where torch would cast it to the parameter's type."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            if "slow_gradient" in state_dict["state"].get(index, {}):
                stored: Tensor = state_dict["state"][index]["slow_gradient"]
                self.state[parameter]["slow_gradient"] = stored.to(parameter.device, torch.float32, copy=True)


# Elements of one piece: five float32 tensors of it (20 MiB) stay in a shared third-level cache between the filter and
# the update. Measured against smaller pieces, which pay for a thread barrier per operation.
PIECE = 1_048_576


def _pieces(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Cut equally shaped tensors into flat pieces that fit the caches; others are one piece."""
    if tensors[0].numel() <= PIECE or not all(tensor.is_contiguous() for tensor in tensors):
        return iter([tensors])
    return zip(*(torch.split(tensor.view(-1), PIECE) for tensor in tensors), strict=True)


def _adamw(
    parameter: Tensor, gradient: Tensor, average: Tensor, average_sq: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    """Run torch's fused AdamW kernel on one piece."""
    torch._fused_adamw_(
        [parameter],
        [gradient],
        [average],
        [average_sq],
        [],
        [step],
        lr=group["lr"],
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=group["weight_decay"],
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )


class _SlowGradient:
    """Sums for the telemetry: <h, g> and <h, h> over the parameters that have an EMA already."""

    def __init__(self) -> None:
        self._products: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, slow: Tensor, gradient: Tensor) -> None:
        self._products.append(torch.dot(slow.reshape(-1), gradient.reshape(-1).to(slow.dtype)))
        self._squares.append(torch.linalg.vector_norm(slow).square())

    def compare(self, gradient_norm: float) -> tuple[float | None, float | None]:
        """Return the cosine and the norm ratio, or None for both where there is nothing to compare."""
        if not self._squares or gradient_norm == 0:
            return None, None
        norm = math.sqrt(float(torch.stack(self._squares).double().sum()))
        product = float(torch.stack(self._products).double().sum())
        return (product / (norm * gradient_norm) if norm else None), norm / gradient_norm


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split a model's trainable parameters: weights of linear maps and embeddings decay, all else does not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim == 2 and name.endswith(".weight") else plain).append(parameter)
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
