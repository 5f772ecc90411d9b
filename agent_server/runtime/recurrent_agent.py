"""Recurrent networks: GRU or LSTM layers under a head for labels, for tags, or for the next token."""

# B rows, T tokens of the longest row, D width of a layer's output.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from torch import Tensor, nn

if TYPE_CHECKING:
    from agent_server import bottlenecks
    from agent_server.runtime.encoder_head import EncoderAgent, load_weights
    from agent_server.runtime.text_parts import RecurrentLayer, mean_of
else:  # a package holds them beside this file
    import bottlenecks
    from encoder_head import EncoderAgent, load_weights
    from text_parts import RecurrentLayer, mean_of


class RecurrentEncoder(nn.Module):
    """Embedding, then layers."""

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, both = int(config["width"]), bool(config["bidirectional"])
        self.tokenizer = tokenizer
        self.width = width * (2 if both else 1)
        self.embedding = nn.Embedding(tokenizer.get_vocab_size(), width)
        self.layers = nn.ModuleList(
            RecurrentLayer(config["cell"], self.width if i else width, width, bidirectional=both)
            for i in range(config["layers"])
        )
        bottlenecks.install_bottlenecks(list(self.layers), config["bottleneck_width"], features=self.width)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a text's tokens, and where in it each begins and ends."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def forward(self, tokens_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """Return hidden_BTD."""
        hidden_BTD: Tensor = self.embedding(tokens_BT)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, valid_BT)
        return hidden_BTD

    def pooled(self, tokens_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """Return pooled_BD: the mean over a row's tokens."""
        return mean_of(self(tokens_BT, valid_BT), valid_BT)


class RecurrentWriter(nn.Module):
    """A recurrent language model."""

    output, labels = "language", ()

    def __init__(self, encoder: RecurrentEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, encoder.embedding.num_embeddings)
        end = encoder.tokenizer.token_to_id("<|end|>")
        if end is None:
            raise ValueError("the tokenizer has no token <|end|>")
        self.begin_token = self.end_token = int(end)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a text's tokens, and where in it each begins and ends."""
        return self.encoder.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self.encoder.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def forward(self, tokens_BT: Tensor, valid_BT: Tensor, features_BF: Tensor | None = None) -> Tensor:
        """Return logits_BTV of each next token."""
        logits_BTV: Tensor = self.head(self.encoder(tokens_BT, valid_BT))
        return logits_BTV

    comparable = forward


def read_encoder(folder: Path, config: Mapping[str, Any]) -> RecurrentEncoder:
    """Return the encoder of a package's folder, without its weights."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # "<|end|>" in a text is text
    return RecurrentEncoder(tokenizer, config)


def load(folder: Path, config: Mapping[str, Any], output: str) -> EncoderAgent | RecurrentWriter:
    """Return the agent of a package's folder."""
    encoder = read_encoder(folder, config["encoder"])
    model = (
        RecurrentWriter(encoder)
        if output == "language"
        else EncoderAgent(encoder, output, config["labels"], config["sizes"])
    )
    load_weights(model, folder, read=set())
    return model.eval()
