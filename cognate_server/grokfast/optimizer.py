"""The optimizer: GrokFast's filter and AdamW in one step.

RuntimeError
└── GrokFastDiverged
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn

from cognate_server.grokfast import sharding
from cognate_server.grokfast.update import Factors, Share, choose
from training_common.team import local

ALPHA = 0.98
LAMBDA = 2.0
# The recovery manager may lower lambda to this and no further: below it the filter is as good as off.
LAMBDA_FLOOR = 0.5
# Two memories of the EMA, 1 / (1 - alpha) steps each: after so many, what it began with weighs an eighth.
EMA_RAMP_STEPS = 100
MAX_GRADIENT_NORM = 1.0
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
EPSILON = 1e-8


class GrokFastDiverged(RuntimeError):  # noqa: N818 - the design's name
    """A gradient is not finite; nothing was changed by the step that says so."""


@dataclass(frozen=True, kw_only=True)
class LambdaDeparture:
    """One change of lambda that the ramp did not ask for: after how many finished steps, from what and to what.

    reason: `lowered`, `restored`, or `slow gradient reset`, after which lambda ramps from 0 again.
    """

    step: int
    before: float
    after: float
    reason: str


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
    """Amplify the slow part of every gradient and take an AdamW step, in one pass over memory where there is a kernel.

    g <- clip(g)        h <- alpha * h + (1 - alpha) * g        g <- g + lambda * h        AdamW(g)

    alpha is 0.98. lambda ramps from 0 to 2.0 over `ramp_steps` while the EMA h runs from the first step, and stays
    there. A parameter's h starts as a copy of its first gradient; h and AdamW's averages are float32 whatever the
    parameter's type, and live in the optimizer's state, so a resumed run equals the uninterrupted one. `p.grad` is
    read, after accumulation and all-reduce, and never written. Learning rates are the param groups' `lr`.

    Under fully_shard the norm is that of the whole gradient and state is sharded as its parameter is. Under a
    GradScaler, gradients are unscaled on the way, and a step that found infinities changes nothing. A parameter in
    bfloat16 is computed in float32 and rounded once: changes below 1/512 of it are lost, so train float32 parameters
    under autocast instead.

    Errors: GrokFastDiverged, when a gradient is not finite. RuntimeError, when one is sparse.
    Source: Lee et al. 2024, arXiv:2405.20233, algorithm 2 (GrokFast-EMA).
    """

    # GradScaler then leaves the gradients scaled and sets grad_scale and found_inf, as for torch's fused optimizers.
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[dict[str, Any]] | Iterable[Tensor], *, lr: float, ramp_steps: int) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if ramp_steps < 1:
            raise ValueError(f"ramp_steps must be at least 1, got {ramp_steps}")
        defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": WEIGHT_DECAY,
            "ramp_steps": ramp_steps,
            "finished_steps": 0,
            "ema_start": 0,
            "lambda_limit": LAMBDA,
            "lambda_departures": [],
            "implementations": [],
        }
        super().__init__(params, defaults)
        self._update = choose(self.param_groups[0]["params"][0].device)
        self._record_implementation()
        self.report: StepReport | None = None
        self._measure = False
        # Memory of EMAs that were reset, until their parameters' next gradients.
        self._spare: dict[Tensor, Tensor] = {}

    def _record_implementation(self) -> None:
        for group in self.param_groups:
            if group["implementations"][-1:] != [self._update.name]:
                group["implementations"] = [*group["implementations"], self._update.name]

    @property
    def implementations(self) -> tuple[str, ...]:
        """What computed the steps, the present one last: native, compiled or foreach, kept through checkpoints.

        More than one means that the run went on elsewhere, where its last bits may differ.
        """
        return tuple(self.param_groups[0]["implementations"])

    @property
    def grokfast_lambda(self) -> float:
        """The lambda that the next step will use."""
        group = self.param_groups[0]
        finished, ramp_steps = group["finished_steps"], group["ramp_steps"]
        planned = finished / ramp_steps
        # An EMA that was started anew holds it down for as long as a new one needs.
        trusted = (finished - group["ema_start"]) / min(ramp_steps, EMA_RAMP_STEPS)
        return float(min(group["lambda_limit"], LAMBDA * min(1.0, planned, trusted)))

    @property
    def departures(self) -> tuple[LambdaDeparture, ...]:
        """Every departure of lambda so far, kept through checkpoints."""
        return tuple(LambdaDeparture(**kept) for kept in self.param_groups[0]["lambda_departures"])

    def lower_lambda(self, value: float) -> LambdaDeparture:
        """Lower the limit that lambda ramps to and stays at; for the recovery manager alone.

        Errors: ValueError, when the value is not below the present limit or is below LAMBDA_FLOOR.
        """
        limit = self.param_groups[0]["lambda_limit"]
        if not LAMBDA_FLOOR <= value < limit:
            raise ValueError(f"lambda may only be lowered: within {LAMBDA_FLOOR} and below {limit}, got {value}")
        return self._depart("lowered", limit, value, lambda_limit=value)

    def restore_lambda(self, value: float = LAMBDA) -> LambdaDeparture:
        """Raise the lowered limit again, in the end to the mandated 2.0; for the recovery manager alone.

        Errors: ValueError, when the value is not above the present limit or is above LAMBDA.
        """
        limit = self.param_groups[0]["lambda_limit"]
        if not limit < value <= LAMBDA:
            raise ValueError(f"lambda may only be restored: above {limit} and up to {LAMBDA}, got {value}")
        return self._depart("restored", limit, value, lambda_limit=value)

    def reset_slow_gradient(self) -> LambdaDeparture:
        """Forget the EMA: each parameter's next gradient starts it anew; for the recovery manager alone.

        Lambda ramps from 0 again, within EMA_RAMP_STEPS to where the first ramp stands by then, since amplified in full
        that one gradient would outweigh those that follow.
        """
        for parameter, state in self.state.items():
            if "slow_gradient" in state:
                self._spare[parameter] = state.pop("slow_gradient")
        finished = self.param_groups[0]["finished_steps"]
        return self._depart("slow gradient reset", self.grokfast_lambda, 0.0, ema_start=finished)

    def _depart(self, reason: str, before: float, after: float, **changes: float) -> LambdaDeparture:
        departure = {
            "step": self.param_groups[0]["finished_steps"],
            "before": before,
            "after": after,
            "reason": reason,
        }
        for group in self.param_groups:
            group.update(changes)
            group["lambda_departures"] = [*group["lambda_departures"], departure]
        return LambdaDeparture(**departure)

    def measure_next_step(self) -> None:
        """Let the next step's report carry the cosine and the norm ratio."""
        self._measure = True

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters from their gradients; `report` tells what was seen."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._found_inf():
            self._step()
        return loss

    def _found_inf(self) -> bool:
        found: Tensor | None = getattr(self, "found_inf", None)
        return found is not None and bool(found)

    def _step(self) -> None:
        batches = self._batches()
        unscale = self._unscale()
        norm = math.sqrt(sum(self._squares(batch) for batch in batches)) * unscale
        if not math.isfinite(norm):
            raise GrokFastDiverged(f"the gradient's norm is {norm}; nothing was updated")
        clip = min(1.0, MAX_GRADIENT_NORM / (norm + 1e-6))
        lamb = self.grokfast_lambda
        is_compared = any(not batch.is_fresh for batch in batches)
        shares = [self._share(batch, clip * unscale, lamb) for batch in batches]
        sums = self._update.apply(shares, measure=self._measure)
        wholes = [sharding.summed(list(s), batch.parameters[0]) for s, batch in zip(sums, batches, strict=False)]
        for group in self.param_groups:
            group["finished_steps"] += 1
        cosine, ratio = _compare(wholes, norm * clip) if is_compared and self._measure else (None, None)
        self._measure = False
        self.report = StepReport(
            gradient_norm=norm, grokfast_lambda=lamb, slow_gradient_cosine=cosine, slow_gradient_norm_ratio=ratio
        )

    def _unscale(self) -> float:
        """What a GradScaler's gradients are to be multiplied with; 1 without one, or where they are unscaled."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        return 1.0 if scale is None else 1.0 / float(scale)

    def _batches(self) -> list[_Batch]:
        """Sort the parameters that have a gradient by what their updates have in common; nothing is changed."""
        batches: dict[object, _Batch] = {}
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError("a gradient is sparse; build the embedding with sparse=False")
                state = self.state.get(parameter, {})
                count, is_fresh = int(state.get("step", 0)), "slow_gradient" not in state
                key = (index, count, is_fresh, sharding.layout(parameter))
                batches.setdefault(key, _Batch(group, count, is_fresh)).parameters.append(parameter)
        return list(batches.values())

    def _squares(self, batch: _Batch) -> float:
        mine = self._update.squares([local(p.grad) for p in batch.parameters if p.grad is not None])
        return sharding.summed([mine], batch.parameters[0])[0]

    def _share(self, batch: _Batch, scale: float, lamb: float) -> Share:
        """Count the update in the parameters' states, made where there are none, and put together what it takes."""
        self._ensure_state(batch.parameters)
        states = [self.state[parameter] for parameter in batch.parameters]
        for state in states:
            state["step"] += 1
        factors = Factors(
            scale=scale,
            alpha=ALPHA,
            lamb=lamb,
            lr=float(batch.group["lr"]),
            betas=BETAS,
            epsilon=EPSILON,
            weight_decay=batch.group["weight_decay"],
            count=batch.count + 1,
            fresh=batch.is_fresh,
        )
        return Share(
            factors=factors,
            parameters=[local(p) for p in batch.parameters],
            gradients=[local(p.grad) for p in batch.parameters if p.grad is not None],
            slow=[local(state["slow_gradient"]) for state in states],
            mean=[local(state["exp_avg"]) for state in states],
            mean_square=[local(state["exp_avg_sq"]) for state in states],
        )

    def _ensure_state(self, parameters: Iterable[Tensor]) -> None:
        new = [parameter for parameter in parameters if not self.state[parameter]]
        made = self._update.states_like([local(parameter) for parameter in new])
        for parameter, tensors in zip(new, made, strict=True):
            named = zip(STATE_TENSORS, (sharding.like(tensor, parameter) for tensor in tensors), strict=True)
            self.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **dict(named)}
        for parameter in parameters:
            if "slow_gradient" not in self.state[parameter]:
                spare = self._spare.pop(parameter)
                local(spare).zero_()
                self.state[parameter]["slow_gradient"] = spare

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep state float32 where torch would cast it to the parameter's type."""
        super().load_state_dict(state_dict)
        self._record_implementation()
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        stored = {p: state_dict["state"][i] for i, p in zip(indices, parameters, strict=True) if p in self.state}
        self._spare.clear()
        self.state.clear()
        self._ensure_state(stored)
        for parameter, values in stored.items():
            state = self.state[parameter]
            state["step"].copy_(values["step"])
            for name in STATE_TENSORS:
                if name in values:
                    local(state[name]).copy_(local(values[name]))
            if "slow_gradient" not in values:
                self._spare[parameter] = state.pop("slow_gradient")


STATE_TENSORS = ("slow_gradient", "exp_avg", "exp_avg_sq")


@dataclass
class _Batch:
    """Parameters of one group, age and layout."""

    group: dict[str, Any]
    count: int
    is_fresh: bool
    parameters: list[Tensor] = field(default_factory=list)


def _compare(sums: list[list[float]], gradient_norm: float) -> tuple[float | None, float | None]:
    """Return cosine and norm ratio from <h, g> and <h, h>, or None where there is nothing to compare."""
    if gradient_norm == 0:
        return None, None
    product, norm = sum(s[0] for s in sums), math.sqrt(sum(s[1] for s in sums))
    return (product / (norm * gradient_norm) if norm else None), norm / gradient_norm


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split a model's trainable parameters: weights of linear maps and embeddings decay, all else does not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim == 2 and name.endswith(".weight") else plain).append(parameter)
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
