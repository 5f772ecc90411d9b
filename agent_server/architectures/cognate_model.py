"""A classifier on top of Cognate: what a text's tokens mean on average -> standardized -> linear head."""

# B rows, T tokens of the longest row, D model width, F = 2 D features of a text, L labels.

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from agent_server.adaptation import Adaptation, adapt
from agent_server.architectures.model import AgentBatch, AgentModel
from cognateforge.exceptions import ArtifactCorruptError, IncompatibleError, NotImplementedByServerError
from training_common.attempt import Json
from training_common.models.cognate_v1 import (
    ACT_PREFIXES,
    LTM_PREFIXES,
    NORM_EPSILON,
    ArchitectureMismatchError,
    CognateV1,
    config_from_json,
    config_to_json,
    load_state,
)

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
_FORMAT = 1
# Attention and feed-forward maps of every block. The halting unit and the memory have linear maps too, but are not
# touched by low-rank updates; the head of the language model is not read by a classifier.
_BLOCKS = ("prelude.", "core.", "coda.")
_UNUSED_PREFIXES = ("head.", "head_bias_V")
_HEAD_STD = 0.02
# A feature that hardly moves among the measured rows must not be blown up beyond reason.
_MIN_DEVIATION = 1e-3


class CognateClassifier(AgentModel):
    """Cognate with a linear head on the mean of a text's hidden states beside the mean of its embeddings.

    Features are brought to mean 0 and deviation 1 by what `calibrate` measured. Without that the head hardly learns:
    the hidden states of a lightly trained Cognate share one large component, and what tells texts apart is small
    beside it. The embeddings keep single words readable for the head while the layers above are still raw.
    """

    feature_mean_F: Tensor
    feature_scale_F: Tensor

    def __init__(self, foundation: CognateV1, tokenizer: Tokenizer, labels: Sequence[str]) -> None:
        super().__init__()
        features = 2 * foundation.config.width
        self.foundation = foundation
        self.register_buffer("feature_mean_F", torch.zeros(features))
        self.register_buffer("feature_scale_F", torch.ones(features))
        self.head = nn.Linear(features, len(labels))
        self.labels = tuple(labels)
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
        """Return the tokens of each text, cut off after max_tokens."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids[:max_tokens] for encoding in encodings]

    @torch.no_grad()
    def calibrate(self, batch: AgentBatch) -> None:
        """Measure mean and deviation of the features on training rows."""
        features_BF = self._features(batch, fixed_steps=None)
        self.feature_mean_F.copy_(features_BF.mean(0))
        self.feature_scale_F.copy_(1 / features_BF.std(0, correction=0).clamp(min=_MIN_DEVIATION))

    def forward(self, batch: AgentBatch) -> Tensor:
        """Return logits_BL."""
        return self._logits(batch, fixed_steps=None)

    def comparable_logits(self, batch: AgentBatch) -> Tensor:
        """Return logits_BL with ACT off: every token takes every step."""
        return self._logits(batch, fixed_steps=self.foundation.config.max_steps)

    def _logits(self, batch: AgentBatch, *, fixed_steps: int | None) -> Tensor:
        features_BF = self._features(batch, fixed_steps=fixed_steps)
        logits_BL: Tensor = self.head((features_BF - self.feature_mean_F) * self.feature_scale_F)
        return logits_BL

    def _features(self, batch: AgentBatch, *, fixed_steps: int | None) -> Tensor:
        output = self.foundation(batch.tokens_BT, valid_BT=batch.valid_BT, fixed_steps=fixed_steps)
        embedded_BTD = self.foundation.embedding(batch.tokens_BT)
        embedded_BTD = F.rms_norm(embedded_BTD, embedded_BTD.shape[-1:], None, NORM_EPSILON)
        both_BTF = torch.cat((output.hidden_BTD, embedded_BTD), -1)
        valid_BT1 = batch.valid_BT.unsqueeze(-1).to(both_BTF.dtype)
        return (both_BTF * valid_BT1).sum(1) / valid_BT1.sum(1).clamp(min=1)

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the classification head's weight and bias."""
        return list(self.head.parameters())

    def base_model(self) -> nn.Module:
        """Return Cognate."""
        return self.foundation

    def blocks(self) -> Sequence[nn.Module]:
        """Return prelude and coda: the core runs as often as the batch's tokens want."""
        return (*self.foundation.prelude, *self.foundation.coda)

    def save(self, folder: Path, *, extra: Mapping[str, Json]) -> None:
        """Write weights, configuration and tokenizer."""
        tensors = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)
        config = {
            "format": _FORMAT,
            "architecture": "cognate",
            "task": "classification",
            "labels": list(self.labels),
            "foundation_config": config_to_json(self.foundation.config),
            **extra,
        }
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        self.tokenizer.save(str(folder / TOKENIZER_FILE))


def build(
    foundation_dir: Path, *, task: str, labels: Sequence[str], adaptation: Adaptation, seed: int
) -> CognateClassifier:
    """Return an untrained classifier on top of a fetched Cognate.

    Errors: IncompatibleError, when the folder holds another architecture; NotImplementedByServerError for another task.
    """
    if task != "classification":
        raise NotImplementedByServerError(f"the cognate architecture does not serve the task {task!r} yet")
    try:
        config = config_from_json(_read_json(foundation_dir / CONFIG_FILE))
        foundation = CognateV1(config)
        load_state(foundation, foundation_dir / WEIGHTS_FILE)
    except ArchitectureMismatchError as error:
        raise IncompatibleError(f"the foundation is not a cognate_v1 that this release can run: {error}") from error
    model = CognateClassifier(foundation, _read_tokenizer(foundation_dir), labels)
    linear_layers = [
        name
        for name, module in foundation.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(_BLOCKS)
    ]
    adapt(
        foundation,
        adaptation,
        linear_layers=linear_layers,
        adaptive_prefixes=ACT_PREFIXES + LTM_PREFIXES,
        unused_prefixes=_UNUSED_PREFIXES,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(model.head.weight, std=_HEAD_STD, generator=generator)
    nn.init.zeros_(model.head.bias)
    return model


def load(folder: Path) -> CognateClassifier:
    """Return a classifier that `CognateClassifier.save` wrote.

    Errors: ArtifactCorruptError, when configuration and weights do not belong together.
    """
    config = _read_json(folder / CONFIG_FILE)
    if config.get("format") != _FORMAT or config.get("architecture") != "cognate":
        raise ArtifactCorruptError(f"{folder.name} holds no cognate agent of format {_FORMAT}")
    try:
        foundation = CognateV1(config_from_json(config["foundation_config"]))
        model = CognateClassifier(foundation, _read_tokenizer(folder), config["labels"])
        model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    except (ArchitectureMismatchError, KeyError, RuntimeError) as error:
        raise ArtifactCorruptError(f"{folder.name}: {error}") from error
    return model.eval()


def _read_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    # Not part of the file: a user's "<|endoftext|>" is text, never the token that parts documents.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ArtifactCorruptError(f"{path.name} is no JSON object")
    return value
