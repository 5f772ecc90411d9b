"""HotpotQA's form, as the official files and as the hub write it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest

from cognate_server.data.hotpotqa import TwoHopQuestion, parse_question
from tests.data_fixtures import figures, real_data
from training_common.findings import RowRefusedError
from training_common.rows import read_rows

ROW: dict[str, Any] = {
    "_id": "a1",
    "question": " Where was the author of The Amber Raven born",
    "answer": "Dunford",
    "type": "bridge",
    "level": "medium",
    "supporting_facts": [["The Amber Raven", 0], ["Ada &amp; Co", 2]],
    "context": [
        ["Far Away", ["Nothing of note."]],
        ["Ada &amp; Co", ["Ada & Co is a firm.", " ", " It began in Dunford."]],
        ["The Amber Raven", ["The Amber Raven is by Ada &amp; Co."]],
        ["Further Away", ["Nothing at all."]],
    ],
}


def _hub_form(row: dict[str, Any]) -> dict[str, Any]:
    titles, sentences = zip(*row["context"], strict=True)
    names, numbers = zip(*row["supporting_facts"], strict=True)
    rest = {key: value for key, value in row.items() if key not in ("_id", "context", "supporting_facts")}
    context = {"title": list(titles), "sentences": list(sentences)}
    facts = {"title": list(names), "sent_id": list(numbers)}
    return {"id": row["_id"], **rest, "context": context, "supporting_facts": facts}


def test_both_forms_give_the_same_question() -> None:
    """The form of the file leaves no trace."""
    assert parse_question(ROW) == parse_question(_hub_form(ROW))


def test_supporting_facts_are_the_chain_to_the_answer() -> None:
    """Facts keep the row's order, blank sentences count, and entities are unescaped in titles and facts alike."""
    question = parse_question(ROW)
    assert [(fact.title, fact.sentence) for fact in question.facts] == [
        ("The Amber Raven", "The Amber Raven is by Ada & Co."),
        ("Ada & Co", "It began in Dunford."),
    ]
    assert question.answer_is_supported
    assert question.question == "Where was the author of The Amber Raven born"


def test_the_chain_of_a_bridge_ends_where_the_answer_stands() -> None:
    """Whatever the row's order is, the page with the answer comes last, and each page's facts stay in order."""
    turned = {**ROW, "supporting_facts": [["Ada &amp; Co", 0], ["Ada &amp; Co", 2], ["The Amber Raven", 0]]}
    assert [(fact.title, fact.sentence_index) for fact in parse_question(turned).chain] == [
        ("The Amber Raven", 0),
        ("Ada & Co", 0),
        ("Ada & Co", 2),
    ]
    compared = parse_question({**turned, "type": "comparison"})
    assert compared.chain == compared.facts


def test_a_fact_that_is_named_twice_counts_once() -> None:
    """The chain does not repeat itself."""
    twice = {**ROW, "supporting_facts": ROW["supporting_facts"] * 2}
    assert parse_question(twice).facts == parse_question(ROW).facts


@pytest.mark.parametrize("written", ["title", "fact"])
def test_a_fact_finds_its_page_though_only_one_of_them_is_escaped(written: str) -> None:
    """Entities are unescaped in both before they are compared."""
    row = copy.deepcopy(ROW)
    if written == "fact":
        row["context"][1][0] = "Ada & Co"
    else:
        row["supporting_facts"][1][0] = "Ada & Co"
    assert parse_question(row) == parse_question(ROW)


@pytest.mark.parametrize(("count", "kept"), [(0, 2), (1, 3), (2, 4), (9, 4)])
def test_distractors_are_counted(count: int, kept: int) -> None:
    """Gold paragraphs always stay, and the row's order too."""
    question = parse_question(ROW)
    pages = question.with_distractors(count, seed=0)
    assert len(pages) == kept
    assert {"Ada & Co", "The Amber Raven"} <= {page.title for page in pages}
    assert [page for page in question.paragraphs if page in pages] == list(pages)


