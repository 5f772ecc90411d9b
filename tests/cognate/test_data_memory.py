"""Memory is flat in the size of the set, and the files that hold it instead have no name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cognate_server.data.build import DataPlan, build_stream
from cognate_server.data.corpus import CorpusWriter
from cognate_server.data.seen import SeenKeys
from cognate_server.data.sources import SourceSettings

PROCESS = Path(__file__).parents[1] / "benchmarks" / "data_process.py"
# Eight times the rows added 9.6 MB beyond the mapped files, and 30 MB when tokens and keys were kept in memory.
MOST_GROWTH_BYTES = 16 * 1024 * 1024


@pytest.mark.slow
def test_eight_times_the_rows_take_the_same_memory(tmp_path: Path) -> None:
    """What grows is on disk: the peak moves by buffers and caches alone."""
    command = [sys.executable, str(PROCESS), "1000", "8000", str(tmp_path)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert json.loads(result.stdout)["resident_bytes"] < MOST_GROWTH_BYTES


def test_no_file_is_left_in_the_folder(tmp_path: Path) -> None:
    """A worker that is killed leaves no data behind, because its files never had a name."""
    stream, _ = build_stream(
        DataPlan(seed=0, batch_size=1, sequence_length=64), SourceSettings(generated_rows=50), folder=tmp_path
    )
    assert list(tmp_path.iterdir()) == []
    assert stream.next_batch().tokens.shape == (1, 65)


@given(st.lists(st.tuples(st.lists(st.integers(0, 15_615), min_size=1, max_size=9), st.integers(0, 65_535))))
def test_a_corpus_returns_what_was_written(documents: list[tuple[list[int], int]]) -> None:
    """Tokens, borders, difficulties and counts survive the files, and nobody can write into them."""
    writer = CorpusWriter("c", None)
    for ids, difficulty in documents:
        writer.add(ids, difficulty=difficulty)
    corpus = writer.corpus()
    assert [corpus.document(n).tolist() for n in range(corpus.documents)] == [ids for ids, _ in documents]
    assert corpus.difficulties is not None
    assert corpus.difficulties.tolist() == [difficulty for _, difficulty in documents]
    flat = [number for ids, _ in documents for number in ids]
    assert corpus.counts(15_616).tolist() == np.bincount(flat or [0], minlength=15_616).tolist() or not flat
    assert not corpus.offsets.flags.writeable


def test_the_digest_of_a_corpus_covers_all_of_it() -> None:
    """Another token, border or difficulty is another digest."""

    def digest(*documents: tuple[list[int], int]) -> str:
        writer = CorpusWriter("c", None)
        for ids, difficulty in documents:
            writer.add(ids, difficulty=difficulty)
        return writer.corpus().digest()

    digests = [
        digest(([1, 2], 5), ([3], 6)),
        digest(([1], 5), ([2, 3], 6)),
        digest(([1, 2], 5), ([4], 6)),
        digest(([1, 2], 5), ([3], 7)),
        digest(),
    ]
    assert len(set(digests)) == 5
    assert digests[0] == digest(([1, 2], 5), ([3], 6))


@given(st.lists(st.binary(max_size=3)))
def test_seen_keys_are_a_set(keys: list[bytes]) -> None:
    """Each key is new once."""
    known: set[bytes] = set()
    with SeenKeys(None) as seen:
        for key in keys:
            assert seen.add(key) == (key not in known)
            known.add(key)
