"""Agents on top of Cognate: one that chooses a label for a text, one that tags its tokens, one that writes.

CognateClassifier   what a text's tokens mean on average -> standardized -> linear head
CognateTagger       each token with the next one's embedding -> standardized -> linear head
CognateWriter       Cognate's own head and memory
"""

# B rows, T tokens of the longest row, D model width, F features, V vocabulary, M memory slots.

from __future__ import annotations

import abc
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from agent_server.adaptation import adapt
from agent_server.architectures.factory import BuildRequest
from agent_server.architectures.model import AgentBatch, AgentModel, Encoding
from agent_server.bottlenecks import bottleneck_width, install_bottlenecks
from agent_server.tasks import OUTPUTS, Output
from cognateforge.exceptions import ArtifactCorruptError, IncompatibleError, NotImplementedByServerError
from training_common.attempt import Json
from training_common.models.cognate_v1 import (
    ACT_PREFIXES,
    EMPTY,
    LTM_PREFIXES,
    NORM_EPSILON,
    ArchitectureMismatchError,
    CognateV1,
    Recall,
    config_from_json,
    config_to_json,
    load_state,
)
from training_common.models.generation import generate as continue_texts

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
_FORMAT = 1
# Attention and feed-forward maps of every block. The halting unit and the memory have linear maps too, but are not
# touched by low-rank updates; the head of the language model is read only by an agent that writes.
_BLOCKS = ("prelude.", "core.", "coda.")
_HEAD_PREFIXES = ("head.", "head_bias_V")
# The tokens that documents of pretraining begin and end with, as Cognate's tokenizer spells them.
BEGIN, END = "<|bos|>", "<|eos|>"
_HEAD_STD = 0.02
# A feature that hardly moves among the measured rows must not be blown up beyond reason.
_MIN_DEVIATION = 1e-3


class CognateAgent(AgentModel):
    """What Cognate's agents share: its foundation and tokenizer, and their files.

    task: its field name in TrainingPlan.
    """

    def __init__(self, foundation: CognateV1, tokenizer: Tokenizer, *, task: str, labels: Sequence[str] = ()) -> None:
        super().__init__()
        self.foundation = foundation
        self.tokenizer = tokenizer
        self.task = task
        self.labels = tuple(labels)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of each text."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [Encoding(tokens=encoding.ids, offsets=encoding.offsets) for encoding in encodings]

    def base_model(self) -> nn.Module:
        """Return Cognate."""
        return self.foundation

    def blocks(self) -> Sequence[nn.Module]:
        """Return prelude and coda: the core runs as often as the batch's tokens want."""
        return (*self.foundation.prelude, *self.foundation.coda)

    def begin_head(self, generator: torch.Generator) -> None:
        """Give the head its first random values."""

    def save(self, folder: Path, *, extra: Mapping[str, Json]) -> None:
        """Write weights, configuration and tokenizer."""
        tensors = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)
        config = {
            "format": _FORMAT,
            "architecture": "cognate",
            "task": self.task,
            "labels": list(self.labels),
            "foundation_config": config_to_json(self.foundation.config),
            "bottleneck_width": bottleneck_width(_all_blocks(self.foundation)),
            **extra,
        }
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        self.tokenizer.save(str(folder / TOKENIZER_FILE))


