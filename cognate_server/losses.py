"""What pretraining minimizes: the cross-entropy of a batch's targets, the prior on its halting, and how it is allotted.

Letters as in `cognate_v1`; X the positions of a batch that have a target.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cognate_server import fused
from cognate_server.cross_entropy import head_cross_entropy
from cognate_server.precision import Precision
from cognate_server.stream import Batch
from training_common.models.cognate_v1 import CognateOutput, CognateV1, MemoryState, Recall
from training_common.team import ALONE, Team

PONDER_WEIGHT = 0.1
PONDER_MEAN = 2.0
# 0.02 and 0.05 gave correlations of 0.3 on validation rows, and a loss that differed from that of 0 by less than two
# seeds differ; 0.2 gave no more correlation and 0.1 nats more loss (docs/log.md).
ALLOTMENT_WEIGHT = 0.02
_VARIANCE_FLOOR = 1e-6


def truncated_geometric(steps: int, mean: float) -> Tensor:
    """Return the geometric distribution over 1 to `steps` whose mean, after truncation, is `mean`: (N,).

    A mean beyond the middle has no decreasing geometric; the flat distribution is returned then.
    """
    numbers_N = torch.arange(steps, dtype=torch.float64)
    low, high = 0.0, 1.0
    for _ in range(60):  # halvings: the ratio is exact to float64
        ratio = (low + high) / 2
        weights_N = ratio**numbers_N
        low, high = (ratio, high) if (weights_N * (numbers_N + 1)).sum() / weights_N.sum() < mean else (low, ratio)
    weights_N = high**numbers_N
    return (weights_N / weights_N.sum()).float()


def ponder_divergence(mean_N: Tensor, prior_N: Tensor) -> Tensor:
    """Return KL(mean halting distribution || prior)."""
    return torch.xlogy(mean_N, mean_N).sum() - (mean_N * prior_N.log()).sum()


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What the objective is made of, added up over tokens: any parts of a batch add up to those of the whole.

    float64, so that they can be squares and counts. x: expected ponder steps of a target's token. y: its loss, as a
    yardstick without a gradient.
    """

    cross_entropy: Tensor
    halting_N: Tensor
    x: Tensor
    xx: Tensor
    xy: Tensor
    y: Tensor
    yy: Tensor
    targets: Tensor
    tokens: Tensor
    taken_N: Tensor  # tokens that took 0, 1, ... steps

    def over(self, team: Team) -> Sums:
        """Add them up over all processes, in one exchange. Errors: TeamBrokenError."""
        parts = [getattr(self, field.name) for field in dataclasses.fields(self)]
        summed = team.total(torch.cat([part.reshape(-1) for part in parts]))
        pieces = torch.split(summed, [part.numel() for part in parts])
        named = zip(dataclasses.fields(self), pieces, parts, strict=True)
        return Sums(**{field.name: piece.reshape(part.shape) for field, piece, part in named})


def sums(found: Predictions, cross_entropy: Tensor, losses_X: Tensor) -> Sums:
    """Add up a batch, or a part of one."""
    output = found.output
    numbers_N = torch.arange(1, output.halting_BTN.shape[-1] + 1, dtype=torch.float64)
    x_X, y_X = output.halting_BTN[found.trained_BT].double() @ numbers_N, losses_X.detach().double()
    taken_N = torch.bincount(output.steps_BT.reshape(-1), minlength=len(numbers_N) + 1).double()
    return Sums(
        cross_entropy=cross_entropy.double(),
        halting_N=output.halting_BTN.sum((0, 1), dtype=torch.float64),
        x=x_X.sum(),
        xx=x_X.square().sum(),
        xy=(x_X * y_X).sum(),
        y=y_X.sum(),
        yy=y_X.square().sum(),
        targets=torch.tensor(len(y_X), dtype=torch.float64),
        tokens=taken_N[1:].sum(),
        taken_N=taken_N,
    )


def step_allotment(of: Sums) -> Tensor:
    """Return the correlation of the tokens' expected ponder steps with their losses, -1 to 1; 0 where either is flat.

    The prior fixes how many steps the tokens take together, and says nothing about which of them takes many. Without
    this, correlations were 0 after 400 steps of Cognate-25M. The halting unit learns to tell hard tokens from easy ones
    by it, as exits by confidence do (Schuster et al. 2022, arXiv:2207.07061), without a head at every step.
    """
    count = of.targets.clamp(min=1)
    x, y = of.x / count, of.y / count
    # The differences of large sums may end just below 0.
    x_variance, y_variance = (of.xx / count - x * x).clamp(min=0), (of.yy / count - y * y).clamp(min=0)
    return (of.xy / count - x * y) / ((x_variance + _VARIANCE_FLOOR) * (y_variance + _VARIANCE_FLOOR)).sqrt()


@dataclass(frozen=True)
class Masks:
    """What a batch's segment ids say about its inputs and targets; None where all is plain."""

    segment_ids_BT: Tensor | None
    valid_BT: Tensor | None
    targets_BT: Tensor  # -100 where the target is not trained on


def masks(batch: Batch) -> Masks:
    """Return what of the batch is real, and what of it is trained on."""
    targets_BT = batch.tokens[:, 1:]
    if batch.segment_ids is None:
        return Masks(None, None, targets_BT)
    here_BT, next_BT = batch.segment_ids[:, :-1], batch.segment_ids[:, 1:]
    trained_BT = (here_BT == next_BT) & (here_BT >= 0)
    return Masks(here_BT, here_BT >= 0, targets_BT.masked_fill(~trained_BT, -100))


