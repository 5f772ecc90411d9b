"""The stream: packed without padding, disjoint splits, and a position that is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cognate_server.data.build import DataPlan, build_stream
from cognate_server.data.corpus import Corpus
from cognate_server.data.packing import Packer
from cognate_server.data.processor import CognateDatasetProcessor
from cognate_server.data.sources import DatasetId, DatasetShare, SourceSettings, resolve
from cognate_server.data.stream import CognateTokenStream, StreamMismatchError
from cognate_server.data.tokenizer import VOCABULARY, CognateTokenizer
from cognate_server.stream import Batch, TokenStream
from training_common.findings import ProcessingReport

SETTINGS = SourceSettings(generated_rows=200)
PLAN = DataPlan(seed=7, batch_size=3, sequence_length=64)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained once: the streams of this file share it."""
    return tmp_path_factory.mktemp("stream") / "tokenizer.json"


@pytest.fixture
def stream(tokenizer_file: Path) -> CognateTokenStream:
    return build_stream(PLAN, SETTINGS, tokenizer_file=tokenizer_file)[0]


def _same(one: Batch, two: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("tokens", "segment_ids", "fresh_rows"))


def test_batches_have_the_protocols_shape(stream: CognateTokenStream) -> None:
    """B rows of T + 1 tokens, none of them padding."""
    protocol: TokenStream = stream
    batch = protocol.next_batch()
    assert batch.tokens.shape == (3, 65)
    assert batch.tokens.dtype == torch.int64
    assert batch.segment_ids is not None
    assert int(batch.segment_ids.min()) == 0
    assert not (batch.tokens == stream.tokenizer.pad_id).any()
    assert int(batch.tokens.max()) < VOCABULARY


def test_a_resumed_stream_gives_the_same_batches(tokenizer_file: Path) -> None:
    """The position survives JSON and a new process's worth of objects, through several rounds of the data."""
    first, _ = build_stream(PLAN, SETTINGS, tokenizer_file=tokenizer_file)
    for stop in (0, 1, 57, 400):
        for _ in range(stop):
            first.next_batch()
        position = json.loads(json.dumps(first.state_dict()))
        second, _ = build_stream(PLAN, SETTINGS, tokenizer_file=tokenizer_file)
        second.load_state_dict(position)
        assert all(_same(first.next_batch(), second.next_batch()) for _ in range(40))


@pytest.mark.parametrize("change", [{"seed": 8}, {"batch_size": 2}, {"sequence_length": 128}, {"distractors": 0}])
def test_a_position_of_another_plan_is_refused(
    stream: CognateTokenStream, tokenizer_file: Path, change: dict[str, Any]
) -> None:
    """Going on in other data would be another run."""
    plan = DataPlan(**{"seed": 7, "batch_size": 3, "sequence_length": 64, **change})
    other, _ = build_stream(plan, SETTINGS, tokenizer_file=tokenizer_file)
    with pytest.raises(StreamMismatchError):
        other.load_state_dict(stream.state_dict())


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"format": 1},
        {"lanes": [[0, 0, 0]]},
        {"lanes": [[0, 0, 10**9]] * 3},
        {"lanes": [[0, 10**9, 0]] * 3},
        {"lanes": [[0, 0]] * 3},
        {"lanes": [[0, 0, True]] * 3},
        {"lanes": None},
        {"drawn": [-1, 0]},
        {"drawn": [0]},
        {"passed": "00"},
        {"batches": -1},
        {"batches": None},
    ],
)
def test_a_broken_position_is_refused(stream: CognateTokenStream, broken: dict[str, Any]) -> None:
    """The stream stays where it was."""
    before = stream.state_dict()
    with pytest.raises(StreamMismatchError):
        stream.load_state_dict({**before, **broken} if broken else {})
    assert stream.state_dict() == before


def test_training_and_validation_share_no_document() -> None:
    """The split rests on the question, and holds about the share asked for."""
    for source, _ in resolve((), SETTINGS):
        documents = list(CognateDatasetProcessor().documents(source, ProcessingReport()))
        held_out = [document for document in documents if document.is_validation(0.2)]
        assert 0.1 < len(held_out) / len(documents) < 0.3
        assert not {d.text for d in held_out} & {d.text for d in documents if not d.is_validation(0.2)}


