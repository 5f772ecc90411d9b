"""What pretraining minimizes: the cross-entropy of a batch's targets, and the prior on its halting.

Letters as in `cognate_v1`; X the positions of a batch that have a target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cognate_server.cross_entropy import head_cross_entropy
from cognate_server.precision import Precision
from cognate_server.stream import Batch
from training_common.models.cognate_v1 import CognateOutput, CognateV1, MemoryState

PONDER_WEIGHT = 0.1
PONDER_MEAN = 2.0


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
    """A batch's output, and the hidden states of the X positions that have a target."""

    output: CognateOutput
    hidden_XD: Tensor
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
    if not bool(trained_BT.all()):
        hidden_XD, targets_X = hidden_XD[trained_BT.reshape(-1)], targets_X[trained_BT.reshape(-1)]
    return Predictions(output, hidden_XD, targets_X, trained_BT)


def mean_cross_entropy(model: CognateV1, found: Predictions) -> Tensor:
    """Return the targets' mean cross-entropy in nats, float32; 0 where there is no target."""
    total = head_cross_entropy(model.head(found.hidden_XD), model.embedding.weight, model.head_bias_V, found.targets_X)
    return total / max(1, found.targets_X.shape[0])


def _starting_memory(model: CognateV1, batch: Batch, memory: MemoryState | None) -> MemoryState | None:
    """Carry the memory over in the rows that go on, and start afresh in the others."""
    if memory is None or batch.fresh_rows is None or bool(batch.fresh_rows.all()):
        return None
    fresh_B11 = batch.fresh_rows.view(-1, 1, 1)
    carried_BMD = memory.contents_BMD[: len(fresh_B11)]  # the last validation batch may be cut
    return MemoryState(torch.where(fresh_B11, model.memory.initial_MD, carried_BMD))


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a batch's gradient is taken of, and its parts.

    total: cross_entropy + ponder weight * divergence. cross_entropy: nats per target. targets: how many there are.
    """

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor
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
        cross_entropy = mean_cross_entropy(model, found)
    divergence = ponder_divergence(found.output, prior_N)
    return Objective(
        total=cross_entropy + ponder_weight * divergence,
        cross_entropy=cross_entropy,
        divergence=divergence,
        targets=found.targets_X.shape[0],
        output=found.output,
    )
