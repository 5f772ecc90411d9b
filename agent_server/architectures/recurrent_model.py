"""Recurrent networks from scratch: a tokenizer of the rows' own, GRU or LSTM layers, and a head."""

# B rows, T tokens of the longest row, D width of a layer's output, H width of a direction, V vocabulary.

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from agent_server.adaptation import Adaptation, adapt
from agent_server.architectures.encoders import (
    EncoderAgent,
    TextEncoder,
    load_encoder_agent,
    read_config,
    read_weights,
    unset_linear,
    write_agent,
)
from agent_server.architectures.factory import BuildRequest
from agent_server.architectures.model import AgentBatch, AgentModel, Encoding, collate
from agent_server.bottlenecks import bottleneck_width, install_bottlenecks
from agent_server.runtime.text_parts import RecurrentLayer, State
from agent_server.tasks import OUTPUTS, Output
from cognateforge.exceptions import ArtifactCorruptError, IncompatibleError
from training_common.attempt import Json

NAME = "recurrent"
TOKENIZER_FILE = "tokenizer.json"
_END = "<|end|>"
# The settings that shape an encoder; they are stored with it.
SIZES = ("cell", "width", "layers", "dropout", "bidirectional")


def learn_tokenizer(texts: Iterable[str], vocabulary_size: int) -> str:
    """Return a byte-level BPE of the texts, as JSON: every text can be written with it. One token ends texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


class RecurrentEncoder(TextEncoder):
    """Embedding, then layers. It reads texts of any length."""

    def __init__(
        self, tokenizer: str, *, cell: str, width: int, layers: int, dropout: float, bidirectional: bool
    ) -> None:
        super().__init__()
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.encode_special_tokens = True  # "<|end|>" in a text is text
        self.end: int = self.tokenizer.token_to_id(_END) or 0  # the first that is learned
        self.sizes: dict[str, Json] = {
            "cell": cell, "width": width, "layers": layers, "dropout": dropout, "bidirectional": bidirectional
        }  # fmt: skip
        self.width = width * (2 if bidirectional else 1)
        self.embedding = nn.Embedding(self.tokenizer.get_vocab_size(), width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            RecurrentLayer(cell, self.width if i else width, width, bidirectional=bidirectional) for i in range(layers)
        )

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of each text."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [Encoding(tokens=encoding.ids, offsets=encoding.offsets) for encoding in encodings]

    def forward(self, batch: AgentBatch, states: Sequence[State | None] = ()) -> Tensor:
        """Return hidden_BTD. states: of each layer, to go on from, where every row has a token."""
        hidden_BTD = self.embedding(batch.tokens_BT)
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            hidden_BTD = layer(self.dropout(hidden_BTD), batch.valid_BT, state)
        result: Tensor = hidden_BTD
        return result

    def base_model(self) -> nn.Module:
        """Return the encoder: all of it can be adapted."""
        return self

    def blocks(self) -> Sequence[nn.Module]:
        """Return its layers."""
        return list(self.layers)

    def adapt(self, adaptation: Adaptation, seed: int) -> None:
        """Adapt the layers. They have no linear maps for low-rank updates."""
        adapt(self, adaptation, linear_layers=(), blocks=self.blocks(), features=self.width, seed=seed)

    def config(self) -> dict[str, Json]:
        """Return the settings that shaped it, and what was put behind the layers."""
        return {"kind": NAME, **self.sizes, "bottleneck_width": bottleneck_width(self.blocks())}

    def save(self, folder: Path) -> set[str]:
        """Write the tokenizer; the weights are written with the agent's."""
        self.tokenizer.save(str(folder / TOKENIZER_FILE))
        return set()


def new_encoder(request: BuildRequest) -> RecurrentEncoder:
    """Return an encoder with random values. Errors: IncompatibleError, without a tokenizer."""
    if not request.tokenizer:
        raise IncompatibleError(f"the {NAME} architecture needs texts to learn its tokenizer from, and there are none")
    sizes: Mapping[str, Any] = {name: request.settings[name] for name in SIZES}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        return RecurrentEncoder(request.tokenizer, **sizes)


def reread_encoder(folder: Path, config: Mapping[str, Any]) -> RecurrentEncoder:
    """Return the encoder of an agent's folder, its weights still to be read. Errors: ArtifactCorruptError."""
    try:
        tokenizer = (folder / TOKENIZER_FILE).read_text(encoding="utf-8")
        with torch.random.fork_rng(devices=[]):
            encoder = RecurrentEncoder(tokenizer, **{name: config[name] for name in SIZES})
    except Exception as error:  # the tokenizers library raises no other
        raise ArtifactCorruptError(f"{folder.name} holds no recurrent encoder: {error}") from error
    install_bottlenecks(encoder.blocks(), config["bottleneck_width"], features=encoder.width)
    return encoder