def test_validation_batches_are_always_the_same_and_never_trained_on(stream: CognateTokenStream) -> None:
    """Their documents do not occur in a whole round of training."""
    first, second = list(stream.validation_batches()), list(stream.validation_batches())
    assert first
    assert all(_same(one, two) for one, two in zip(first, second, strict=True))
    stream.next_batch()
    assert _same(next(iter(stream.validation_batches())), first[0])
    trained = "".join(stream.tokenizer.decode(stream.next_batch().tokens.flatten().tolist()) for _ in range(600))
    assert not any(document.prompt.splitlines()[-1] in trained for document in stream.held_out)


def test_unigram_counts_are_those_of_the_training_tokens(stream: CognateTokenStream) -> None:
    """The frequencies follow what a long run of batches holds."""
    counts = stream.unigram_counts()
    assert counts.shape == (VOCABULARY,)
    assert counts.dtype == torch.int64
    seen = torch.zeros(VOCABULARY)
    for _ in range(1_000):
        seen += torch.bincount(stream.next_batch().tokens[:, 1:].flatten(), minlength=VOCABULARY)
    difference = (seen / seen.sum() - counts / counts.sum()).abs().sum()
    assert float(difference) < 0.08
    assert not (counts[seen > 0] == 0).any()


def _corpus(name: str, lengths: list[int], first: int) -> Corpus:
    offsets = np.cumsum(np.array([0, *lengths], dtype=np.int64))
    return Corpus(name, np.arange(first, first + int(offsets[-1]), dtype=np.uint16), offsets)


@given(
    lengths=st.lists(st.integers(3, 40), min_size=1, max_size=8),
    batch=st.integers(1, 5),
    length=st.integers(1, 24),
    steps=st.integers(1, 12),
)
def test_every_token_is_a_target_once_a_round(lengths: list[int], batch: int, length: int, steps: int) -> None:
    """Row by row, segments are unbroken pieces of documents, and a row goes on exactly where it stopped."""
    corpus = _corpus("c", lengths, 0)
    packer = Packer([corpus], weights=[1.0], batch_size=batch, sequence_length=length, seed=1)
    starts = set(corpus.offsets[:-1].tolist())
    ends: list[int | None] = [None] * batch
    for _ in range(steps):
        found = packer.next_batch()
        assert found.segment_ids is not None
        assert found.fresh_rows is not None
        for row in range(batch):
            tokens, segments = found.tokens[row].tolist(), found.segment_ids[row].tolist()
            for left in range(length):
                if segments[left] == segments[left + 1]:
                    assert tokens[left + 1] == tokens[left] + 1
                else:
                    assert tokens[left] + 1 in starts | {len(corpus.tokens)}
                    assert tokens[left + 1] in starts
            assert bool(found.fresh_rows[row]) == (tokens[0] in starts)
            if not found.fresh_rows[row]:
                assert tokens[0] == ends[row]
            ends[row] = tokens[-1]


def test_weights_decide_the_share_of_documents() -> None:
    """Three to one means three documents for one, whatever their number and length."""
    corpora = [_corpus("a", [8] * 30, 0), _corpus("b", [8] * 10, 1000)]
    packer = Packer(corpora, weights=[3.0, 1.0], batch_size=2, sequence_length=16, seed=0)
    for _ in range(200):
        packer.next_batch()
    drawn: Any = packer.state_dict()["drawn"]
    assert drawn[0] / drawn[1] == pytest.approx(3.0, rel=0.02)


def test_each_round_reads_every_document_in_a_new_order() -> None:
    """No document is read twice before all were read once."""
    corpus = _corpus("a", [5] * 20, 0)
    packer = Packer([corpus], weights=[1.0], batch_size=1, sequence_length=4, seed=0)
    rounds = [[int(packer.next_batch().tokens[0, 0]) for _ in range(20)] for _ in range(3)]
    assert all(sorted(one) == list(range(0, 100, 5)) for one in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_a_later_attempt_keeps_the_tokenizer_of_its_job(tmp_path: Path) -> None:
    """The file decides, once it is there."""
    CognateTokenizer.train(["other words"]).save(tmp_path / "tokenizer.json")
    share = (DatasetShare(dataset=DatasetId.FORGE_ARITHMETIC),)
    plan = DataPlan(seed=0, batch_size=1, sequence_length=64, datasets=share)
    stream, manifest = build_stream(plan, SourceSettings(generated_rows=60), tokenizer_file=tmp_path / "tokenizer.json")
    assert manifest.tokenizer_digest == CognateTokenizer.load(tmp_path / "tokenizer.json").digest
    assert stream.next_batch().tokens.shape == (1, 65)
