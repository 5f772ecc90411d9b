"""The generator's problems are right, various and always the same."""

from __future__ import annotations

from itertools import islice

import pytest

from cognate_server.data.generate import GENERATORS, generate_rows
from cognate_server.data.gsm8k import parse_problem
from cognate_server.data.hotpotqa import parse_question
from cognate_server.data.processor import CognateDatasetProcessor
from cognate_server.data.sources import DatasetId, DatasetShare, SourceSettings, resolve
from training_common.findings import ProcessingReport

ROWS = 1_500


def test_every_generated_calculation_holds() -> None:
    """The checker of the real rows accepts all of them, and the last result is the answer."""
    problems = [parse_problem(row) for row in generate_rows("forge-arithmetic", rows=ROWS, seed=3)]
    assert all(problem.annotations[-1].value >= 0 for problem in problems)
    assert all(str(problem.annotations[-1].result) == problem.final for problem in problems)
    assert len({problem.question for problem in problems}) == ROWS


def test_every_generated_answer_is_in_its_supporting_sentences() -> None:
    """Two paragraphs tell it together, and no other paragraph is needed."""
    questions = [parse_question(row) for row in generate_rows("forge-twohop", rows=ROWS, seed=3)]
    assert all(question.answer_is_supported for question in questions)
    assert all(len(question.gold_titles) == 2 for question in questions)
    assert all(len(question.paragraphs) >= 4 for question in questions)
    assert len({question.question for question in questions}) == ROWS
    yes = sum(question.answer == "yes" for question in questions)
    no = sum(question.answer == "no" for question in questions)
    assert 0.5 < yes / no < 2


def test_a_bridge_needs_both_of_its_paragraphs() -> None:
    """The first fact leads to the second paragraph by its title, which the question does not name."""
    for row in generate_rows("forge-twohop", rows=300, seed=4):
        question = parse_question(row)
        if question.kind == "bridge":
            first, second = question.facts
            assert second.title in first.sentence
            assert first.title in question.question
            assert second.title not in question.question


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_rows_depend_on_seed_and_number_only(name: str) -> None:
    """More rows do not change the first ones; another seed changes all."""
    few = list(generate_rows(name, rows=20, seed=1))
    assert few == list(islice(generate_rows(name, rows=50, seed=1), 20))
    assert not any(row in few for row in generate_rows(name, rows=20, seed=2))


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_the_processor_keeps_every_generated_row(name: str) -> None:
    """Nothing of this project's own is refused, and none bears a real set's name."""
    (source, _), *_ = resolve([DatasetShare(dataset=DatasetId(name))], SourceSettings(generated_rows=300))
    report = ProcessingReport()
    documents = list(CognateDatasetProcessor().documents(source, report))
    assert (len(documents), report.rows_refused) == (300, 0)
    assert {document.source for document in documents} == {name}
    assert all(document.completion.endswith(f"\n#### {document.answer}") for document in documents)
