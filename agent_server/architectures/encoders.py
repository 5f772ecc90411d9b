"""Encoders of texts, and the agents that choose or mark labels with one: `EncoderAgent`."""

# B rows, T tokens of the longest row, D encoder width, F features that come beside the text, P their projection,
# L labels, C classes or tags.

from __future__ import annotations

import abc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent_server.adaptation import Adaptation
from agent_server.architectures.model import AgentBatch, AgentModel, Encoding
from agent_server.runtime.text_parts import Standardized, mean_of
from agent_server.tasks import OUTPUTS, Output
from cognateforge.exceptions import ArtifactCorruptError, IncompatibleError
from training_common.attempt import Json

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_FORMAT = 1
_HEAD_STD = 0.02


class Sizes(TypedDict):
    """What shapes an `EncoderAgent` beside its encoder and labels; stored with it."""

    dropout: float
    features: int
    projection: int


class TextEncoder(nn.Module, abc.ABC):
    """Hidden states of texts. width: D. context: most tokens that it can read; 0 for no bound."""

    width: int
    context: int = 0

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of each text, whole, without special ones."""

    @abc.abstractmethod
    def forward(self, batch: AgentBatch) -> Tensor:
        """Return hidden_BTD. What it holds at padding is not read."""

    def pooled(self, batch: AgentBatch) -> Tensor:
        """Return pooled_BD: the mean over a row's tokens; zeros of a row without any."""
        return mean_of(self(batch), batch.valid_BT)

    @abc.abstractmethod
    def base_model(self) -> nn.Module:
        """Return the part that adaptation applies to."""

    @abc.abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Return its blocks in order, each of which every forward pass runs once."""

    @abc.abstractmethod
    def adapt(self, adaptation: Adaptation, seed: int) -> None:
        """Mark what is trained, and put in what the method adds. Errors: IncompatibleError."""

    @abc.abstractmethod
    def config(self) -> dict[str, Json]:
        """Return what `save`d files do not tell of it."""

    @abc.abstractmethod
    def save(self, folder: Path) -> set[str]:
        """Write its own files; return the names of its parameters and buffers that they hold."""


class EncoderAgent(AgentModel):
    """A text encoder with a linear head: over a row for CLASSES, over each token for TAGS.

    features: how many numbers come beside each text, only for CLASSES; they are standardized, projected to `projection`
    values and read by the head beside the text. dropout: of what the head reads.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        architecture: str,
        task: str,
        labels: Sequence[str],
        dropout: float = 0.0,
        features: int = 0,
        projection: int = 0,
    ) -> None:
        super().__init__()
        self.architecture, self.task, self.labels = architecture, task, tuple(labels)
        self.output = OUTPUTS[task]
        self.context = encoder.context
        self.encoder = encoder
        self.features = features
        self.sizes: Sizes = {"dropout": dropout, "features": features, "projection": projection}
        self.dropout = nn.Dropout(dropout)
        if self.output is Output.TAGS:
            self.head = unset_linear(encoder.width, 1 + 2 * len(labels))
            return
        self.text_scale = Standardized(encoder.width)
        if features:
            self.feature_scale = Standardized(features)
            self.projection = unset_linear(features, projection)
        self.head = unset_linear(encoder.width + (projection if features else 0), len(labels))

    def start(self, seed: int) -> None:
        """Give head and projection the values that training begins with."""
        generator = torch.Generator().manual_seed(seed)
        if self.features:
            nn.init.normal_(self.projection.weight, std=self.features**-0.5, generator=generator)
            nn.init.zeros_(self.projection.bias)
        nn.init.normal_(self.head.weight, std=_HEAD_STD, generator=generator)
        nn.init.zeros_(self.head.bias)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of each text."""
        return self.encoder.encode(texts)

    @torch.no_grad()
    def calibrate(self, batch: AgentBatch) -> None:
        """Measure the features that a head over rows reads."""
        if self.output is Output.CLASSES:
            self.text_scale.measure(self.encoder.pooled(batch))
            if self.features:
                self.feature_scale.measure(self._features(batch))

    def forward(self, batch: AgentBatch) -> Tensor:
        """Return logits_BL, or logits_BTC of tags."""
        if self.output is Output.TAGS:
            tags_BTC: Tensor = self.head(self.dropout(self.encoder(batch)))
            return tags_BTC
        read = [self.text_scale(self.encoder.pooled(batch))]
        if self.features:
            read.append(F.gelu(self.projection(self.feature_scale(self._features(batch)))))
        logits_BL: Tensor = self.head(self.dropout(torch.cat(read, -1)))
        return logits_BL

    def _features(self, batch: AgentBatch) -> Tensor:
        features_BF = batch.features_BF
        if features_BF is None or features_BF.shape[-1] != self.features:
            found = 0 if features_BF is None else features_BF.shape[-1]
            raise IncompatibleError(
                f"rows have {found} features and the agent reads {self.features}: give every row `features`, a list of "
                "numbers, and the setting `features` their count"
            )
        return features_BF

    def head_parameters(self) -> list[nn.Parameter]:
        """Return those of the head and of the features' projection."""
        projection = list(self.projection.parameters()) if self.features else []
        return [*projection, *self.head.parameters()]

    def base_model(self) -> nn.Module:
        """Return what adaptation applies to."""
        return self.encoder.base_model()

    def blocks(self) -> Sequence[nn.Module]:
        """Return the encoder's blocks."""
        return self.encoder.blocks()

    def save(self, folder: Path, *, extra: Mapping[str, Json]) -> None:
        """Write the encoder's files, the other weights, and the configuration."""
        written = {f"encoder.{name}" for name in self.encoder.save(folder)}
        write_agent(self, folder, written=written, config=self._config() | dict(extra))

    def _config(self) -> dict[str, Json]:
        return {
            "architecture": self.architecture,
            "task": self.task,
            "labels": list(self.labels),
            "sizes": {
                "dropout": self.sizes["dropout"],
                "features": self.sizes["features"],
                "projection": self.sizes["projection"],
            },
            "encoder": self.encoder.config(),
        }