def test_the_seed_picks_the_distractors() -> None:
    """The same seed picks the same ones; over many seeds each is picked about equally often."""
    question = parse_question(ROW)
    assert question.with_distractors(1, seed=5) == question.with_distractors(1, seed=5)
    picked = Counter(page.title for seed in range(400) for page in question.with_distractors(1, seed=seed))
    assert picked["Far Away"] + picked["Further Away"] == 400
    assert 150 < picked["Far Away"] < 250


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"supporting_facts": [["Nowhere", 0]]}, "supporting_facts", "gold_paragraph_missing"),
        ({"supporting_facts": [["Far Away", 1]]}, "supporting_facts", "fact_out_of_range"),
        ({"supporting_facts": [["Far Away", -1]]}, "supporting_facts", "fact_out_of_range"),
        ({"supporting_facts": [["Far Away", True]]}, "supporting_facts", "fact_out_of_range"),
        ({"supporting_facts": [["Far Away", 0.0]]}, "supporting_facts", "fact_out_of_range"),
        ({"supporting_facts": [[["Far Away"], 0]]}, "supporting_facts", "gold_paragraph_missing"),
        ({"supporting_facts": []}, "supporting_facts", "no_facts"),
        ({"supporting_facts": [["Ada &amp; Co", 1]]}, "supporting_facts", "blank_fact"),
        ({"supporting_facts": "Far Away"}, "supporting_facts", "wrong_shape"),
        ({"supporting_facts": {"title": ["Far Away"], "sent_id": []}}, "supporting_facts", "wrong_shape"),
        ({"context": []}, "context", "no_context"),
        ({"context": None}, "context", "wrong_shape"),
        ({"context": [["A"]]}, "context", "wrong_shape"),
        ({"context": [["A", ["x"]], ["A", ["y"]]]}, "context", "duplicate_title"),
        ({"context": [["A&amp;B", ["x"]], ["A&B", ["y"]]]}, "context", "duplicate_title"),
        ({"context": [["A", "x"]]}, "context.sentences", "wrong_shape"),
        ({"context": [["A", [1]]]}, "context.sentences", "wrong_type"),
        ({"context": [[f"t{n}", ["x"]] for n in range(65)]}, "context", "too_long"),
        ({"answer": ""}, "answer", "blank"),
        ({"answer": "&nbsp;"}, "answer", "blank"),
        ({"question": "\ud800"}, "question", "lone_surrogate"),
        ({"context": [["A", ["\ud800"]]]}, "context.sentences", "lone_surrogate"),
        ({"context": [["A", [float("nan")]]]}, "context.sentences", "wrong_type"),
        ({"answer": None}, "answer", "wrong_type"),
        ({"question": 7}, "question", "wrong_type"),
        ({"_id": ""}, "_id", "blank"),
        ({"type": "other"}, "type", "unknown_value"),
        ({"level": ["hard"]}, "level", "unknown_value"),
    ],
)
def test_bad_rows_are_refused_with_field_and_reason(change: dict[str, Any], field: str, reason: str) -> None:
    """Each finding names what is wrong."""
    with pytest.raises(RowRefusedError) as refusal:
        parse_question({**copy.deepcopy(ROW), **change})
    assert (refusal.value.field, refusal.value.reason) == (field, reason)


@pytest.mark.parametrize("split", ["train_distractor", "dev_distractor", "dev_fullwiki"])
def test_real_rows_have_the_measured_figures(split: str) -> None:
    """Distractor rows are all used; fullwiki rows that lack a gold paragraph are refused one by one."""
    folder = real_data()
    expected = figures(folder)["hotpotqa"][split]
    rows = [row.load() for row in read_rows(folder / "hotpotqa" / f"{split}.jsonl.gz")]
    kept, refused = [], Counter[str]()
    for row in rows:
        try:
            kept.append(parse_question(row))
        except RowRefusedError as error:
            refused[error.reason] += 1
    assert _figures(rows, kept, refused).items() >= expected.items()
    assert len(kept) + refused.total() == expected["rows"]
    assert all(len(question.gold_titles) == 2 for question in kept)
    if split != "dev_fullwiki":
        assert all(question.answer_is_supported for question in kept)


def _figures(rows: list[Any], kept: list[TwoHopQuestion], refused: Counter[str]) -> dict[str, object]:
    """The figures under the names that `expected_figures.json` gives them."""
    spans = [question for question in kept if question.answer not in ("yes", "no")]
    found = [sum(title in dict(row["context"]) for title in {t for t, _ in row["supporting_facts"]}) for row in rows]
    answers = [(row["answer"], "".join(s for _, page in row["context"] for s in page)) for row in rows]
    return {
        "rows": len(rows),
        **Counter(row["type"] for row in rows),
        **Counter(row["level"] for row in rows),
        "rows_10_paragraphs": sum(len(row["context"]) == 10 for row in rows),
        "rows_empty_context": refused["no_context"],
        "all_gold_titles_in_context": len(kept),
        "some_gold_titles_in_context": found.count(1),
        "no_gold_title_in_context": found.count(0),
        "supporting_fact_index_out_of_range": refused["fact_out_of_range"],
        "yes_no_answers": sum(answer in ("yes", "no") for answer, _ in answers),
        "span_answers": sum(answer not in ("yes", "no") for answer, _ in answers),
        "span_answers_verbatim_in_gold_paragraphs": sum(
            any(question.answer in page.text for page in question.paragraphs if page.title in question.gold_titles)
            for question in spans
        ),
        "span_answers_verbatim_in_supporting_sentences": sum(question.answer_is_supported for question in spans),
        "span_answers_anywhere_in_context": sum(
            answer in text for answer, text in answers if answer not in ("yes", "no")
        ),
    }


def test_the_real_array_and_hub_samples_are_the_rows_of_the_lines() -> None:
    """One question, three spellings."""
    folder = real_data() / "hotpotqa"
    by_key = {}
    for name in ("train_distractor.jsonl.gz", "dev_distractor.jsonl.gz"):
        for row in read_rows(folder / name):
            question = parse_question(row.load())
            by_key[question.key] = question
    for name in ("official_array_sample.json", "hf_form_sample.jsonl"):
        questions = [parse_question(row.load()) for row in read_rows(folder / name)]
        assert [by_key[question.key] for question in questions] == questions
        assert len(questions) == 40
