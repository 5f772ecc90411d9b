"""What a built agent can do, whatever its architecture. Plugins subclass `AgentModel`."""

# B rows, T tokens of the longest row, L labels.

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training_common.attempt import Json


@dataclass(frozen=True, kw_only=True)
class AgentBatch:
    """Encoded texts, padded on the right to the longest one.

    tokens_BT: int64. valid_BT: bool, False for padding. labels_B: int64, or None where nobody knows them.
    """

    tokens_BT: Tensor
    valid_BT: Tensor
    labels_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class AgentLoss:
    """The loss of a batch, a scalar with gradient, and how many rows were answered rightly."""

    mean: Tensor
    correct: int


class AgentModel(nn.Module, abc.ABC):
    """A base model with a task head; `labels[i]` is what the answer i means."""

    labels: tuple[str, ...]

    @abc.abstractmethod
    def encode(self, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
        """Return the tokens of each text, cut off after max_tokens."""

    def calibrate(self, batch: AgentBatch) -> None:
        """Measure, on training rows, what the head needs to know before its first step. It belongs into buffers."""

    @abc.abstractmethod
    def forward(self, batch: AgentBatch) -> Tensor:
        """Return logits_BL."""

    @abc.abstractmethod
    def comparable_logits(self, batch: AgentBatch) -> Tensor:
        """Return logits_BL along a path without thresholds.

        Two models that are equal but for rounding agree on these within rounding. A forward pass that branches on
        its activations, as ACT does, would not: a token on the threshold takes another branch.
        """

    @abc.abstractmethod
    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the task head."""

    @abc.abstractmethod
    def base_model(self) -> nn.Module:
        """Return the part that adaptation applies to."""

    def blocks(self) -> Sequence[nn.Module]:
        """Return parts that every forward pass runs exactly once, whatever the batch: they can be gathered in turn."""
        return ()

    @abc.abstractmethod
    def save(self, folder: Path, *, extra: Mapping[str, Json]) -> None:
        """Write model.safetensors, config.json and tokenizer.json; `extra` goes into config.json."""

    def loss(self, batch: AgentBatch) -> AgentLoss:
        """Return the mean cross-entropy of a labelled batch, in nats."""
        if batch.labels_B is None:
            raise ValueError("a loss needs labels")
        logits_BL = self(batch)
        correct = int((logits_BL.detach().argmax(-1) == batch.labels_B).sum())
        return AgentLoss(mean=F.cross_entropy(logits_BL, batch.labels_B), correct=correct)

    @torch.no_grad()
    def predict(self, batch: AgentBatch) -> Tensor:
        """Return the answers_B: indices into `labels`."""
        logits_BL: Tensor = self(batch)
        return logits_BL.argmax(-1)


class LossModule(nn.Module):
    """An agent's loss as a module, for what wraps modules: its forward returns the loss, and `found` keeps the rest."""

    found: AgentLoss

    def __init__(self, model: AgentModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: AgentBatch) -> Tensor:
        """Return the mean loss of the batch."""
        self.found = self.model.loss(batch)
        return self.found.mean


def collate(rows: Sequence[Sequence[int]], labels: Sequence[int] | None = None) -> AgentBatch:
    """Pad rows of tokens to the longest one. A row without tokens is all padding."""
    longest = max(1, *map(len, rows)) if rows else 1
    tokens_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    valid_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        valid_BT[i, : len(row)] = True
    return AgentBatch(
        tokens_BT=tokens_BT,
        valid_BT=valid_BT,
        labels_B=None if labels is None else torch.tensor(labels, dtype=torch.int64),
    )
