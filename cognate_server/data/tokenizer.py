"""The byte-level BPE tokenizer of Cognate models: digits one by one, operators and marks as units.

The model's vocabulary is always 15,616; from small data less is learned, and the rest of the rows stays unused.
Text never becomes a control token, even when it spells one: control tokens are put in by number.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training_common.digests import canonical_json, sha256_bytes

VOCABULARY = 15_616
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CONTROL_TOKENS = (BOS, EOS, PAD)
# Split off before anything is merged, so that no merge crosses their edges. Longer ones come first.
_UNITS = r"<<|>>|####|//|[0-9]|[-+*/=()×÷−–]"
# Shown to the trainer often enough to be merged first, also where the data lack them.
_MARKS = "<< >> #### // × ÷ − –"
_MARK_REPEATS = 1_000
_STRAY_BYTE = re.compile("([\udc80-\udcff])")


class CognateTokenizer:
    """Text to numbers and back, byte for byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.get_vocab_size() > VOCABULARY:
            raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {VOCABULARY}")
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # "<|bos|>" in a text is text
        self.bos_id, self.eos_id, self.pad_id = (self._id(token) for token in CONTROL_TOKENS)
        self._byte_of = {character: byte for byte, character in _byte_characters()}
        self._id_of_byte = {byte: self._id(character) for byte, character in _byte_characters()}

    def _id(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer lacks the token {token}")
        return int(number)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocabulary: int = VOCABULARY) -> CognateTokenizer:
        """Learn merges from texts; the same texts give the same tokenizer."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_UNITS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            min_frequency=2,
            show_progress=False,
            special_tokens=list(CONTROL_TOKENS),
            initial_alphabet=[character for _, character in _byte_characters()],
        )
        tokenizer.train_from_iterator(_with_marks(texts), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> CognateTokenizer:
        """Read a tokenizer.json. Errors: ValueError when it is none, OSError."""
        text = path.read_text(encoding="utf-8")
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path.name} is no tokenizer: {error}") from error
        return cls(tokenizer)

    def save(self, path: Path) -> None:
        """Write tokenizer.json, whole or not at all: a later attempt of a killed worker's job reads it."""
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        with scratch.open("w", encoding="utf-8") as file:
            file.write(self.to_json())
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)

    def to_json(self) -> str:
        """Return the text of tokenizer.json."""
        return str(self._tokenizer.to_str(pretty=False))

    @property
    def digest(self) -> str:
        """sha256 over the canonical JSON of the tokenizer."""
        return sha256_bytes(canonical_json(json.loads(self.to_json())))

    @property
    def learned(self) -> int:
        """How many of the model's tokens the tokenizer knows."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Return the numbers of a text, without control tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the numbers of many texts, on all cores."""
        return [list(e.ids) for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the numbers of any bytes: what is not UTF-8 is spelled byte by byte."""
        ids: list[int] = []
        for part in _STRAY_BYTE.split(data.decode("utf-8", "surrogateescape")):
            if _STRAY_BYTE.fullmatch(part):
                ids.append(self._id_of_byte[ord(part) - 0xDC00])
            elif part:
                ids.extend(self.encode(part))
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that numbers stand for; control and unused tokens stand for none."""
        tokens = (self._tokenizer.id_to_token(number) for number in ids)
        text = "".join(token for token in tokens if token and token not in CONTROL_TOKENS)
        return bytes(self._byte_of[character] for character in text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that numbers stand for; a cut character becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def _with_marks(texts: Iterable[str]) -> Iterator[str]:
    for _ in range(_MARK_REPEATS):
        yield _MARKS
    yield from texts


def _byte_characters() -> list[tuple[int, str]]:
    """Return the printable character that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in printable]
    pairs = [(byte, chr(byte)) for byte in printable]
    return sorted(pairs + [(byte, chr(0x100 + index)) for index, byte in enumerate(hidden)])
