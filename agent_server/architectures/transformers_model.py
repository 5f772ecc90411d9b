"""Models of `transformers` as bases: weights of safetensors alone, a fast tokenizer, and no code of the folder's."""

# B rows, T tokens of the longest row, D model width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from agent_server.adaptation import Adaptation, adapt
from agent_server.architectures.encoders import TextEncoder
from agent_server.architectures.model import AgentBatch, Encoding
from agent_server.architectures.model_folder import TOKENIZER_FILE, open_folder
from agent_server.bottlenecks import bottleneck_width, install_bottlenecks, is_bottleneck
from agent_server.runtime.text_parts import blocks_of, frame_of, framed, pad_of, pooled, pooling_of, positions_of
from cognateforge.exceptions import ArtifactCorruptError, IncompatibleError
from training_common.attempt import Json

# An agent's folder in the form of transformers, beside what is this project's own.
BASE_FOLDER = "base"


class PretrainedText:
    """A tokenizer and the frame of special tokens that its model was trained with.

    prefix, suffix: tokens before and after every text. context: most tokens of a text; 0 for no bound.
    """

    def __init__(self, base: Any, files: Mapping[str, bytes], name: str) -> None:
        self.files = dict(files)
        self.tokenizer = read_tokenizer(files[TOKENIZER_FILE], name)
        if (size := self.tokenizer.get_vocab_size()) > base.get_input_embeddings().num_embeddings:
            raise IncompatibleError(
                f"{name}: {TOKENIZER_FILE} has {size} tokens and the model embeddings for "
                f"{base.get_input_embeddings().num_embeddings}; save the two together"
            )
        self.prefix, self.suffix = frame_of(self.tokenizer)
        self.pad = pad_of(base.config)
        self.positions = positions_of(base)

    def context(self, framing: int) -> int:
        """Return the tokens that are left for a text beside so many of the frame; 0 for no bound."""
        return max(1, self.positions - framing) if self.positions else 0

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of each text, without special ones."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [Encoding(tokens=encoding.ids, offsets=encoding.offsets) for encoding in encodings]

    def framed(self, batch: AgentBatch, *, suffix: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return tokens and mask with the frame around every text. A row without tokens is one pad token at least."""
        tokens_BT, valid_BT = batch.tokens_BT, batch.valid_BT
        length, framing = tokens_BT.shape[1], len(self.prefix) + len(suffix)
        if self.positions and length + framing > self.positions:
            raise IncompatibleError(
                f"a text has {length} tokens and the base reads {self.context(framing)}; lower max_tokens to that"
            )
        return framed(tokens_BT, valid_BT, prefix=self.prefix, suffix=suffix, pad=self.pad)


class PretrainedEncoder(TextEncoder):
    """An encoder or a decoder without its language head.

    pooling: what stands for a text. "first" and "last" are its tokens of these places, special ones among them; "auto"
    is "last" where a token sees only what is before it, and "mean" elsewhere.
    """

    def __init__(self, base: Any, text: PretrainedText, *, pooling: str) -> None:
        super().__init__()
        self.base = base
        self.text = text
        self.pooling = pooling
        self._pooled_by = pooling_of(base.config, pooling)
        self.width = int(base.config.get_text_config().hidden_size)
        self.context = text.context(len(text.prefix) + len(text.suffix))

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of each text."""
        return self.text.encode(texts)

    def forward(self, batch: AgentBatch) -> Tensor:
        """Return hidden_BTD of the texts' own tokens."""
        hidden_BTD, _ = self._hidden(batch)
        start = len(self.text.prefix)
        return hidden_BTD[:, start : start + batch.tokens_BT.shape[1]]

    def pooled(self, batch: AgentBatch) -> Tensor:
        """Return pooled_BD of the texts in their frames."""
        hidden_BTD, valid_BT = self._hidden(batch)
        return pooled(hidden_BTD, valid_BT, by=self._pooled_by)

    def _hidden(self, batch: AgentBatch) -> tuple[Tensor, Tensor]:
        tokens_BT, valid_BT = self.text.framed(batch, suffix=self.text.suffix)
        hidden_BTD: Tensor = self.base(input_ids=tokens_BT, attention_mask=valid_BT.long())[0]
        return hidden_BTD, valid_BT

    def base_model(self) -> nn.Module:
        """Return the model of transformers."""
        module: nn.Module = self.base
        return module

    def blocks(self) -> Sequence[nn.Module]:
        """Return its layers."""
        return blocks_of(self.base)

    def adapt(self, adaptation: Adaptation, seed: int) -> None:
        """Adapt the layers' linear maps, or the layers."""
        adapt_pretrained(self.base, adaptation, seed)

    def config(self) -> dict[str, Json]:
        """Return how a text is pooled, and what was put behind the layers."""
        return {"kind": "transformers", "pooling": self.pooling, "bottleneck_width": bottleneck_width(self.blocks())}

    def save(self, folder: Path) -> set[str]:
        """Write the folder `base`."""
        return {f"base.{name}" for name in write_base(self.base, self.text.files, folder)}


def read_encoder(folder: Path, name: str, *, pooling: str) -> PretrainedEncoder:
    """Return a model folder's encoder. Errors: DataUnavailableError, IncompatibleError."""
    base, files = read_base(folder, name, language=False)
    return PretrainedEncoder(base, PretrainedText(base, files, name), pooling=pooling)


def reread_encoder(folder: Path, config: Mapping[str, Any]) -> tuple[PretrainedEncoder, set[str]]:
    """Return the encoder that `PretrainedEncoder.save` wrote, and the names of what was read.

    Errors: ArtifactCorruptError.
    """
    base, text = reread_base(folder, language=False)
    encoder = PretrainedEncoder(base, text, pooling=config["pooling"])
    read = {f"base.{name}" for name in base.state_dict()}
    install_bottlenecks(encoder.blocks(), config["bottleneck_width"], features=encoder.width)
    return encoder, read


def read_base(folder: Path, name: str, *, language: bool) -> tuple[Any, dict[str, bytes]]:
    """Return a folder's model, in float32, and its tokenizer's files. language: with its language head.

    Errors: DataUnavailableError, IncompatibleError.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    found = open_folder(folder, name)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call] # of what is missing this module tells itself
    kind: Any = AutoModelForCausalLM if language else AutoModel
    try:
        # What a folder lacks begins with random values, which must be none of the seed's.
        with torch.random.fork_rng(devices=[]):
            base, info = kind.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise IncompatibleError(f"{name} cannot be loaded as {kind.__name__}: {_first_line(error)}") from error
    if base.config.is_encoder_decoder or base.main_input_name != "input_ids":
        raise IncompatibleError(
            f"{name} is a {found.model_type}, which does not read one text alone; use an encoder or a decoder of texts"
        )
    # An encoder's own pooler is not read, and many folders have none.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        wrong = ", ".join([*missing, *(str(key[0]) for key in info["mismatched_keys"])][:3])
        below = f"{base.base_model_prefix}."
        if language and not info["mismatched_keys"] and not any(key.startswith(below) for key in missing):
            raise IncompatibleError(
                f"{name} was saved without a language head (it lacks {wrong}), and the task needs one; use a folder "
                "that was saved from a causal language model"
            )
        raise IncompatibleError(
            f"{name} has no weights of the right shape for {wrong}; use a folder that was saved whole"
        )
    if isinstance(getattr(base, "pooler", None), nn.Module):
        base.pooler = None
    return base, found.companions()


def reread_base(folder: Path, *, language: bool) -> tuple[Any, PretrainedText]:
    """Return what `write_base` wrote. Errors: ArtifactCorruptError."""
    name = f"{folder.name}/{BASE_FOLDER}"
    try:
        base, files = read_base(folder / BASE_FOLDER, name, language=language)
        return base, PretrainedText(base, files, name)
    except Exception as error:
        raise ArtifactCorruptError(f"{folder.name}: {error}") from error


def write_base(base: Any, files: Mapping[str, bytes], folder: Path) -> set[str]:
    """Write the folder `base`, which transformers can load; return the names of the weights in it.

    Bottlenecks are no part of it: transformers would not know them.
    """
    state = {name: tensor for name, tensor in base.state_dict().items() if not is_bottleneck(name)}
    base.save_pretrained(str(folder / BASE_FOLDER), state_dict=dict(state))
    for name, data in files.items():
        (folder / BASE_FOLDER / name).write_bytes(data)
    return set(state)


def adapt_pretrained(base: Any, adaptation: Adaptation, seed: int) -> None:
    """Adapt a model's layers: their linear maps, or the whole of them."""
    from transformers.pytorch_utils import Conv1D

    blocks = blocks_of(base)
    inside = {id(module) for block in blocks for module in block.modules()}
    linear_layers = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside and not is_bottleneck(name)
    ]
    adapt(
        base,
        adaptation,
        linear_layers=linear_layers,
        blocks=blocks,
        features=int(base.config.get_text_config().hidden_size),
        seed=seed,
    )


def read_tokenizer(data: bytes, name: str) -> Tokenizer:
    """Return a tokenizer that neither cuts nor pads, and to which special tokens in a text are text.

    Errors: IncompatibleError.
    """
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises no other
        raise IncompatibleError(f"{name}: {TOKENIZER_FILE} cannot be read: {_first_line(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
