"""What a built agent can do, whatever its architecture. Plugins subclass `AgentModel`."""

# B rows, T tokens of the longest row, L labels, V vocabulary, F features that come beside the text.

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from agent_server.tasks import Output
from cognateforge.exceptions import IncompatibleError
from training_common.attempt import Json


@dataclass(frozen=True, kw_only=True)
class AgentBatch:
    """Encoded texts, padded on the right to the longest one.

    tokens_BT: int64. valid_BT: bool, False for padding. features_BF: float32, what comes beside the text, or None.
    """

    tokens_BT: Tensor
    valid_BT: Tensor
    features_BF: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The tokens of one text, and where in it each begins and ends, in characters."""

    tokens: Sequence[int]
    offsets: Sequence[tuple[int, int]]


class AgentModel(nn.Module, abc.ABC):
    """A base model with what its task needs.

    labels: of classes or slots, in the order of their numbers; empty where there are none.
    output: what `forward` gives.
    context: most tokens that it can read; 0 for no bound.
    """

    labels: tuple[str, ...] = ()
    output: Output
    context: int = 0

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of each text, whole, without special ones."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens. Only language models are asked."""
        raise NotImplementedError(f"{type(self).__name__} does not write texts")

    @property
    def end_token(self) -> int:
        """The token that ends a text. Only language models are asked."""
        raise NotImplementedError(f"{type(self).__name__} does not write texts")

    @property
    def begin_token(self) -> int:
        """The token that every text begins with: the one that ends the text before, where a model has no other."""
        return self.end_token

    def calibrate(self, batch: AgentBatch) -> None:
        """Measure, on training rows, what the head needs to know before its first step. It belongs into buffers."""

    @abc.abstractmethod
    def forward(self, batch: AgentBatch) -> Tensor:
        """Return what `output` says."""

    def logits_at(self, batch: AgentBatch, places_BT: Tensor) -> Tensor:
        """Return what a language model's `forward` gives at the chosen places, [N, V]. Architectures can do with less
        memory than this, which makes the logits of all places first."""
        logits_BTV: Tensor = self(batch)
        return logits_BTV[places_BT]

    def comparable_logits(self, batch: AgentBatch) -> Tensor:
        """Return what `forward` does, along a path without thresholds.

        Two models that are equal but for rounding agree on these within rounding. A forward pass that branches on
        its activations, as ACT does, would not: a token on the threshold takes another branch.
        """
        logits: Tensor = self(batch)
        return logits

    @abc.abstractmethod
    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that start from random values; they have a learning rate of their own."""

    @abc.abstractmethod
    def base_model(self) -> nn.Module:
        """Return the part that adaptation applies to."""

    def blocks(self) -> Sequence[nn.Module]:
        """Return parts that every forward pass runs exactly once, whatever the batch: they can be gathered in turn."""
        return ()

    @abc.abstractmethod
    def save(self, folder: Path, *, extra: Mapping[str, Json]) -> None:
        """Write model.safetensors, config.json and the tokenizer's files; `extra` goes into config.json."""

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, stop: Sequence[int] = ()
    ) -> list[list[int]]:
        """Return the likeliest continuation of each prompt, without the token that ended it.

        stop: tokens that end a text, beside `end_token`. Architectures with a key-value cache do better than this loop.
        """
        ends = {self.end_token, *stop}
        written: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        for _ in range(max_tokens):
            if not going:
                break
            batch = collate([[*prompts[i], *written[i]] for i in going])
            logits_BTV: Tensor = self(batch)
            last = batch.valid_BT.sum(1) - 1
            chosen = logits_BTV[torch.arange(len(going)), last].argmax(-1).tolist()
            for i, token in zip(going, chosen, strict=True):
                if token not in ends:
                    written[i].append(token)
            going = [i for i, token in zip(going, chosen, strict=True) if token not in ends]
        return written


@torch.no_grad()
def require_logits(model: AgentModel, batch: AgentBatch, *, architecture: str) -> None:
    """Refuse a model that does not give one logit for each label, or for each tag of its slots.

    With more of them it would train, score and run, and answer with a label that nobody has named.
    Errors: IncompatibleError.
    """
    rows, tokens = batch.tokens_BT.shape
    labels = len(model.labels)
    needed = {Output.CLASSES: (rows, labels), Output.TAGS: (rows, tokens, 1 + 2 * labels)}.get(model.output)
    if needed is None:
        return
    found = tuple(model.eval()(batch).shape)
    if found != needed:
        raise IncompatibleError(
            f"the architecture {architecture} gives logits of shape {list(found)} for {rows} rows, and {labels} labels "
            f"need {list(needed)}; correct its forward, or the labels that its model has"
        )


def collate(rows: Sequence[Sequence[int]]) -> AgentBatch:
    """Pad rows of tokens to the longest one. A row without tokens is all padding."""
    longest = max(1, *map(len, rows)) if rows else 1
    tokens_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    valid_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        valid_BT[i, : len(row)] = True
    return AgentBatch(tokens_BT=tokens_BT, valid_BT=valid_BT)
