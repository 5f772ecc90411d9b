"""What each of two processes does in test_data_parallel, and the same training in one process."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cognate_server import losses
from cognate_server.grokfast import ALPHA, BETAS, EPSILON, MAX_GRADIENT_NORM, parameter_groups
from cognate_server.run import PretrainConfig, PretrainingRun
from cognate_server.stream import Batch
from cognate_server.trainer import pretrain
from tests.cognate._support import TINY, CountingStream, MemoryAttempt
from training_common.attempt import AttemptStopped, PartDone, StopKind
from training_common.models.cognate_v1 import CognateV1
from training_common.team import ALONE, Strategy, Team
from training_common.team_attempt import TeamAttempt

PROCESSES = 2
STEPS = 16
CUT_AT = 9
POISONED_AT = 4
# Enough for the order of filter and reduction to show.
FILTERED_STEPS = 24
# Three rows do not divide by two. The rate is high, so that a wrong gradient shows soon.
CONFIG = PretrainConfig(
    seed=7,
    total_steps=STEPS,
    batch_tokens=48,
    sequence_length=16,
    peak_lr=5e-3,
    warmup_steps=3,
    checkpoint_interval_steps=5,
    progress_interval_steps=1,
    validation_rows=3,
    validation_interval_steps=8,
    control_rates=(1.0,),
    model=TINY,
)
KINDS = tuple(Strategy)


class UnevenStream(CountingStream):
    """Three rows with different numbers of targets, some of which go on where they ended."""

    def __init__(self) -> None:
        super().__init__(packed=True, carried=True)

    def next_batch(self) -> Batch:
        self.position += 1
        batch = self._batch(self.position, rows=3)
        assert batch.segment_ids is not None
        # Targets within documents of six tokens: 12 in row 0, which one process has, and 5 and 2 in the other's rows. A
        # mean of the processes' means would be another loss.
        padding = torch.arange(17) >= torch.tensor([[15], [7], [3]])
        return dataclasses.replace(batch, segment_ids=batch.segment_ids.masked_fill(padding, -1))


class Poison:
    """Makes the loss of one step infinite, in the last process's part of the batch alone."""

    def __init__(self, team: Team) -> None:
        self._team, self._calls = team, 0

    def __enter__(self) -> None:
        self._before = losses.summed_cross_entropy
        losses.summed_cross_entropy = self._summed

    def __exit__(self, *_: object) -> None:
        losses.summed_cross_entropy = self._before

    def _summed(self, model: CognateV1, found: losses.Predictions) -> tuple[Tensor, Tensor]:
        self._calls += 1
        total, losses_X = self._before(model, found)
        # The control comes first in every step.
        is_here = self._calls == 2 * POISONED_AT and self._team.rank == self._team.size - 1
        return total * math.inf if is_here else total, losses_X


def train(folder: Path, team: Team = ALONE, *, stop_at: int | None = None) -> Mapping[str, Any] | None:
    """Train to the end, or until just before step `stop_at + 1`, and return what was reported and saved."""
    own = None
    if team.leads:
        own = MemoryAttempt(folder, stop=None if stop_at is None else (stop_at + 1, StopKind.PAUSE))
        # What is cut is compared with what is not, so that copies are compared with what they are made of.
        own.saves_in_background = stop_at is not None
    attempt = TeamAttempt(team, own, job="jobs/1", workdir=folder)
    try:
        result = pretrain(CONFIG, UnevenStream() if team.leads else None, attempt, score=_share, team=team)
    except (AttemptStopped, PartDone):
        result = None
    if own is None:
        return None
    return {
        "rows": own.rows,
        "saved": own.saved,
        "recovery": own.events,
        "weights": None if result is None else (result.model_dir / "model.safetensors").read_bytes(),
        "acceleration": None if result is None else result.acceleration,
    }


def _share(model: object) -> tuple[float, int]:
    return 0.5, 4


def run(rank: int, folder: str) -> None:
    """Train under DDP and under fully_shard, whole and cut, and leave what the first process saw in files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    team = Team(rank=rank, size=PROCESSES)
    for kind in KINDS:
        ours, place = team.using(kind), Path(folder) / kind
        for name, stop_at in (
            ("whole", None),
            ("cut", CUT_AT),
            ("cut", None),
            ("begun-alone", None),
            ("begun", CUT_AT),
        ):
            seen = train(place / name, ours, stop_at=stop_at)
            if rank == 0:
                torch.save(seen, place / f"{name}-{stop_at}.pt")
        with Poison(ours):
            seen = train(place / "poisoned", ours)
        if rank == 0:
            torch.save(seen, place / "poisoned-None.pt")
    for before in (True, False):
        seen_losses = filtered(team, before=before)
        if rank == 0:
            torch.save(seen_losses, Path(folder) / f"filtered-{before}.pt")
    dist.destroy_process_group()


class Filtered:
    """A plain GrokFast and AdamW after DDP, or with the filter in its wrong place: before gradients are added up."""

    def __init__(self, run: PretrainingRun, *, before: bool) -> None:
        self.param_groups = run.optimizer.param_groups
        self._ours, self._before = run.optimizer, before
        groups = [{**group, "weight_decay": group["weight_decay"]} for group in parameter_groups(run.model)]
        self._adamw = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPSILON, fused=True)
        self._slow: dict[Tensor, Tensor] = {}
        self._finished = 0

    def zero_grad(self) -> None:
        self._adamw.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        parameters = [p for group in self._adamw.param_groups for p in group["params"]]
        if not self._before:
            _reduce(parameters)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
        lamb = 2.0 * self._finished / 100
        for p in parameters:
            p.grad *= min(1.0, MAX_GRADIENT_NORM / (norm + 1e-6))
            slow = self._slow.setdefault(p, p.grad.clone())
            slow.mul_(ALPHA).add_(p.grad, alpha=1 - ALPHA)
            p.grad += lamb * slow
        if self._before:
            _reduce(parameters)
        for ours, theirs in zip(self.param_groups, self._adamw.param_groups, strict=True):
            theirs["lr"] = ours["lr"]
        self._adamw.step()
        self._finished += 1


def _reduce(parameters: list[Tensor]) -> None:
    for p in parameters:
        dist.all_reduce(p.grad)


def filtered(team: Team, *, before: bool) -> list[float]:
    """Train without DDP, gradients added up by hand, and return the losses."""

    class Unreduced(Team):
        def parallel(self, module: Any, **_: Any) -> Any:
            return module

    ours = Unreduced(rank=team.rank, size=team.size)
    config = dataclasses.replace(CONFIG, control_rates=(), total_steps=FILTERED_STEPS)
    run = PretrainingRun(config, UnevenStream() if team.leads else None, ours)
    run.optimizer = Filtered(run, before=before)  # type: ignore[assignment]
    return [run.train_step(measure=False).loss for _ in range(FILTERED_STEPS)]
