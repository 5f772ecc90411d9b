"""What the validation rows say of a model, whole and with parts of it switched off."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cognate_server.construct import log_frequency
from cognate_server.losses import forward, masks, token_losses
from cognate_server.stream import Batch
from training_common.models.cognate_v1 import CognateV1, MemoryState


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """What the validation rows say. Losses in nats per token.

    unigram_loss: what the training data's token frequencies alone reach on these rows. It is where training starts.
    memory_gain_error, pondering_gain_error: standard error of loss_memory_off - loss and of loss_one_step - loss, from
        how much that difference varies among the rows. A single row varies by nothing known: the gain's size stands in.
    """

    rows: int
    tokens: int
    loss: float
    loss_memory_off: float
    loss_one_step: float
    memory_gain_error: float
    pondering_gain_error: float
    unigram_loss: float
    mean_ponder_steps: float
    halting_histogram: tuple[float, ...]


@dataclass(frozen=True)
class RowLosses:
    """Sum of the cross-entropy and number of targets of each of R rows, and how many tokens took 0, 1, ... steps."""

    sums_R: Tensor
    targets_R: Tensor
    steps_N: Tensor

    @property
    def mean(self) -> float:
        """Cross-entropy per target, in nats."""
        return float(self.sums_R.sum() / self.targets_R.sum().clamp(min=1))

    def error_of_gain(self, without: RowLosses) -> float:
        """Return the standard error of `without.mean - self.mean`, both on the same rows."""
        gains_R = without.sums_R - self.sums_R
        gain = float(gains_R.sum() / self.targets_R.sum())
        rows = len(gains_R)
        if rows == 1:
            return abs(gain)
        deviations_R = gains_R - gain * self.targets_R
        return math.sqrt(rows / (rows - 1) * float(deviations_R.square().sum())) / float(self.targets_R.sum())


@torch.no_grad()
def row_losses(model: CognateV1, batches: Iterable[Batch], **options: Any) -> RowLosses:
    """Run the model over the batches in order, the memory carried along; `options` are the model's own."""
    memory: MemoryState | None = None
    sums, targets = [], []
    steps_N = torch.zeros(model.config.max_steps + 1, dtype=torch.int64)
    for batch in batches:
        found = forward(model, batch, memory, **options)
        memory = found.output.memory
        losses_BT = torch.zeros(found.trained_BT.shape, dtype=torch.float64)
        losses_X = token_losses(model, found)
        losses_BT[found.trained_BT] = losses_X.double()
        sums.append(losses_BT.sum(1))
        targets.append(found.trained_BT.sum(1))
        steps_N += torch.bincount(found.output.steps_BT.reshape(-1), minlength=len(steps_N))
    return RowLosses(torch.cat(sums), torch.cat(targets), steps_N)


def unigram_loss(batches: Iterable[Batch], unigram_counts_V: Tensor) -> float:
    """Return the targets' mean cross-entropy under the counts' smoothed distribution, in nats per token.

    Not the entropy of the targets' own counts: of a few thousand tokens that is far too low, since it knows them.
    """
    targets = torch.cat([targets_BT[targets_BT >= 0] for targets_BT in (masks(batch).targets_BT for batch in batches)])
    return -float(log_frequency(unigram_counts_V).double()[targets].mean())


def validate(model: CognateV1, batches: list[Batch], unigram_counts_V: Tensor) -> ValidationReport:
    """Measure the model on whole batches: as it is, with the memory's reads off, and with one core step.

    unigram_counts_V: how often the training data has each token.

    Errors: ValueError, when the batches have no target.
    """
    if not any(bool((masks(batch).targets_BT >= 0).any()) for batch in batches):
        raise ValueError("the validation batches have no token to predict")
    whole = row_losses(model, batches)
    memory_off = row_losses(model, batches, read_memory=False)
    one_step = row_losses(model, batches, fixed_steps=1)
    histogram = step_histogram(whole.steps_N)
    return ValidationReport(
        rows=len(whole.targets_R),
        tokens=int(whole.targets_R.sum()),
        loss=whole.mean,
        loss_memory_off=memory_off.mean,
        loss_one_step=one_step.mean,
        memory_gain_error=whole.error_of_gain(memory_off),
        pondering_gain_error=whole.error_of_gain(one_step),
        unigram_loss=unigram_loss(batches, unigram_counts_V),
        mean_ponder_steps=mean_steps(histogram),
        halting_histogram=tuple(histogram),
    )


def step_histogram(counts_N: Tensor) -> list[float]:
    """Turn counts of 0, 1, 2, ... steps into shares of 1, 2, ...: padding takes 0 steps and does not count."""
    shares: list[float] = (counts_N[1:] / counts_N[1:].sum().clamp(min=1)).tolist()
    return shares


def mean_steps(histogram: list[float]) -> float:
    """Return the mean of a histogram of 1, 2, ... steps."""
    return sum(share * (index + 1) for index, share in enumerate(histogram))


def first_rows(batches: Iterable[Batch], rows: int) -> list[Batch]:
    """Take whole batches until there are so many rows, and cut the last one."""
    taken: list[Batch] = []
    for batch in batches:
        left = rows - sum(len(one.tokens) for one in taken)
        if left <= 0:
            break
        taken.append(
            Batch(
                tokens=batch.tokens[:left],
                segment_ids=None if batch.segment_ids is None else batch.segment_ids[:left],
                fresh_rows=None if batch.fresh_rows is None else batch.fresh_rows[:left],
            )
        )
    return taken
