"""HotpotQA's form, as the official files and as the hub write it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest

from cognate_server.data.hotpotqa import parse_question
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


@pytest.mark.parametrize(("count", "kept"), [(0, 2), (1, 3), (2, 4), (9, 4)])
def test_distractors_are_counted(count: int, kept: int) -> None:
    """Gold paragraphs always stay."""
    pages = parse_question(ROW).with_distractors(count)
    assert len(pages) == kept
    assert {"Ada & Co", "The Amber Raven"} <= {page.title for page in pages}


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
        ({"supporting_facts": "Far Away"}, "supporting_facts", "wrong_shape"),
        ({"supporting_facts": {"title": ["Far Away"], "sent_id": []}}, "supporting_facts", "wrong_shape"),
        ({"context": []}, "context", "no_context"),
        ({"context": None}, "context", "wrong_shape"),
        ({"context": [["A"]]}, "context", "wrong_shape"),
        ({"context": [["A", ["x"]], ["A", ["y"]]]}, "context", "duplicate_title"),
        ({"context": [["A", "x"]]}, "context.sentences", "wrong_shape"),
        ({"context": [["A", [1]]]}, "context.sentences", "wrong_type"),
        ({"context": [[f"t{n}", ["x"]] for n in range(65)]}, "context", "too_long"),
        ({"answer": ""}, "answer", "blank"),
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
    kept, refused = [], Counter[str]()
    for row in read_rows(folder / "hotpotqa" / f"{split}.jsonl.gz"):
        try:
            kept.append(parse_question(row.load()))
        except RowRefusedError as error:
            refused[error.reason] += 1
    assert len(kept) + refused.total() == expected["rows"]
    assert len(kept) == expected["all_gold_titles_in_context"]
    assert refused["no_context"] == expected.get("rows_empty_context", 0)
    assert all(len(question.gold_titles) == 2 for question in kept)
    if split != "dev_fullwiki":
        kinds = Counter(question.kind for question in kept)
        levels = Counter(question.level for question in kept)
        assert [kinds["bridge"], kinds["comparison"]] == [expected["bridge"], expected["comparison"]]
        assert all(levels[name] == expected.get(name, 0) for name in ("easy", "medium", "hard"))
        assert sum(question.answer in ("yes", "no") for question in kept) == expected["yes_no_answers"]
        assert all(question.answer_is_supported for question in kept)


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