class _CognateWithHead(CognateAgent, abc.ABC):
    """Cognate with a linear head on standardized features.

    Features are brought to mean 0 and deviation 1 by what `calibrate` measured. Without that the head hardly learns:
    the hidden states of a lightly trained Cognate share one large component, and what tells texts apart is small
    beside it. The embeddings keep single words readable for the head while the layers above are still raw.
    """

    feature_mean_F: Tensor
    feature_scale_F: Tensor

    def __init__(
        self,
        foundation: CognateV1,
        tokenizer: Tokenizer,
        *,
        task: str,
        labels: Sequence[str],
        features: int,
        outputs: int,
    ) -> None:
        super().__init__(foundation, tokenizer, task=task, labels=labels)
        self.register_buffer("feature_mean_F", torch.zeros(features))
        self.register_buffer("feature_scale_F", torch.ones(features))
        self.head = nn.Linear(features, outputs)

    @torch.no_grad()
    def calibrate(self, batch: AgentBatch) -> None:
        """Measure mean and deviation of the features on training rows, unless a published head rests on others."""
        if not torch.equal(self.feature_scale_F, torch.ones_like(self.feature_scale_F)):
            return
        measured = self.measured_features(batch)
        self.feature_mean_F.copy_(measured.mean(0))
        self.feature_scale_F.copy_(1 / measured.std(0, correction=0).clamp(min=_MIN_DEVIATION))

    def forward(self, batch: AgentBatch) -> Tensor:
        """Return the head's logits."""
        return self._logits(batch, fixed_steps=None)

    def comparable_logits(self, batch: AgentBatch) -> Tensor:
        """Return the head's logits with ACT off: every token takes every step."""
        return self._logits(batch, fixed_steps=self.foundation.config.max_steps)

    def _logits(self, batch: AgentBatch, *, fixed_steps: int | None) -> Tensor:
        features = self.features(batch, fixed_steps=fixed_steps)
        logits: Tensor = self.head((features - self.feature_mean_F) * self.feature_scale_F)
        return logits

    @abc.abstractmethod
    def features(self, batch: AgentBatch, *, fixed_steps: int | None) -> Tensor:
        """Return what the head reads, [..., F]."""

    @abc.abstractmethod
    def measured_features(self, batch: AgentBatch) -> Tensor:
        """Return the features that count, [N, F]: not those of padding."""

    def token_features(self, batch: AgentBatch, *, fixed_steps: int | None) -> Tensor:
        """Return the hidden state of each token beside its embedding, [B, T, 2 D]."""
        output = self.foundation(batch.tokens_BT, valid_BT=batch.valid_BT, fixed_steps=fixed_steps)
        embedded_BTD = self.foundation.embedding(batch.tokens_BT)
        embedded_BTD = F.rms_norm(embedded_BTD, embedded_BTD.shape[-1:], None, NORM_EPSILON)
        return torch.cat((output.hidden_BTD, embedded_BTD), -1)

    def head_parameters(self) -> list[nn.Parameter]:
        """Return the head's weight and bias."""
        return list(self.head.parameters())

    def begin_head(self, generator: torch.Generator) -> None:
        """Give the weight small random values, the bias zeros."""
        nn.init.normal_(self.head.weight, std=_HEAD_STD, generator=generator)
        nn.init.zeros_(self.head.bias)


class CognateClassifier(_CognateWithHead):
    """Cognate with a linear head on the mean of a text's hidden states beside the mean of its embeddings."""

    output = Output.CLASSES

    def __init__(self, foundation: CognateV1, tokenizer: Tokenizer, labels: Sequence[str]) -> None:
        features, outputs = 2 * foundation.config.width, len(labels)
        super().__init__(
            foundation, tokenizer, task="classification", labels=labels, features=features, outputs=outputs
        )

    def features(self, batch: AgentBatch, *, fixed_steps: int | None) -> Tensor:
        """Return the means over each text's tokens, [B, 2 D]."""
        both_BTF = self.token_features(batch, fixed_steps=fixed_steps)
        valid_BT1 = batch.valid_BT.unsqueeze(-1).to(both_BTF.dtype)
        return (both_BTF * valid_BT1).sum(1) / valid_BT1.sum(1).clamp(min=1)

    def measured_features(self, batch: AgentBatch) -> Tensor:
        """Return the features of each text."""
        return self.features(batch, fixed_steps=None)