@dataclass(frozen=True)
class Predictions:
    """A batch's output, and the hidden states of the X positions that have a target, with what they recall."""

    output: CognateOutput
    hidden_XD: Tensor
    recall_X: Recall | None
    targets_X: Tensor
    trained_BT: Tensor


def forward(model: CognateV1, batch: Batch, memory: MemoryState | None, **options: Any) -> Predictions:
    """Run the model on a batch; `memory` is what its rows go on from, `options` are the model's own."""
    found = masks(batch)
    output: CognateOutput = model(
        batch.tokens[:, :-1],
        memory=_starting_memory(model, batch, memory),
        valid_BT=found.valid_BT,
        segment_ids_BT=found.segment_ids_BT,
        **options,
    )
    trained_BT = found.targets_BT >= 0
    hidden_XD, targets_X = output.hidden_BTD.flatten(0, 1), found.targets_BT.reshape(-1)
    recall_X = None if output.recall is None else output.recall.map(lambda part: part.flatten(0, 1))
    if not bool(trained_BT.all()):
        trained_X = trained_BT.reshape(-1)
        hidden_XD, targets_X = hidden_XD[trained_X], targets_X[trained_X]
        recall_X = None if recall_X is None else recall_X.map(lambda part: part[trained_X])
    return Predictions(output, hidden_XD, recall_X, targets_X, trained_BT)


def summed_cross_entropy(model: CognateV1, found: Predictions) -> tuple[Tensor, Tensor]:
    """Return the sum of the targets' cross-entropies in nats, and each one's without a gradient: (X,)."""
    mixture = None
    if found.recall_X is not None:
        mixture = (found.recall_X.log_own, found.recall_X.log_part_of(found.targets_X))
    embedded = found.output.embedded
    return head_cross_entropy(
        model.head(found.hidden_XD),
        model.embedding.weight,
        model.head_bias_V,
        found.targets_X,
        mixture,
        embedded=embedded if isinstance(embedded, fused.Embedded) and torch.is_grad_enabled() else None,
        factor=1 / max(1, len(found.targets_X)),  # the mean, unless other processes have targets too
    )


@torch.no_grad()
def token_losses(model: CognateV1, found: Predictions) -> Tensor:
    """Return every target's cross-entropy in nats: (X,)."""
    losses_X = F.cross_entropy(model.logits(found.hidden_XD), found.targets_X, reduction="none")
    return losses_X if found.recall_X is None else found.recall_X.mixed_losses(losses_X, found.targets_X)


def _starting_memory(model: CognateV1, batch: Batch, memory: MemoryState | None) -> MemoryState | None:
    """Carry the memory over in the rows that go on, and start afresh in the others."""
    if memory is None or batch.fresh_rows is None or bool(batch.fresh_rows.all()):
        return None
    rows = len(batch.fresh_rows)
    carried = memory.map(lambda part: part[:rows])  # the last validation batch may be cut
    return model.memory.start(rows).where(batch.fresh_rows, carried)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a batch's gradient is taken of, and its parts, over all processes; `output` is this process's own.

    total: cross_entropy + ponder weight * divergence - ALLOTMENT_WEIGHT * allotment, float64. cross_entropy: nats per
    target. targets: how many there are. taken_N: tokens that took 0, 1, ... steps; 0 is padding.
    """

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    allotment: Tensor
    targets: int
    taken_N: Tensor
    output: CognateOutput


def objective(
    model: CognateV1,
    batch: Batch,
    memory: MemoryState | None,
    prior_N: Tensor,
    *,
    ponder_weight: float,
    precision: Precision,
    statistics: bool = False,
    team: Team = ALONE,
) -> Objective:
    """Run the model on a batch and return what training minimizes; `memory` is what the rows go on from.

    With a team, `batch` is this process's share of the rows. The value is that of the whole batch, and the gradient
    this process's part of its gradient. Errors: TeamBrokenError.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.BFLOAT16):
        found = forward(model, batch, memory, statistics=statistics)
        cross_entropy, losses_X = summed_cross_entropy(model, found)
    # The prior and the correlation are of means over the whole batch, so means of the processes' own would not do.
    of = sums(found, cross_entropy, losses_X).over(team)
    mean = of.cross_entropy / of.targets.clamp(min=1)
    divergence = ponder_divergence(of.halting_N / of.tokens.clamp(min=1), prior_N.double())
    allotment = step_allotment(of)
    return Objective(
        total=mean + ponder_weight * divergence - ALLOTMENT_WEIGHT * allotment,
        cross_entropy=mean,
        divergence=divergence,
        allotment=allotment,
        targets=int(of.targets),
        taken_N=of.taken_N.long(),
        output=found.output,
    )


class ObjectiveModule(nn.Module):
    """The objective as a module, for what wraps modules: its forward returns the total, and `found` keeps all of it.

    The model computes with the fastest operations that this installation has from then on.
    """

    found: Objective

    def __init__(self, model: CognateV1, prior_N: Tensor, *, precision: Precision, team: Team = ALONE) -> None:
        super().__init__()
        self.model = model
        model.compute_with(fused.choose())
        self._prior_N, self._precision, self._team = prior_N, precision, team

    def forward(
        self, batch: Batch, memory: MemoryState | None, ponder_weight: float, statistics: bool = False
    ) -> Tensor:
        """Return the total, see `objective`."""
        self.found = objective(
            self.model,
            batch,
            memory,
            self._prior_N,
            ponder_weight=ponder_weight,
            precision=self._precision,
            statistics=statistics,
            team=self._team,
        )
        return self.found.total
