"""Agents on Cognate: one that chooses a label for a text, one that tags its tokens, one that writes."""

# B rows, T tokens of the longest row, D model width, F features.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

if TYPE_CHECKING:
    from agent_server import bottlenecks
    from training_common.models import cognate_v1
else:  # a package holds them beside this file
    import bottlenecks
    import cognate_v1


class CognateAgent(nn.Module):
    """Cognate and its tokenizer."""

    output = ""
    begin_token = end_token = -1

    def __init__(self, foundation: cognate_v1.CognateV1, tokenizer: Tokenizer, labels: Sequence[str]) -> None:
        super().__init__()
        self.foundation = foundation
        self.tokenizer = tokenizer
        self.labels = tuple(labels)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a text's tokens, and where in it each begins and ends."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def forward(self, tokens_BT: Tensor, valid_BT: Tensor, features_BF: Tensor | None = None) -> Tensor:
        """Return logits."""
        return self.logits(tokens_BT, valid_BT, fixed_steps=None)

    def comparable(self, tokens_BT: Tensor, valid_BT: Tensor, features_BF: Tensor | None = None) -> Tensor:
        """Return logits with every token taking every step: halting is a threshold."""
        return self.logits(tokens_BT, valid_BT, fixed_steps=self.foundation.config.max_steps)

    def logits(self, tokens_BT: Tensor, valid_BT: Tensor, *, fixed_steps: int | None) -> Tensor:
        """Return logits after so many steps, or as many as each token takes."""
        raise NotImplementedError


class WithHead(CognateAgent):
    """Cognate with a linear head on standardized features."""

    feature_mean_F: Tensor
    feature_scale_F: Tensor

    def __init__(
        self, foundation: cognate_v1.CognateV1, tokenizer: Tokenizer, labels: Sequence[str], features: int, outputs: int
    ) -> None:
        super().__init__(foundation, tokenizer, labels)
        self.register_buffer("feature_mean_F", torch.zeros(features))
        self.register_buffer("feature_scale_F", torch.ones(features))
        self.head = nn.Linear(features, outputs)

    def logits(self, tokens_BT: Tensor, valid_BT: Tensor, *, fixed_steps: int | None) -> Tensor:
        """Return the head's logits."""
        output = self.foundation(tokens_BT, valid_BT=valid_BT, fixed_steps=fixed_steps)
        embedded_BTD = self.foundation.embedding(tokens_BT)
        embedded_BTD = F.rms_norm(embedded_BTD, embedded_BTD.shape[-1:], None, cognate_v1.NORM_EPSILON)
        features = self.head_input(torch.cat((output.hidden_BTD, embedded_BTD), -1), valid_BT)
        logits: Tensor = self.head((features - self.feature_mean_F) * self.feature_scale_F)
        return logits

    def head_input(self, both_BTF: Tensor, valid_BT: Tensor) -> Tensor:
        """Return what the head reads of hidden states beside embeddings."""
        raise NotImplementedError


class Classifier(WithHead):
    """The head reads the means over a text's tokens."""

    output = "classes"

    def __init__(self, foundation: cognate_v1.CognateV1, tokenizer: Tokenizer, labels: Sequence[str]) -> None:
        super().__init__(foundation, tokenizer, labels, 2 * foundation.config.width, len(labels))

    def head_input(self, both_BTF: Tensor, valid_BT: Tensor) -> Tensor:
        """Return the means, [B, 2 D]."""
        valid_BT1 = valid_BT.unsqueeze(-1).to(both_BTF.dtype)
        return (both_BTF * valid_BT1).sum(1) / valid_BT1.sum(1).clamp(min=1)


class Tagger(WithHead):
    """The head reads each token, and the embedding of the next one."""

    output = "tags"

    def __init__(self, foundation: cognate_v1.CognateV1, tokenizer: Tokenizer, labels: Sequence[str]) -> None:
        super().__init__(foundation, tokenizer, labels, 3 * foundation.config.width, 1 + 2 * len(labels))

    def head_input(self, both_BTF: Tensor, valid_BT: Tensor) -> Tensor:
        """Return each token's features, [B, T, 3 D]."""
        embedded_BTD = both_BTF[..., self.foundation.config.width :] * valid_BT.unsqueeze(-1)
        return torch.cat((both_BTF, F.pad(embedded_BTD[:, 1:], (0, 0, 0, 1))), -1)


class Writer(CognateAgent):
    """Cognate's own head, and what its memory recalls."""

    output = "language"

    def __init__(self, foundation: cognate_v1.CognateV1, tokenizer: Tokenizer, labels: Sequence[str]) -> None:
        super().__init__(foundation, tokenizer, labels)
        self.begin_token, self.end_token = _token(tokenizer, "<|bos|>"), _token(tokenizer, "<|eos|>")

    def logits(self, tokens_BT: Tensor, valid_BT: Tensor, *, fixed_steps: int | None) -> Tensor:
        """Return log probabilities, [B, T, V]."""
        output = self.foundation(tokens_BT, valid_BT=valid_BT, fixed_steps=fixed_steps)
        own = self.foundation.logits(output.hidden_BTD).float().log_softmax(-1)
        recall = output.recall
        if recall is None:
            return own
        recalled = (recall.log_shares + recall.log_recalled.unsqueeze(-1)).float().exp()
        recalled = recalled.masked_fill(recall.tokens == cognate_v1.EMPTY, 0)
        sums = torch.zeros_like(own).scatter_add(-1, recall.tokens.clamp(min=0), recalled)
        return torch.logaddexp(own + recall.log_own.unsqueeze(-1), (sums + torch.finfo(sums.dtype).tiny).log())


def _token(tokenizer: Tokenizer, text: str) -> int:
    found = tokenizer.token_to_id(text)
    if found is None:
        raise ValueError(f"the tokenizer has no token {text}")
    return int(found)


_KINDS = {"classes": Classifier, "tags": Tagger, "language": Writer}


def load(folder: Path, config: Mapping[str, Any], output: str) -> CognateAgent:
    """Return the agent of a package's folder."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Not part of the file: a user's "<|eos|>" is text, never the token that ends documents.
    tokenizer.encode_special_tokens = True
    foundation = cognate_v1.CognateV1(cognate_v1.config_from_json(config["foundation_config"]))
    blocks = (*foundation.prelude, *foundation.core, *foundation.coda)
    bottlenecks.install_bottlenecks(blocks, config["bottleneck_width"], features=foundation.config.width)
    model = _KINDS[output](foundation, tokenizer, config["labels"])
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model.eval()