class CognateTagger(_CognateWithHead):
    """Cognate with a linear head on each token's hidden state and embedding, and the embedding of the next token.

    A causal model does not see what follows; the next token's embedding lets the head look one token ahead, so that it
    can tell where a span ends.
    """

    output = Output.TAGS

    def __init__(self, foundation: CognateV1, tokenizer: Tokenizer, labels: Sequence[str]) -> None:
        features, outputs = 3 * foundation.config.width, 1 + 2 * len(labels)
        super().__init__(foundation, tokenizer, task="extraction", labels=labels, features=features, outputs=outputs)

    def features(self, batch: AgentBatch, *, fixed_steps: int | None) -> Tensor:
        """Return each token's features, [B, T, 3 D]; behind the last token there is nothing, which is zeros."""
        both_BTF = self.token_features(batch, fixed_steps=fixed_steps)
        embedded_BTD = both_BTF[..., self.foundation.config.width :] * batch.valid_BT.unsqueeze(-1)
        next_BTD = F.pad(embedded_BTD[:, 1:], (0, 0, 0, 1))
        return torch.cat((both_BTF, next_BTD), -1)

    def measured_features(self, batch: AgentBatch) -> Tensor:
        """Return the features of each token."""
        return self.features(batch, fixed_steps=None)[batch.valid_BT]


class CognateWriter(CognateAgent):
    """Cognate as the language model that it was pretrained to be: its own head, and what its memory recalls.

    Errors: IncompatibleError, when the tokenizer lacks the tokens that begin and end a text.
    """

    output = Output.LANGUAGE

    def __init__(self, foundation: CognateV1, tokenizer: Tokenizer, *, task: str) -> None:
        super().__init__(foundation, tokenizer, task=task)
        self._begin, self._end = (_control_token(tokenizer, token) for token in (BEGIN, END))

    @property
    def begin_token(self) -> int:
        """The token that every document of pretraining begins with."""
        return self._begin

    @property
    def end_token(self) -> int:
        """The token that every document of pretraining ends with."""
        return self._end

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens. Control tokens stand for nothing; a cut character becomes U+FFFD."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def forward(self, batch: AgentBatch) -> Tensor:
        """Return log probabilities, [B, T, V]."""
        output = self.foundation(batch.tokens_BT, valid_BT=batch.valid_BT)
        return self._log_p(output.hidden_BTD, output.recall)

    def logits_at(self, batch: AgentBatch, places_BT: Tensor) -> Tensor:
        """Return log probabilities at the chosen places, [N, V]; the head reads no others."""
        output = self.foundation(batch.tokens_BT, valid_BT=batch.valid_BT)
        recall = None if output.recall is None else output.recall.map(lambda part: part[places_BT])
        return self._log_p(output.hidden_BTD[places_BT], recall)

    def comparable_logits(self, batch: AgentBatch) -> Tensor:
        """Return log probabilities with ACT off: every token takes every step."""
        steps = self.foundation.config.max_steps
        output = self.foundation(batch.tokens_BT, valid_BT=batch.valid_BT, fixed_steps=steps)
        return self._log_p(output.hidden_BTD, output.recall)

    def _log_p(self, hidden: Tensor, recall: Recall | None) -> Tensor:
        """Return what head and memory say together: (..., D) -> (..., V). As CognateV1.log_probabilities, but with a
        gradient: the logarithm of 0 has none, that of the smallest float has."""
        own = self.foundation.logits(hidden).float().log_softmax(-1)
        if recall is None:
            return own
        recalled = (recall.log_shares + recall.log_recalled.unsqueeze(-1)).float().exp()
        recalled = recalled.masked_fill(recall.tokens == EMPTY, 0)
        sums = torch.zeros_like(own).scatter_add(-1, recall.tokens.clamp(min=0), recalled)
        return torch.logaddexp(own + recall.log_own.unsqueeze(-1), (sums + torch.finfo(sums.dtype).tiny).log())

    def head_parameters(self) -> list[nn.Parameter]:
        """Return none: the head is the foundation's own."""
        return []

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, stop: Sequence[int] = ()
    ) -> list[list[int]]:
        """Return the likeliest continuation of each prompt, over kept keys and values."""
        if bottleneck_width(_all_blocks(self.foundation)):  # which that way of generating, block by parts, passes by
            return super().generate(prompts, max_tokens=max_tokens, stop=stop)
        ends = {self.end_token, *stop}
        found = continue_texts(self.foundation, prompts, max_new_tokens=max_tokens, stop_token=self.end_token)
        return [list(itertools.takewhile(lambda token: token not in ends, one.tokens)) for one in found]


