"""A linear head on a text encoder: over a text for labels, over each token for tags. Numbers may come beside a text."""

# B rows, T tokens of the longest row, D encoder width, F features that come beside the text.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from agent_server.runtime.text_parts import Standardized
else:  # a package holds it beside this file
    from text_parts import Standardized


class Encoder(Protocol):
    """Hidden states of texts, and one of each text."""

    width: int

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a text's tokens, and where in it each begins and ends."""

    def __call__(self, tokens_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """Return hidden_BTD."""

    def pooled(self, tokens_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """Return pooled_BD."""


class EncoderAgent(nn.Module):
    """An encoder with its head. features: how many numbers come beside each text."""

    begin_token = end_token = -1

    def __init__(self, encoder: Any, output: str, labels: Sequence[str], sizes: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.output = output
        self.labels = tuple(labels)
        self.features = int(sizes["features"])
        if output == "tags":
            self.head = nn.Linear(encoder.width, 1 + 2 * len(labels))
            return
        self.text_scale = Standardized(encoder.width)
        projection = int(sizes["projection"]) if self.features else 0
        if self.features:
            self.feature_scale = Standardized(self.features)
            self.projection = nn.Linear(self.features, projection)
        self.head = nn.Linear(encoder.width + projection, len(labels))

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a text's tokens, and where in it each begins and ends."""
        found: tuple[list[int], list[tuple[int, int]]] = self.encoder.encode(text)
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        """Refuse: it writes no texts."""
        raise NotImplementedError("an encoder writes no texts")

    def forward(self, tokens_BT: Tensor, valid_BT: Tensor, features_BF: Tensor | None = None) -> Tensor:
        """Return logits_BL, or those of each token's tags."""
        if self.output == "tags":
            tags_BTC: Tensor = self.head(self.encoder(tokens_BT, valid_BT))
            return tags_BTC
        read = [self.text_scale(self.encoder.pooled(tokens_BT, valid_BT))]
        if self.features:
            read.append(F.gelu(self.projection(self.feature_scale(features_BF))))
        logits_BL: Tensor = self.head(torch.cat(read, -1))
        return logits_BL

    comparable = forward


def load_weights(model: nn.Module, folder: Path, *, read: set[str]) -> None:
    """Load model.safetensors into all that is not `read` yet. Errors: ValueError, for files of different agents."""
    missing, unexpected = model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"), strict=False)
    if wrong := [*unexpected, *(set(missing) - read)]:
        raise ValueError(f"model.safetensors and config.json do not belong together: {', '.join(sorted(wrong)[:3])}")
