"""The tokenizer loses no byte and keeps digits and marks apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cognate_server.data.generate import generate_rows
from cognate_server.data.tokenizer import CONTROL_TOKENS, VOCABULARY, CognateTokenizer


def _texts() -> list[str]:
    return [f"{row['question']}\n{row['answer']}" for row in generate_rows("forge-arithmetic", rows=300, seed=0)]


@pytest.fixture(scope="module")
def tokenizer() -> CognateTokenizer:
    return CognateTokenizer.train(_texts())


@given(text=st.text())
def test_every_text_comes_back(tokenizer: CognateTokenizer, text: str) -> None:
    """Decoding undoes encoding, for every text that UTF-8 can hold."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(data=st.binary())
def test_every_byte_comes_back(tokenizer: CognateTokenizer, data: bytes) -> None:
    """What is not UTF-8 is spelled byte by byte."""
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_half_a_surrogate_pair_is_no_text(tokenizer: CognateTokenizer) -> None:
    """It has no UTF-8, so a row that holds one is refused, and the tokenizer takes none either."""
    for text in ("\ud800", "a\udfffb"):
        with pytest.raises((UnicodeEncodeError, TypeError)):
            tokenizer.encode(text)


def test_each_byte_has_a_token(tokenizer: CognateTokenizer) -> None:
    """All 256 of them, so that nothing is unknown."""
    assert [tokenizer.decode_bytes(tokenizer.encode_bytes(bytes([n]))) for n in range(256)] == [
        bytes([n]) for n in range(256)
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<<48/2=24>>24", ["<<", "4", "8", "/", "2", "=", "2", "4", ">>", "2", "4"]),
        ("#### -1,250", ["####", " ", "-", "1", ",", "2", "5", "0"]),
        ("<<7//2=3>>", ["<<", "7", "//", "2", "=", "3", ">>"]),
        ("12×3÷4−5–6", ["1", "2", "×", "3", "÷", "4", "−", "5", "–", "6"]),
        ("<<(.5+-8)*2=-15>>", ["<<", "(", ".", "5", "+", "-", "8", ")", "*", "2", "=", "-", "1", "5", ">>"]),
    ],
)
def test_digits_operators_and_marks_are_units(tokenizer: CognateTokenizer, text: str, parts: list[str]) -> None:
    """Numbers are read digit by digit."""
    assert [tokenizer.decode([number]) for number in tokenizer.encode(text)] == parts


def test_marks_are_units_even_where_the_data_lack_them() -> None:
    """Text without arithmetic still gives a tokenizer for it."""
    tokenizer = CognateTokenizer.train(["plain words only"])
    assert {len(tokenizer.encode(mark)) for mark in ("<<", ">>", "####", "//", "×", "÷", "−", "–")} == {1}


def test_a_text_cannot_spell_a_control_token(tokenizer: CognateTokenizer) -> None:
    """Control tokens are put in by number only."""
    numbers = tokenizer.encode(" ".join(CONTROL_TOKENS))
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(numbers)
    assert tokenizer.decode([tokenizer.bos_id, *numbers, tokenizer.eos_id]) == " ".join(CONTROL_TOKENS)


def test_training_again_gives_the_same_digest(tokenizer: CognateTokenizer) -> None:
    """A resumed job on another machine has the same tokenizer."""
    assert CognateTokenizer.train(_texts()).digest == tokenizer.digest


def test_a_saved_tokenizer_is_the_same(tokenizer: CognateTokenizer, tmp_path: Path) -> None:
    """The file holds all of it."""
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = CognateTokenizer.load(tmp_path / "tokenizer.json")
    text = _texts()[0] + " <|bos|>"
    assert (loaded.digest, loaded.encode(text)) == (tokenizer.digest, tokenizer.encode(text))
    assert loaded.encode_batch([text]) == [loaded.encode(text)]


def test_the_vocabulary_is_bounded(tokenizer: CognateTokenizer) -> None:
    """Never more tokens than the model has rows."""
    assert 256 < tokenizer.learned <= VOCABULARY
    assert CognateTokenizer.train(_texts(), vocabulary=300).learned == 300


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    """A torn file is an error, not an empty vocabulary."""
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer"):
        CognateTokenizer.load(tmp_path / "tokenizer.json")
