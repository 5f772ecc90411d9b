"""Batches of a labelled set in a reproducible order, and what an agent scores on them."""

# B rows of a batch, L labels.

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from agent_server.architectures.model import AgentBatch, AgentModel, collate

# Rows are sorted by length within so many batches: enough to save most padding, few enough to keep batches mixed.
_BUCKET_BATCHES = 16
# No gradient is kept, so that wide batches cost little memory; wider ones were not faster on CPU.
_EVALUATION_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """Tokens and label of each row."""

    tokens: Sequence[Sequence[int]]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> AgentBatch:
        """Return the named rows, padded."""
        return collate([self.tokens[i] for i in indices], [self.labels[i] for i in indices])

    def all(self) -> AgentBatch:
        """Return every row, padded."""
        return self.batch(range(len(self)))

    def sample(self, rows: int, seed: int) -> EncodedRows:
        """Return so many rows, the same ones for the same seed; 0 means all."""
        if rows == 0 or rows >= len(self):
            return self
        kept = sorted(_permutation(len(self), seed)[:rows])
        return EncodedRows(tokens=[self.tokens[i] for i in kept], labels=[self.labels[i] for i in kept])


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One measured result; `dataset` names the set, for instance "forge-intents/test"."""

    metric: str
    dataset: str
    value: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """What an agent scored. macro_f1 is the mean over the labels that occur among the rows."""

    accuracy: float
    macro_f1: float
    rows: int


class TrainingOrder:
    """The rows of every step: a pure function of the seed and the step, so that a resumed run needs no position.

    Each epoch has an order of its own, holds every row once, and keeps rows of like length together.
    """

    def __init__(self, rows: EncodedRows, *, batch_size: int, seed: int) -> None:
        self.rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._per_epoch = -(-len(rows) // batch_size)
        self._epoch, self._batches = -1, list[list[int]]()

    def batch(self, step: int) -> AgentBatch:
        """Return the rows of one step, counted from 0."""
        epoch, position = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._order(epoch)
        return self.rows.batch(self._batches[position])

    def _order(self, epoch: int) -> list[list[int]]:
        # Seeds of neighbouring runs must not share epochs; 2**31 is far more of them than any run has.
        seed = self._seed * 2**31 + epoch
        order = _permutation(len(self.rows), seed)
        span = self._batch_size * _BUCKET_BATCHES
        batches: list[list[int]] = []
        for start in range(0, len(order), span):
            bucket = sorted(order[start : start + span], key=lambda i: len(self.rows.tokens[i]))
            batches += [bucket[i : i + self._batch_size] for i in range(0, len(bucket), self._batch_size)]
        return [batches[i] for i in _permutation(len(batches), seed)]


def _permutation(size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


def majority_share(rows: EncodedRows) -> float:
    """Return the share of the most frequent label: what the best constant answer scores."""
    return max(Counter(rows.labels).values()) / len(rows)


def evaluate(model: AgentModel, rows: EncodedRows, *, between: Callable[[], None] = lambda: None) -> Score:
    """Measure accuracy and macro-F1; `between` runs before each batch and may raise."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows.tokens[i]))
    pairs: Counter[tuple[int, int]] = Counter()  # (label, answer)
    try:
        for start in range(0, len(order), _EVALUATION_BATCH):
            between()
            indices = order[start : start + _EVALUATION_BATCH]
            answers = model.predict(rows.batch(indices)).tolist()
            pairs.update((rows.labels[i], answer) for i, answer in zip(indices, answers, strict=True))
    finally:
        model.train(was_training)
    return score(pairs)


def score(pairs: Counter[tuple[int, int]]) -> Score:
    """Return accuracy and macro-F1 of counted pairs of label and answer."""
    rows = sum(pairs.values())
    labelled: Counter[int] = Counter()
    answered: Counter[int] = Counter()
    for (label, answer), count in pairs.items():
        labelled[label] += count
        answered[answer] += count
    f1 = [2 * pairs[label, label] / (labelled[label] + answered[label]) for label in sorted(labelled)]
    right = sum(pairs[label, label] for label in labelled)
    return Score(accuracy=right / rows, macro_f1=sum(f1) / len(f1), rows=rows)
