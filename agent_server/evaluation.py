"""The rows of each step in a reproducible order, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from agent_server.architectures.model import AgentModel
from agent_server.objectives.base import Measurement, Objective, permutation

# Rows are sorted by length within so many batches: enough to save most padding, few enough to keep batches mixed.
_BUCKET_BATCHES = 16
E = TypeVar("E")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One measured result; `dataset` names the set, for instance "forge-intents/test"."""

    metric: str
    dataset: str
    value: float
    rows: int


class TrainingOrder(Generic[R]):
    """The rows of every step: a pure function of the seed and the step, so that a resumed run needs no position.

    Each epoch has an order of its own, holds every row once, and keeps rows of like length together.
    """

    def __init__(self, rows: Sequence[R], *, length: Callable[[R], int], batch_size: int, seed: int) -> None:
        self.rows = rows
        self._length = length
        self._batch_size = batch_size
        self._seed = seed
        self._per_epoch = -(-len(rows) // batch_size)
        self._epoch, self._batches = -1, list[list[int]]()

    def rows_of(self, step: int) -> list[R]:
        """Return the rows of one step, counted from 0."""
        epoch, position = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._order(epoch)
        return [self.rows[i] for i in self._batches[position]]

    def _order(self, epoch: int) -> list[list[int]]:
        # Seeds of neighbouring runs must not share epochs; 2**31 is far more of them than any run has.
        seed = self._seed * 2**31 + epoch
        order = permutation(len(self.rows), seed)
        span = self._batch_size * _BUCKET_BATCHES
        batches: list[list[int]] = []
        for start in range(0, len(order), span):
            bucket = sorted(order[start : start + span], key=lambda i: self._length(self.rows[i]))
            batches += [bucket[i : i + self._batch_size] for i in range(0, len(bucket), self._batch_size)]
        return [batches[i] for i in permutation(len(batches), seed)]


def measure(
    objective: Objective[E, R], model: AgentModel, rows: Sequence[R], *, between: Callable[[], None] = lambda: None
) -> list[Measurement]:
    """Measure a model as it would answer: in evaluation mode, and back in its own afterwards."""
    was_training = model.training
    model.eval()
    try:
        return objective.measure(model, rows, between=between)
    finally:
        model.train(was_training)