def unset_linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear map whose values are still to be set: torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        return nn.Linear(inputs, outputs)


def write_agent(model: AgentModel, folder: Path, *, written: set[str], config: Mapping[str, Json]) -> None:
    """Write config.json, and model.safetensors with what is not `written` yet."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name not in written}
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)
    text = json.dumps({"format": _FORMAT, **config}, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_config(folder: Path, architecture: str) -> dict[str, Any]:
    """Return an agent's config.json. Errors: ArtifactCorruptError, for another architecture's or another format's."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactCorruptError(f"{folder.name} holds no {architecture} agent: {error}") from error
    if not isinstance(config, dict) or (config.get("format"), config.get("architecture")) != (_FORMAT, architecture):
        raise ArtifactCorruptError(f"{folder.name} holds no {architecture} agent of format {_FORMAT}")
    return config


def read_weights(model: AgentModel, folder: Path, *, read: set[str]) -> None:
    """Load model.safetensors into all that is not `read` yet. Errors: ArtifactCorruptError."""
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise ArtifactCorruptError(f"{folder.name}: {error}") from error
    if unexpected or set(missing) - read:
        wrong = ", ".join(sorted({*unexpected, *(set(missing) - read)})[:3])
        raise ArtifactCorruptError(f"{folder.name}: {WEIGHTS_FILE} and {CONFIG_FILE} do not belong together: {wrong}")


def load_encoder_agent(folder: Path, architecture: str, encoder: TextEncoder, read: set[str]) -> EncoderAgent:
    """Return an agent that `EncoderAgent.save` wrote, on an encoder that was read. Errors: ArtifactCorruptError."""
    config = read_config(folder, architecture)
    try:
        model = EncoderAgent(
            encoder, architecture=architecture, task=config["task"], labels=config["labels"], **config["sizes"]
        )
    except (KeyError, TypeError) as error:
        raise ArtifactCorruptError(f"{folder.name}: {CONFIG_FILE} lacks {error}") from error
    read_weights(model, folder, read={f"encoder.{name}" for name in read})
    return model.eval()
