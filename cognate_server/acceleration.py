"""The learning-rate-matched control: what plain AdamW makes of the same start and the same batches.

A yardstick and nothing else. Its models are trained beside the run, measured on the validation rows and thrown away;
nothing here can write a model's folder, and a run with a control publishes the bits that it would publish without one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cognate_server.construct import CognateModelConstructor
from cognate_server.grokfast import BETAS, EPSILON, MAX_GRADIENT_NORM, parameter_groups
from cognate_server.losses import PONDER_WEIGHT, ObjectiveModule
from cognate_server.precision import Precision
from cognate_server.stream import Batch
from cognate_server.validation import row_losses
from training_common.models.cognate_v1 import CognateV1, CognateV1Config, MemoryState
from training_common.team import ALONE, Team, exchanging

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class AccelerationReport:
    """How many steps GrokFast and the control took to the same validation loss.

    target_loss: the worse of the two final validation losses, in nats per token: both reached it.
    grokfast_steps, control_steps: the first validation at which a curve is at or below the target.
    factor: control_steps over grokfast_steps; above 1 GrokFast was faster. As coarse as validations are far apart.
    rates: the control's learning rates over the plan's. curves: (step, validation loss) of "grokfast" and of "control",
        the lowest among the rates at each step. GrokFast had one rate, so the comparison favours the control.
    """

    target_loss: float
    grokfast_steps: int
    control_steps: int
    factor: float
    rates: tuple[float, ...]
    curves: Mapping[str, Curve]


class _Control:
    """One model under plain AdamW: the gradient is clipped as GrokFast's is, and nothing is added to it."""

    def __init__(
        self,
        config: CognateV1Config,
        *,
        seed: int,
        unigram_counts: Tensor,
        rate: float,
        prior_N: Tensor,
        precision: Precision,
        team: Team,
    ) -> None:
        self.rate = rate
        self._team = team
        self.model = CognateModelConstructor(config).construct(config, seed=seed, unigram_counts=unigram_counts)
        self._objective = ObjectiveModule(self.model, prior_N, precision=precision, team=team)
        self._parallel = team.parallel(self._objective)
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self.model), lr=1.0, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True
        )
        self._memory: MemoryState | None = None
        self.diverged = False

    def train_step(self, batch: Batch, lr: float) -> None:
        """Take one step; a control whose loss or gradient is not finite is left where it is from then on."""
        if self.diverged:
            return
        total = self._parallel(batch, self._memory, PONDER_WEIGHT)
        found = self._objective.found
        self._optimizer.zero_grad()
        with exchanging():
            total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        if not math.isfinite(float(total.detach())) or not math.isfinite(float(norm)):
            self.diverged = True
            return
        for group in self._optimizer.param_groups:
            group["lr"] = lr * self.rate
        self._optimizer.step()
        self._memory = found.output.memory.detach() if batch.fresh_rows is not None else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "memory": None if self._memory is None else self._memory.map(self._team.gather).tensors(),
            "diverged": self.diverged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        memory = state["memory"]
        self._memory = None if memory is None else MemoryState(**memory).map(self._team.mine)
        self.diverged = state["diverged"]


class AccelerationControl:
    """The control at each of its learning rates, beside one run of GrokFast.

    rates: over the plan's learning rate. It costs the time and memory of one training for each.
    """

    def __init__(
        self,
        config: CognateV1Config,
        *,
        seed: int,
        unigram_counts: Tensor,
        prior_N: Tensor,
        rates: Sequence[float],
        precision: Precision,
        team: Team = ALONE,
    ) -> None:
        self._controls = [
            _Control(
                config,
                seed=seed,
                unigram_counts=unigram_counts,
                rate=rate,
                prior_N=prior_N,
                precision=precision,
                team=team,
            )
            for rate in rates
        ]
        self._grokfast: list[tuple[int, float]] = []
        self._control: list[tuple[int, float]] = []

    @property
    def models(self) -> tuple[CognateV1, ...]:
        """The controls' models, one for each rate."""
        return tuple(control.model for control in self._controls)

    def train_step(self, batch: Batch, lr: float) -> None:
        """Train every control on the batch. lr: what the plan's schedule says, before the control's own factor."""
        for control in self._controls:
            control.train_step(batch, lr)

    def validate(self, step: int, grokfast_loss: float, batches: Sequence[Batch]) -> float | None:
        """Add a point to both curves; return the lowest loss among the rates, None when all have diverged."""
        losses = [row_losses(control.model, batches).mean for control in self._controls if not control.diverged]
        finite = [loss for loss in losses if math.isfinite(loss)]
        self._grokfast.append((step, grokfast_loss))
        if not finite:
            return None
        self._control.append((step, min(finite)))
        return min(finite)

    def report(self, unigram_loss: float) -> AccelerationReport | None:
        """Compare the curves; None when one of them has no end, or ends above what token frequencies alone reach."""
        if not self._control or self._control[-1][0] != self._grokfast[-1][0]:
            return None
        target = max(self._grokfast[-1][1], self._control[-1][1])
        if not target < unigram_loss:
            return None
        ours, theirs = _steps_to(target, self._grokfast), _steps_to(target, self._control)
        return AccelerationReport(
            target_loss=target,
            grokfast_steps=ours,
            control_steps=theirs,
            factor=theirs / ours,
            rates=tuple(control.rate for control in self._controls),
            curves={"grokfast": tuple(self._grokfast), "control": tuple(self._control)},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later steps and the report depend on, for a checkpoint."""
        return {
            "controls": [control.state_dict() for control in self._controls],
            "grokfast": self._grokfast,
            "control": self._control,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for control, stored in zip(self._controls, state["controls"], strict=True):
            control.load_state_dict(stored)
        self._grokfast, self._control = list(state["grokfast"]), list(state["control"])


def _steps_to(target: float, curve: Curve) -> int:
    return next(step for step, loss in curve if loss <= target)