def build(request: BuildRequest) -> CognateAgent:
    """Return an untrained agent on top of a fetched Cognate.

    Errors: IncompatibleError, when the folder holds another architecture; NotImplementedByServerError for another task.
    """
    if request.base_dir is None:
        raise IncompatibleError("the cognate architecture stands on a foundation model; name one in plan.foundation")
    try:
        config = config_from_json(_read_json(request.base_dir / CONFIG_FILE))
        foundation = CognateV1(config)
        load_state(foundation, request.base_dir / WEIGHTS_FILE)
    except ArchitectureMismatchError as error:
        raise IncompatibleError(f"the foundation is not a cognate_v1 that this release can run: {error}") from error
    model = _agent(foundation, _read_tokenizer(request.base_dir), request.task, request.labels)
    return _prepared(model, request)


def build_on(folder: Path, request: BuildRequest) -> CognateAgent:
    """Return a published agent ready to be trained further; for another kind of output or other labels its head is new.

    Errors: ArtifactCorruptError, as `load`.
    """
    published = load(folder)
    model = _agent(published.foundation, published.tokenizer, request.task, request.labels)
    if (published.output, published.labels) == (model.output, model.labels):
        model.load_state_dict(published.state_dict())
        _adapt(model, request)
        return model
    return _prepared(model, request)


def _agent(foundation: CognateV1, tokenizer: Tokenizer, task: str, labels: Sequence[str]) -> CognateAgent:
    output = OUTPUTS.get(task)
    if output is Output.CLASSES:
        return CognateClassifier(foundation, tokenizer, labels)
    if output is Output.TAGS:
        return CognateTagger(foundation, tokenizer, labels)
    if output is Output.LANGUAGE:
        return CognateWriter(foundation, tokenizer, task=task)
    raise NotImplementedByServerError(f"the cognate architecture does not serve the task {task!r}")


def _prepared(model: CognateAgent, request: BuildRequest) -> CognateAgent:
    _adapt(model, request)
    model.begin_head(torch.Generator().manual_seed(request.seed))
    return model


def _adapt(model: CognateAgent, request: BuildRequest) -> None:
    linear_layers = [
        name
        for name, module in model.foundation.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(_BLOCKS)
    ]
    adapt(
        model.foundation,
        request.adaptation,
        linear_layers=linear_layers,
        blocks=_all_blocks(model.foundation),
        features=model.foundation.config.width,
        adaptive_prefixes=ACT_PREFIXES + LTM_PREFIXES,
        unused_prefixes=() if model.output is Output.LANGUAGE else _HEAD_PREFIXES,
        seed=request.seed,
    )


def load(folder: Path) -> CognateAgent:
    """Return an agent that `CognateAgent.save` wrote.

    Errors: ArtifactCorruptError, when configuration and weights do not belong together.
    """
    config = _read_json(folder / CONFIG_FILE)
    if config.get("format") != _FORMAT or config.get("architecture") != "cognate":
        raise ArtifactCorruptError(f"{folder.name} holds no cognate agent of format {_FORMAT}")
    try:
        foundation = CognateV1(config_from_json(config["foundation_config"]))
        width = config.get("bottleneck_width", 0)  # unknown to agents of before
        install_bottlenecks(_all_blocks(foundation), width, features=foundation.config.width)
        model = _agent(foundation, _read_tokenizer(folder), config["task"], config["labels"])
        model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    except (ArchitectureMismatchError, KeyError, RuntimeError) as error:
        raise ArtifactCorruptError(f"{folder.name}: {error}") from error
    return model.eval()


def _all_blocks(foundation: CognateV1) -> list[nn.Module]:
    """Return the blocks in the order of a forward pass, which runs the core's as often as the tokens want."""
    return [*foundation.prelude, *foundation.core, *foundation.coda]


def _control_token(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise IncompatibleError(f"the foundation's tokenizer lacks {token}, so that no text of it begins or ends")
    return int(number)


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
