"""From easy to hard: the order of documents, what is admitted when, and positions under a curriculum."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cognate_server.data.build import DataPlan, build_stream
from cognate_server.data.corpus import Corpus
from cognate_server.data.curriculum import Curriculum
from cognate_server.data.difficulty import Admission
from cognate_server.data.packing import Packer
from cognate_server.data.permutation import Permutation
from cognate_server.data.processor import CognateDatasetProcessor, Document
from cognate_server.data.sources import DatasetId, DatasetShare, SourceSettings, resolve
from tests.data_fixtures import real_data
from training_common.findings import ProcessingReport


def _corpus(name: str, lengths: list[int], difficulties: list[int] | None, first: int = 0) -> Corpus:
    offsets = np.cumsum(np.array([0, *lengths], dtype=np.int64))
    tokens = np.arange(first, first + int(offsets[-1]), dtype=np.uint16)
    return Corpus(name, tokens, offsets, None if difficulties is None else np.array(difficulties, dtype=np.uint16))


def _packer(corpora: list[Corpus], curriculum: Curriculum | None, **shape: int) -> Packer:
    shape = {"batch_size": 1, "sequence_length": 4, "seed": 0, **shape}
    return Packer(corpora, weights=[1.0] * len(corpora), curriculum=curriculum, **shape)


def _batches(packer: Packer, count: int) -> list[list[Any]]:
    found = [packer.next_batch() for _ in range(count)]
    return [[one.tokens.tolist(), one.segment_ids, one.fresh_rows] for one in found]


def _same(one: list[list[Any]], two: list[list[Any]]) -> bool:
    return all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(one, two, strict=True)
    )


def test_competence_is_the_published_one() -> None:
    """It starts at its initial value, grows with the square root of time, and stays at 1."""
    curriculum = Curriculum(steps=100, initial_competence=0.1)
    assert curriculum.competence(0) == pytest.approx(0.1)
    assert curriculum.competence(25) == pytest.approx(math.sqrt(0.25 * (1 - 0.01) + 0.01))
    assert [curriculum.competence(step) for step in (100, 10**9)] == [1.0, 1.0]
    values = [curriculum.competence(step) for step in range(101)]
    assert values == sorted(values)


@pytest.mark.parametrize("change", [{"steps": 0}, {"initial_competence": 0.0}, {"initial_competence": 1.5}])
def test_an_impossible_curriculum_is_refused(change: dict[str, Any]) -> None:
    """The error names the field."""
    with pytest.raises(ValueError, match=f"curriculum.{next(iter(change))}"):
        Curriculum(**{"steps": 10, "initial_competence": 0.5, **change})


@given(st.lists(st.integers(0, 65_535), min_size=1, max_size=40), st.floats(0.01, 1))
def test_the_easiest_share_is_admitted(difficulties: list[int], competence: float) -> None:
    """At least the share asked for, no document harder than one left out, and no more than ties bring."""
    admission = Admission(np.array(difficulties, dtype=np.uint16))
    limit = admission.limit(competence)
    admitted = [value for number, value in enumerate(difficulties) if admission.admits(number, limit)]
    wanted = max(1, math.ceil(competence * len(difficulties) - 1e-9))
    assert sorted(difficulties)[: len(admitted)] == sorted(admitted)
    assert len(admitted) >= wanted
    assert sum(value < limit for value in admitted) < wanted


@given(st.integers(1, 300), st.integers(0, 5))
def test_a_permutation_has_each_number_once(size: int, seed: int) -> None:
    """For every size, and without a list of it."""
    permutation = Permutation(size, str(seed))
    assert sorted(permutation[place] for place in range(size)) == list(range(size))
    with pytest.raises(IndexError):
        permutation[size]


def test_permutations_are_shuffled_evenly() -> None:
    """Over many seeds every number is about as often in every place, and neighbours part."""
    counts = Counter((place, Permutation(6, str(seed))[place]) for seed in range(3_000) for place in range(6))
    assert len(counts) == 36
    assert all(400 < count < 600 for count in counts.values())
    large = Permutation(10_000, "a")
    numbers = [large[place] for place in range(10_000)]
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(numbers)) < 20


def test_easy_documents_come_first_and_all_come_in_the_end() -> None:
    """No document is drawn before it is admitted; after the last step of the curriculum none is passed over."""
    difficulties = list(range(50))
    curriculum = Curriculum(steps=60, initial_competence=0.1)
    packer = _packer([_corpus("a", [5] * 50, difficulties)], curriculum)
    drawn = [int(packer.next_batch().tokens[0, 0]) // 5 for _ in range(220)]
    hardest = [math.ceil(50 * curriculum.competence(step)) - 1 for step in range(60)]
    assert all(document <= limit for document, limit in zip(drawn[1:60], hardest[1:], strict=True))
    assert max(drawn[:6]) < 25
    assert set(drawn[60:]) == set(difficulties)


def test_a_curriculum_keeps_the_mix() -> None:
    """Each set has its own order, so the weights hold from the first step on."""
    corpora = [_corpus("a", [8] * 30, list(range(30))), _corpus("b", [8] * 90, [60_000 + n for n in range(90)], 1_000)]
    packer = _packer(corpora, Curriculum(steps=500), sequence_length=7)
    for _ in range(100):
        packer.next_batch()
    drawn: Any = packer.state_dict()["drawn"]
    assert abs(drawn[0] - drawn[1]) <= 1


def test_without_a_curriculum_no_document_is_passed_over() -> None:
    """Each round has every document once."""
    packer = _packer([_corpus("a", [5] * 20, list(range(20)))], None)
    assert sorted(int(packer.next_batch().tokens[0, 0]) for _ in range(20)) == list(range(0, 100, 5))
    state = packer.state_dict()
    assert state["drawn"] == state["passed"]


def test_a_curriculum_needs_difficulties() -> None:
    """Documents of unknown difficulty are an error, not easy."""
    with pytest.raises(ValueError, match="the corpus a has none"):
        _packer([_corpus("a", [5], None)], Curriculum(steps=5))


@given(
    documents=st.lists(st.tuples(st.integers(3, 40), st.integers(0, 9)), min_size=1, max_size=8),
    shape=st.fixed_dictionaries({"batch_size": st.integers(1, 4), "sequence_length": st.integers(1, 24)}),
    steps=st.none() | st.integers(1, 20),
    stop=st.integers(0, 25),
    seed=st.integers(0, 3),
)
def test_a_position_at_any_batch_gives_the_same_stream(
    documents: list[tuple[int, int]], shape: dict[str, int], steps: int | None, stop: int, seed: int
) -> None:
    """Bit for bit, before, in and after the curriculum and across rounds; the position itself is equal too."""
    lengths, difficulties = (list(values) for values in zip(*documents, strict=True))
    corpora = [_corpus("a", lengths, difficulties), _corpus("b", lengths[:1], difficulties[:1], 2_000)]
    curriculum = None if steps is None else Curriculum(steps=steps, initial_competence=0.3)
    whole, cut, resumed = (_packer(corpora, curriculum, seed=seed, **shape) for _ in range(3))
    expected = _batches(whole, stop + 12)
    assert _same(_batches(cut, stop), expected[:stop])
    resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert _same(_batches(resumed, 12), expected[stop:])
    assert resumed.state_dict() == whole.state_dict()


def _documents(name: DatasetId, settings: SourceSettings) -> list[Document]:
    ((source, _),) = resolve([DatasetShare(dataset=name)], settings)
    return list(CognateDatasetProcessor().documents(source, ProcessingReport()))


def test_generated_problems_with_more_steps_are_harder() -> None:
    """Steps decide, then length."""
    documents = _documents(DatasetId.FORGE_ARITHMETIC, SourceSettings(generated_rows=200))
    ranked = sorted(documents, key=lambda document: document.difficulty)
    keys = [(document.completion.count("\n"), len(document.text) // 4) for document in ranked]
    assert keys == sorted(keys)
    assert len({steps for steps, _ in keys}) > 2


def test_real_questions_are_ordered_by_level() -> None:
    """Every easy row of HotpotQA comes before every medium one, and those before the hard ones."""
    folder = real_data()
    documents = _documents(DatasetId.HOTPOTQA, SourceSettings(folder=folder))
    levels = Counter(document.difficulty // 4096 // 2 for document in documents)
    assert [levels[level] for level in range(3)] == [92, 358, 90]
    longest = _documents(DatasetId.GSM8K, SourceSettings(folder=folder))
    assert {document.difficulty // 4096 for document in longest} == set(range(2, 10))


def test_a_plan_with_a_curriculum_is_in_the_manifest() -> None:
    """The stream's digest and data.json both tell."""
    settings = SourceSettings(generated_rows=60)
    plans = [
        DataPlan(seed=1, batch_size=2, sequence_length=64, curriculum=curriculum)
        for curriculum in (None, Curriculum(steps=30), Curriculum(steps=31))
    ]
    manifests: list[Any] = [build_stream(plan, settings)[1].to_json() for plan in plans]
    assert [found["curriculum"] for found in manifests] == [
        None,
        {"steps": 30, "initial_competence": 0.1},
        {"steps": 31, "initial_competence": 0.1},
    ]
    assert len({found["stream_digest"] for found in manifests}) == 3
