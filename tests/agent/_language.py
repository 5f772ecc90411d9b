"""A language model and tagger without surprises: what comes next depends on the last word alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from agent_server.architectures.model import AgentBatch, AgentModel, Encoding
from agent_server.tasks import Output
from training_common.attempt import Json

BEGIN, END, UNKNOWN = 0, 1, 2
# Words with the space before them, so that texts come back as they were; single characters otherwise.
_TOKEN = re.compile(r" ?\w+|\s|[^\w\s]")


class BigramModel(AgentModel):
    """Logits out of a table with a row for each last token: [V, V] for a writer, [V, G] for a tagger."""

    def __init__(self, texts: Iterable[str], *, labels: Sequence[str] = (), context: int = 0) -> None:
        super().__init__()
        tokens = sorted({token for text in texts for token in _TOKEN.findall(text)})
        self.words = ["<begin>", "<end>", "<unknown>", *tokens]
        self.numbers = {word: number for number, word in enumerate(self.words)}
        self.labels, self.context = tuple(labels), context
        self.output = Output.TAGS if labels else Output.LANGUAGE
        width = 1 + 2 * len(labels) if labels else len(self.words)
        self.table_VX = nn.Parameter(torch.zeros(len(self.words), width))

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        return [
            Encoding(
                tokens=[self.numbers.get(found.group(), UNKNOWN) for found in _TOKEN.finditer(text)],
                offsets=[found.span() for found in _TOKEN.finditer(text)],
            )
            for text in texts
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.words[token] for token in tokens if token > UNKNOWN)

    @property
    def begin_token(self) -> int:
        return BEGIN

    @property
    def end_token(self) -> int:
        return END

    def forward(self, batch: AgentBatch) -> Tensor:
        return self.table_VX[batch.tokens_BT]

    def head_parameters(self) -> list[nn.Parameter]:
        return []

    def base_model(self) -> nn.Module:
        return self

    def save(self, folder: Path, *, extra: Mapping[str, Json]) -> None:
        raise AssertionError("it is never published")

    def learn(self, *texts: str, strength: float = 9.0) -> None:
        """Hold likely what follows what in the texts, which end with an end token."""
        with torch.no_grad():
            for encoding in self.encode(texts):
                own = [BEGIN, *encoding.tokens, END]
                for last, following in itertools.pairwise(own):
                    self.table_VX[last, following] = strength