class RecurrentLanguageModel(AgentModel):
    """A recurrent language model: it reads from left to right, and writes on from its state."""

    output = Output.LANGUAGE

    def __init__(self, encoder: RecurrentEncoder, *, task: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.task = task
        self.dropout = nn.Dropout(float(str(encoder.sizes["dropout"])))
        self.head = unset_linear(encoder.width, encoder.embedding.num_embeddings)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of each text."""
        return self.encoder.encode(texts)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self.encoder.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @property
    def end_token(self) -> int:
        """The token that ends a text."""
        return self.encoder.end

    def forward(self, batch: AgentBatch) -> Tensor:
        """Return logits_BTV of each next token."""
        logits_BTV: Tensor = self.head(self.dropout(self.encoder(batch)))
        return logits_BTV

    def logits_at(self, batch: AgentBatch, places_BT: Tensor) -> Tensor:
        """Return logits at the chosen places; the head reads no others."""
        logits_NV: Tensor = self.head(self.dropout(self.encoder(batch)[places_BT]))
        return logits_NV

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, stop: Sequence[int] = ()
    ) -> list[list[int]]:
        """Return the likeliest continuation of each prompt; one without tokens begins with the end of a text."""
        ends = {self.end_token, *stop}
        written: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        states = [State() for _ in self.encoder.layers]
        device = self.head.weight.device
        batch = collate([list(prompt) or [self.end_token] for prompt in prompts])
        for _ in range(max_tokens):
            if not going:
                break
            batch = AgentBatch(tokens_BT=batch.tokens_BT.to(device), valid_BT=batch.valid_BT.to(device))
            hidden_BTD = self.encoder(batch, states)
            last_B = batch.valid_BT.sum(1) - 1
            logits_BV = self.head(hidden_BTD[torch.arange(len(prompts), device=device), last_B])
            chosen = logits_BV.argmax(-1).tolist()
            going -= {i for i in going if chosen[i] in ends}
            for i in going:
                written[i].append(chosen[i])
            batch = collate([[token] for token in chosen])
        return written

    def head_parameters(self) -> list[nn.Parameter]:
        """Return those of the language head."""
        return list(self.head.parameters())

    def base_model(self) -> nn.Module:
        """Return the encoder."""
        return self.encoder

    def blocks(self) -> Sequence[nn.Module]:
        """Return its layers."""
        return self.encoder.blocks()

    def save(self, folder: Path, *, extra: Mapping[str, Json]) -> None:
        """Write weights, tokenizer and configuration."""
        self.encoder.save(folder)
        config: dict[str, Json] = {
            "architecture": NAME, "task": self.task, "labels": [], "encoder": self.encoder.config()
        }  # fmt: skip
        write_agent(self, folder, written=set(), config=config | dict(extra))


def build(request: BuildRequest) -> AgentModel:
    """Return a network with random values. Errors: IncompatibleError."""
    return _finished(new_encoder(request), request)


def build_on(folder: Path, request: BuildRequest) -> AgentModel:
    """Return a published agent, to be trained further; its head is kept where task and labels are the same ones.

    Errors: ArtifactCorruptError, IncompatibleError.
    """
    model = load(folder)
    if OUTPUTS[request.task] is not model.output or model.labels != tuple(request.labels):
        return _finished(_encoder_of(model), request)
    model.task = request.task
    model.encoder.adapt(request.adaptation, request.seed)
    return model


def _encoder_of(model: EncoderAgent | RecurrentLanguageModel) -> RecurrentEncoder:
    encoder = model.encoder
    if not isinstance(encoder, RecurrentEncoder):
        raise ArtifactCorruptError("the agent has no recurrent encoder")
    return encoder


def _finished(encoder: RecurrentEncoder, request: BuildRequest) -> AgentModel:
    encoder.adapt(request.adaptation, request.seed)
    dropout = float(str(encoder.sizes["dropout"]))
    if OUTPUTS[request.task] is not Output.LANGUAGE:
        agent = EncoderAgent(encoder, architecture=NAME, task=request.task, labels=request.labels, dropout=dropout)
        agent.start(request.seed)
        return agent
    if encoder.sizes["bidirectional"]:
        raise IncompatibleError(
            f"the task {request.task} predicts what comes next, which a bidirectional network has read; leave the "
            "setting bidirectional out"
        )
    model = RecurrentLanguageModel(encoder, task=request.task)
    generator = torch.Generator().manual_seed(request.seed)
    nn.init.normal_(model.head.weight, std=encoder.width**-0.5, generator=generator)
    nn.init.zeros_(model.head.bias)
    return model


def load(folder: Path) -> EncoderAgent | RecurrentLanguageModel:
    """Return an agent that was saved. Errors: ArtifactCorruptError."""
    config = read_config(folder, NAME)
    encoder = reread_encoder(folder, config.get("encoder", {}))
    if OUTPUTS.get(config.get("task", "")) is not Output.LANGUAGE:
        return load_encoder_agent(folder, NAME, encoder, set())
    model = RecurrentLanguageModel(encoder, task=config["task"])
    read_weights(model, folder, read=set())
    return model.eval()
