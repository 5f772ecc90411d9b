"""An objective: examples in; batches, a loss and metrics out. The trainer knows tasks by this alone."""

# B rows of a batch, T tokens of its longest row.

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from agent_server.architectures.model import AgentBatch, AgentModel

# Tensors of equally many rows, by name. It can be dealt to the processes of a team, and each takes its share of rows.
Batch = Mapping[str, Tensor]
E = TypeVar("E")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a batch.

    mean: over its units, a scalar with gradient, in nats where it is a cross-entropy.
    counts: what was counted on the way, for metrics of training steps: sums over the batch, for instance `correct`.
    """

    mean: Tensor
    counts: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured value and the rows (or turns, or pairs) that it was measured on."""

    metric: str
    value: float
    rows: int


class Objective(abc.ABC, Generic[E, R]):
    """What a task asks of a model. E: a form of example. R: the same, encoded; `len` of it is its length in tokens.

    score: the metric that says which of two models is better. higher_is_better: which way.
    is_share: whether the score is a share of right answers, whose best value is 1.
    kl_weight, mask_actions: what recoveries ask for between two steps: to be held to the untrained model, and to write
        no action that is not allowed. Tasks without constraints read neither.
    needs_reference: whether rows have to be prepared with the untrained model before they are trained on or measured.
    """

    score: str
    higher_is_better: bool = True
    is_share: bool = False
    kl_weight: float = 0.0
    mask_actions: bool = False
    needs_reference: bool = False

    @property
    def allowed_actions(self) -> frozenset[str]:
        """The kinds of action that an agent may take. Empty where the task knows none."""
        return frozenset()

    @abc.abstractmethod
    def encode(self, model: AgentModel, examples: Sequence[E], *, max_tokens: int) -> list[R]:
        """Return the examples as the model reads them, cut off after max_tokens."""

    def prepare(
        self, reference: AgentModel, rows: Sequence[R], *, between: Callable[[], None] = lambda: None
    ) -> list[R]:
        """Return the rows with what the untrained model, in evaluation mode, says of them, where the task needs that.

        It is a function of that model and the rows, so that a resumed run finds the same without storing it.
        """
        return list(rows)

    def facts(self, rows: Sequence[R]) -> dict[str, int]:
        """Return what became of the texts when they were encoded, for instance how many were cut."""
        return {}

    @abc.abstractmethod
    def length(self, row: R) -> int:
        """Return how many tokens a row has, for batches of like length."""

    @abc.abstractmethod
    def batch(self, rows: Sequence[R]) -> Batch:
        """Return the rows as tensors, padded on the right."""

    @abc.abstractmethod
    def units(self, batch: Batch) -> float:
        """Return what the mean of a batch's loss is taken over: rows, or trained tokens, by weight. May be 0."""

    @abc.abstractmethod
    def loss(self, model: AgentModel, batch: Batch) -> Loss:
        """Return the loss. A batch without units has a loss of 0 that still reaches every trained parameter."""

    def rates(self, counts: Mapping[str, float], units: float) -> dict[str, float]:
        """Return metrics of training steps out of added-up counts and units; none unless there are some."""
        return {}

    @abc.abstractmethod
    def measure(
        self, model: AgentModel, rows: Sequence[R], *, between: Callable[[], None] = lambda: None
    ) -> list[Measurement]:
        """Return every metric of the task, of a model in evaluation mode. `between`, between batches, may raise."""

    def floor(self, rows: Sequence[R]) -> list[Measurement]:
        """Return what an agent has to beat that needs no model, for instance the share of the majority class."""
        return []

    def inputs(self, batch: Batch) -> AgentBatch:
        """Return what a model reads of a batch."""
        return AgentBatch(
            tokens_BT=batch["tokens_BT"], valid_BT=batch["valid_BT"], features_BF=batch.get("features_BF")
        )

    def comparable(self, model: AgentModel, batch: Batch) -> Tensor:
        """Return the logits by which two models are compared, where they count: not on padding."""
        logits = model.comparable_logits(self.inputs(batch))
        if logits.ndim == 3:  # [B, T, ...]
            logits = logits[batch["valid_BT"]]
        return logits


def sample(rows: Sequence[R], count: int, seed: int) -> Sequence[R]:
    """Return so many rows, the same ones for the same seed; 0 means all."""
    if count == 0 or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(permutation(len(rows), seed)[:count])]


def permutation(size: int, seed: int) -> list[int]:
    """Return the numbers below size in an order that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order
