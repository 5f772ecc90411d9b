"""What pretraining minimizes: the cross-entropy of a batch's targets, the prior on its halting, and how it is allotted.

Letters as in `cognate_v1`; X the positions of a batch that have a target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cognate_server.cross_entropy import head_cross_entropy
from cognate_server.precision import Precision
from cognate_server.stream import Batch
from training_common.models.cognate_v1 import CognateOutput, CognateV1, MemoryState, Recall

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


def ponder_divergence(output: CognateOutput, prior_N: Tensor) -> Tensor:
    """Return KL(mean halting distribution || prior). Padding counts for nothing: its distribution is zero."""
    tokens = (output.steps_BT > 0).sum().clamp(min=1)
    mean_N = output.halting_BTN.sum((0, 1)) / tokens
    return torch.xlogy(mean_N, mean_N).sum() - (mean_N * prior_N.log()).sum()


def step_allotment(halting_XN: Tensor, losses_X: Tensor) -> Tensor:
    """Return the correlation of the tokens' expected ponder steps with their losses, -1 to 1; 0 where either is flat.

    The prior fixes how many steps the tokens take together, and says nothing about which of them takes many. Without
    this, correlations were 0 after 400 steps of Cognate-25M. The halting unit learns to tell hard tokens from easy ones
    by it, as exits by confidence do (Schuster et al. 2022, arXiv:2207.07061), without a head at every step.

    losses_X: a yardstick; no gradient goes through it.
    """
    numbers_N = torch.arange(1, halting_XN.shape[1] + 1, device=halting_XN.device, dtype=halting_XN.dtype)
    steps_X, losses_X = halting_XN @ numbers_N, losses_X.detach()
    if len(steps_X) == 0:
        return halting_XN.new_zeros(())
    steps_X, losses_X = steps_X - steps_X.mean(), losses_X - losses_X.mean()
    variances = (steps_X.square().mean() + _VARIANCE_FLOOR) * (losses_X.square().mean() + _VARIANCE_FLOOR)
    return (steps_X * losses_X).mean() / variances.sqrt()


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


def mean_cross_entropy(model: CognateV1, found: Predictions) -> tuple[Tensor, Tensor]:
    """Return the targets' mean cross-entropy in nats (0 of no target), and each one's without a gradient: (X,)."""
    mixture = None
    if found.recall_X is not None:
        mixture = (found.recall_X.log_own, found.recall_X.log_part_of(found.targets_X))
    total, losses_X = head_cross_entropy(
        model.head(found.hidden_XD), model.embedding.weight, model.head_bias_V, found.targets_X, mixture
    )
    return total / max(1, found.targets_X.shape[0]), losses_X


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
    """What a batch's gradient is taken of, and its parts.

    total: cross_entropy + ponder weight * divergence - ALLOTMENT_WEIGHT * allotment. cross_entropy: nats per target.
    targets: how many there are.
    """

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    allotment: Tensor
    targets: int
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
) -> Objective:
    """Run the model on a batch and return what training minimizes; `memory` is what the rows go on from."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.BFLOAT16):
        found = forward(model, batch, memory, statistics=statistics)
        cross_entropy, losses_X = mean_cross_entropy(model, found)
    divergence = ponder_divergence(found.output, prior_N)
    allotment = step_allotment(found.output.halting_BTN[found.trained_BT], losses_X)
    return Objective(
        total=cross_entropy + ponder_weight * divergence - ALLOTMENT_WEIGHT * allotment,
        cross_entropy=cross_entropy,
        divergence=divergence,
        allotment=allotment,
        targets=found.targets_X.shape[0],
        output=found.output,
    )
