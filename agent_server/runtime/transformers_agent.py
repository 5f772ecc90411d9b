"""Models of `transformers`: a language model as it is, or an encoder under a head for labels or tags."""

# B rows, T tokens of the longest row, D model width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

if TYPE_CHECKING:
    from agent_server import bottlenecks
    from agent_server.runtime import text_parts
    from agent_server.runtime.encoder_head import EncoderAgent, load_weights
else:  # a package holds them beside this file
    import bottlenecks
    import text_parts
    from encoder_head import EncoderAgent, load_weights


class Text:
    """The tokenizer, and the special tokens that its model was trained to see around a text."""

    def __init__(self, folder: Path, base: Any) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.prefix, self.suffix = text_parts.frame_of(self.tokenizer)
        self.pad = text_parts.pad_of(base.config)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a text's tokens, without special ones, and where in it each begins and ends."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def framed(self, tokens_BT: Tensor, valid_BT: Tensor, *, suffix: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return tokens and mask with the special tokens around every text."""
        return text_parts.framed(tokens_BT, valid_BT, prefix=self.prefix, suffix=suffix, pad=self.pad)


class PretrainedEncoder(nn.Module):
    """An encoder or a decoder without its language head."""

    def __init__(self, base: Any, text: Text, *, pooling: str) -> None:
        super().__init__()
        self.base = base
        self.text = text
        self.pooling = text_parts.pooling_of(base.config, pooling)
        self.width = int(base.config.get_text_config().hidden_size)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a text's tokens, and where in it each begins and ends."""
        return self.text.encode(text)

    def forward(self, tokens_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """Return hidden_BTD of the texts' own tokens."""
        hidden_BTD, _ = self._hidden(tokens_BT, valid_BT)
        start = len(self.text.prefix)
        return hidden_BTD[:, start : start + tokens_BT.shape[1]]

    def pooled(self, tokens_BT: Tensor, valid_BT: Tensor) -> Tensor:
        """Return pooled_BD of the texts with their special tokens."""
        hidden_BTD, framed_BT = self._hidden(tokens_BT, valid_BT)
        return text_parts.pooled(hidden_BTD, framed_BT, by=self.pooling)

    def _hidden(self, tokens_BT: Tensor, valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        framed_BT, mask_BT = self.text.framed(tokens_BT, valid_BT, suffix=self.text.suffix)
        hidden_BTD: Tensor = self.base(input_ids=framed_BT, attention_mask=mask_BT.long())[0]
        return hidden_BTD, mask_BT


class PretrainedWriter(nn.Module):
    """A causal language model."""

    output, labels = "language", ()

    def __init__(self, base: Any, text: Text) -> None:
        super().__init__()
        self.base = base
        self.text = text
        self.begin_token = self.end_token = text_parts.end_of(base)
        if self.end_token < 0:
            raise ValueError("the folder base names no token that ends texts")

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a text's tokens, and where in it each begins and ends."""
        return self.text.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self.text.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def forward(self, tokens_BT: Tensor, valid_BT: Tensor, features_BF: Tensor | None = None) -> Tensor:
        """Return logits_BTV of each next token."""
        framed_BT, mask_BT = self.text.framed(tokens_BT, valid_BT, suffix=())
        logits_BTV: Tensor = self.base(input_ids=framed_BT, attention_mask=mask_BT.long(), use_cache=False).logits
        return logits_BTV[:, len(self.text.prefix) :]

    comparable = forward


def _base(folder: Path, width: int, *, language: bool) -> tuple[Any, set[str]]:
    """Return the model in the folder `base` and the names of its weights; width: of its bottlenecks."""
    kind = AutoModelForCausalLM if language else AutoModel
    told = logging.get_verbosity()
    # An encoder's own pooler is missing, and not read.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        base = kind.from_pretrained(
            str(folder / "base"),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
        )
    finally:
        logging.set_verbosity(told)
    if isinstance(getattr(base, "pooler", None), nn.Module):
        base.pooler = None
    read = set(base.state_dict())
    blocks = text_parts.blocks_of(base)
    bottlenecks.install_bottlenecks(blocks, width, features=int(base.config.get_text_config().hidden_size))
    return base, read


def read_encoder(folder: Path, config: Mapping[str, Any]) -> tuple[PretrainedEncoder, set[str]]:
    """Return the encoder of a package's folder, and the names of the weights that it has."""
    base, read = _base(folder, config["bottleneck_width"], language=False)
    encoder = PretrainedEncoder(base, Text(folder, base), pooling=config["pooling"])
    return encoder, {f"encoder.base.{name}" for name in read}


def load(folder: Path, config: Mapping[str, Any], output: str) -> EncoderAgent | PretrainedWriter:
    """Return the agent of a package's folder."""
    if output == "language":
        base, names = _base(folder, config["bottleneck_width"], language=True)
        writer = PretrainedWriter(base, Text(folder, base))
        load_weights(writer, folder, read={f"base.{name}" for name in names})
        return writer.eval()
    encoder, read = read_encoder(folder, config["encoder"])
    model = EncoderAgent(encoder, output, config["labels"], config["sizes"])
    load_weights(model, folder, read=read)
    return model.eval()
